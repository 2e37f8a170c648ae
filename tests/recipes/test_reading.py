"""Tests of reading recipes: overlays, defaults, overrides, and what each mistake says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivideogpt import cli, recipes
from ivideogpt.recipes.reading import dump_yaml, merge, parse_yaml, read_file, resolve

STAGE: dict[str, Any] = {
    "module": {"class_path": "a.B", "init_args": {"learning_rate": 0.1, "tokenizer": {"preset": "nano"}}},
    "data": {"class_path": "a.Data", "init_args": {"batch_size": 4}},
    "trainer": {"max_steps": 5, "callbacks": [{"class_path": "a.C", "init_args": {"n": 1}}]},
}
RECIPE: dict[str, Any] = {"name": "x", "stages": {"tokenizer": STAGE, "transformer": STAGE}}


def test_overlays_are_merged_relative_to_the_recipe_and_the_recipe_wins(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "one.yaml").write_text("seed: 1\ndefaults: {trainer: {precision: 16, devices: 1}}")
    (tmp_path / "base" / "two.yaml").write_text("base: one.yaml\ndefaults: {trainer: {precision: 32}}")
    (tmp_path / "recipe.yaml").write_text("base: [base/two.yaml]\nname: x\nseed: 2\nstages: {}")
    merged = read_file(tmp_path / "recipe.yaml")
    assert merged["seed"] == 2
    assert merged["defaults"]["trainer"] == {"precision": 32, "devices": 1}
    assert "base" not in merged


def test_overlays_that_are_missing_or_go_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    with pytest.raises(ValueError, match=r"base names 'b.yaml', but there is no file .*b.yaml"):
        read_file(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ValueError, match=r"names itself in `base`, by way of a.yaml -> b.yaml"):
        read_file(tmp_path / "a.yaml")


def test_an_overlay_from_the_command_line_lies_over_the_recipe_and_under_its_other_overrides(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(stages=("tokenizer",), base=[])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "mine.yaml").write_text(
        "defaults: {trainer: {max_steps: 4, precision: bf16-mixed}}"
    )  # beside the recipe
    Path("seed.yaml").write_text("seed: 9\ndefaults: {trainer: {precision: 32-true}}")  # in the working folder

    def load(*words: str) -> Any:
        return recipes.load(path, words)

    trainer = load("base=mine.yaml")["stages"]["tokenizer"]["trainer"]
    assert (trainer["max_steps"], trainer["precision"]) == (4, "bf16-mixed")
    assert load("base=mine.yaml", "trainer.max_steps=2")["stages"]["tokenizer"]["trainer"]["max_steps"] == 2
    for words in (["base=[mine.yaml, seed.yaml]"], ["base=mine.yaml", "base=seed.yaml"]):
        both = load(*words)
        trainer = both["stages"]["tokenizer"]["trainer"]
        assert (both["seed"], trainer["max_steps"], trainer["precision"]) == (9, 4, "32-true")
    with pytest.raises(
        ValueError, match=r"override 'base=none.yaml': there is no file 'none.yaml' in \., .*, .*recipes"
    ):
        load("base=none.yaml")
    # the package's own overlays; strategy of one class in place of a name
    sharded = recipes.load("oxe_64_medium", ["base=base/fsdp.yaml"])["stages"]["transformer"]["trainer"]
    assert sharded["strategy"] == {"class_path": "ivideogpt.training.sharding.FullyShardedStrategy"}
    assert recipes.load("bair", ["base=base/cpu.yaml"])["stages"]["tokenizer"]["trainer"]["accelerator"] == "cpu"

    # a setting like any other: a stage that was begun without it is not gone on with
    assert cli.main(["run", str(path), "base=mine.yaml", "trainer.precision=32-true"]) == 0
    capsys.readouterr()
    assert cli.main(["run", str(path)]) == 2
    assert "trainer.max_steps: 4 -> 6" in capsys.readouterr().err


def test_another_class_replaces_the_arguments_of_the_first() -> None:
    under = {"class_path": "a.B", "init_args": {"x": 1}}
    assert merge(under, {"init_args": {"y": 2}}) == {"class_path": "a.B", "init_args": {"x": 1, "y": 2}}
    assert merge(under, {"class_path": "a.C"}) == {"class_path": "a.C"}
    assert merge({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}


def test_defaults_are_folded_into_every_stage() -> None:
    stages = {"one": {"module": STAGE["module"]}, "two": {**STAGE, "trainer": {"max_steps": 7}}}
    defaults = {"data": STAGE["data"], "trainer": {"max_steps": 5, "devices": 1}}
    resolved = resolve({"name": "x", "defaults": defaults, "stages": stages})
    assert resolved["stages"]["one"]["trainer"] == {"max_steps": 5, "devices": 1}
    assert resolved["stages"]["two"]["trainer"] == {"max_steps": 7, "devices": 1}
    assert resolved["output"] == "runs/x"
    assert "defaults" not in resolved


def test_overrides_replace_any_value_with_or_without_stages_and_init_args() -> None:
    resolved = resolve(
        RECIPE,
        [
            "seed=7",
            "stages.tokenizer.trainer.max_steps=10",
            "transformer.module.init_args.learning_rate=5e-4",
            "tokenizer.module.learning_rate=1e-3",
            "tokenizer.module.tokenizer={from: elsewhere}",
            "tokenizer.trainer.callbacks.0.n=3",
            "tokenizer.trainer.precision=bf16-mixed",
            "transformer.data.val=[a, b]",
            "output=some/where=else",
        ],
    )
    tokenizer, transformer = resolved["stages"]["tokenizer"], resolved["stages"]["transformer"]
    assert resolved["seed"] == 7
    assert resolved["output"] == "some/where=else"
    assert tokenizer["trainer"]["max_steps"] == 10
    assert tokenizer["trainer"]["precision"] == "bf16-mixed"
    assert tokenizer["trainer"]["callbacks"][0]["init_args"] == {"n": 3}
    assert tokenizer["module"]["init_args"] == {"learning_rate": 1e-3, "tokenizer": {"from": "elsewhere"}}
    assert transformer["module"]["init_args"]["learning_rate"] == 5e-4
    assert transformer["data"]["init_args"]["val"] == ["a", "b"]
    assert RECIPE["stages"]["tokenizer"]["trainer"]["max_steps"] == 5  # the input stays as it was


def test_overrides_of_defaults_reach_every_stage_and_null_drops_a_stage() -> None:
    recipe = {**RECIPE, "defaults": {"trainer": {"devices": 1}}}
    resolved = resolve(recipe, ["defaults.trainer.devices=2", "stages.tokenizer=null"])
    assert list(resolved["stages"]) == ["transformer"]
    assert resolved["stages"]["transformer"]["trainer"]["devices"] == 2
    assert resolve(recipe, ["trainer.devices=2", "stages.tokenizer=null"]) == resolved
    stage = {**RECIPE["stages"]["tokenizer"]}
    named = resolve({**RECIPE, "stages": {"data": stage}}, ["data.trainer.max_steps=3"])  # a stage of that name
    assert named["stages"]["data"]["trainer"]["max_steps"] == 3


def test_a_resolved_recipe_reads_back_as_the_same() -> None:
    resolved = resolve(RECIPE, ["tokenizer.module.learning_rate=1e-5", "tokenizer.trainer.precision='16'"])
    assert resolve(parse_yaml(dump_yaml(resolved), "text")) == resolved


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sead=1", r"unknown key 'sead'; did you mean 'seed'"),
        ("stages.tokeniser.trainer.max_steps=1", r"there is no stage 'tokeniser'; did you mean 'tokenizer'"),
        ("tokenizr.trainer.max_steps=1", r"unknown key 'tokenizr'; did you mean 'tokenizer'"),
        ("stages.tokenizer.trainr.max_steps=1", r"stages.tokenizer: unknown key 'trainr'; did you mean 'trainer'"),
        ("defaults.modul.x=1", r"defaults: unknown key 'modul'; did you mean 'module'"),
        ("seed", r"override 'seed' must be key=value"),
        ("=1", r"override '=1' must be key=value"),
        ("seed.x=1", r"seed.x: seed is 3, it has nothing inside"),
        ("tokenizer.trainer.callbacks.4.n=1", r"is a list of 1, it has no '4'"),
        ("seed=[1", r"the value of override 'seed=\[1' is not valid YAML"),
        ("base=x.yaml", r"`base` takes a file, such as"),
        ("seed=-1", r"seed must be a whole number from 0 on, got -1"),
        ("name=a/b", r"needs a `name` of letters.*got 'a/b'"),
        ("on_change=ask", r"on_change must be one of error, rerun, continue, got 'ask'"),
        ("tokenizer.module=5", r"stages.tokenizer needs `module`, a mapping, got 5"),
    ],
)
def test_wrong_overrides_name_what_is_wrong(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve({**RECIPE, "seed": 3}, [override])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "x"}, "needs `stages`"),
        ({"name": "x", "stages": {"a b": STAGE}}, "stage name 'a b' must be of letters"),
        ({"name": "x", "stages": {"model": STAGE}}, "and not 'model'"),
        ({"name": "x", "stages": {"..": STAGE}}, "stage name '..' must be of letters"),
        ({"name": "x", "stages": {"one": {"module": {}, "data": {}}}}, "stages.one needs `trainer`"),
        ({"stages": {"one": STAGE}}, "needs a `name`"),
        ({"name": "x", "stages": {"one": STAGE}, "trainer": {}}, "unknown key 'trainer'"),
    ],
)
def test_wrong_recipes_name_what_is_wrong(recipe: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(recipe)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5E+3", 5e3), ("1.5", 1.5), ("3", 3), ("no", "no"), ("on", "on"), ("true", True), ("~", None),
     ("2024-01-01", "2024-01-01"), ("[1, 2.0]", [1, 2.0]), ("runs/1e5", "runs/1e5"), ("e5", "e5")],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    found = parse_yaml(text, "x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: 1\na: 2", "key 'a' stands here twice"), ("a: [", "not valid YAML"), ("1: 2", "key 1 is no word"),
     ("a: !!python/object/apply:os.system [ls]", "not valid YAML")],
)  # fmt: skip
def test_bad_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text, "recipe.yaml")


def test_a_recipe_file_must_hold_a_mapping_of_text(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_file(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text file"):
        read_file(tmp_path / "binary.yaml")
