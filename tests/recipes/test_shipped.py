"""Every recipe of the package is resolved, built and brought through all of its stages without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ivideogpt
from ivideogpt import recipes
from ivideogpt.cli import lightning_main
from ivideogpt.config import WorldModelConfig
from ivideogpt.recipes.reading import dump_yaml, parse_yaml, resolve
from ivideogpt.recipes.results import load_tokenizer
from ivideogpt.training.tokenization import tokenize_clips

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
EMBEDDED = {"adapt", "debug", "demo", "grpo", "metaworld_nano", "tokens"}
"""Recipes that must run with nothing but the package: no perceptual network."""


def test_all_recipes_are_found() -> None:
    assert len(NAMES) == 20
    assert set(NAMES) >= EMBEDDED
    assert recipes.recipes_folder() == FOLDER


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_built(name: str, shards: dict[str, str], tmp_path: Path) -> None:
    """Recipes of large models are built at nano's size, with its actions, on this machine's processor."""
    own = None if name == "embodiments" else 4  # there each robot gets an action layer of its own
    start = ivideogpt.WorldModel(WorldModelConfig.preset("nano", action_dim=own, reward=True))
    start.save_pretrained(tmp_path / "start")
    recipe = recipes.load(name)
    words = [f"output={tmp_path / 'out'}"]
    for stage, content in recipe["stages"].items():
        data = content["data"]["init_args"]
        length = min(data["segment_length"], 20)
        train = shards["px64"]
        if content["data"]["class_path"] == "ivideogpt.data.TokenDataModule":
            train = str(tokenize_clips(start.tokenizer, [train], tmp_path / stage, length, clips_per_episode=1).folder)
        words += [f"{stage}.data.train={train}", f"{stage}.data.val={shards['px64']}"]
        words += [f"{stage}.data.batch_size=1", f"{stage}.data.global_batch_size=null"]
        words += [f"{stage}.data.segment_length={length}"]
        words += [f"{stage}.trainer.max_steps=0", f"{stage}.trainer.limit_test_batches=1"]
        for part, spec in content["module"]["init_args"].items():
            if isinstance(spec, dict) and str(spec.get("from")).startswith("ivideogpt-"):
                words.append(f"{stage}.module.{part}.from={tmp_path / 'start'}")
        if content["module"]["init_args"].get("action_spaces"):
            words.append(f'{stage}.module.action_spaces={{"*": 4}}')
        if "horizon" in content["module"]["init_args"]:
            words += [f"{stage}.module.horizon=1", f"{stage}.module.runs=1", f"{stage}.module.protocol=custom"]
        if data.get("holdout_every"):
            words.append(f"{stage}.data.holdout_every=null")
        if name not in EMBEDDED:
            words += _at_nano_size(stage, content)
    output = recipes.run(name, words)
    assert output is not None
    if list(recipe["stages"]) == ["tokenizer"]:
        assert load_tokenizer(output / "tokenizer").config == start.tokenizer.config
        return
    model = ivideogpt.from_pretrained(output / "model", action_space="*" if name == "embodiments" else None)
    assert model.config.action_dim == (None if "action_free" in name or "oxe" in name else 4)


def _at_nano_size(stage: str, content: dict[str, Any]) -> list[str]:
    module = content["module"]["init_args"]
    words = [f"{stage}.trainer.{word}" for word in ("accelerator=cpu", "devices=1", "strategy=auto")]
    words += [f"{stage}.trainer.precision=32-true", f"{stage}.data.num_workers=0", f"{stage}.data.resolution=64"]
    if "perceptual_weight" in module:
        words.append(f"{stage}.module.perceptual_weight=0.0")
    for part in ("tokenizer", "transformer"):
        if "preset" in (module.get(part) or {}):
            changes = {"preset": "nano"} | (
                {"context_length": module[part]["context_length"]} if part == "tokenizer" else {}
            )
            if module[part].get("action_dim") is not None:
                changes["action_dim"] = 4
            words.append(f"{stage}.module.{part}={json.dumps(changes)}")
    return words


def test_debug_runs_as_it_stands_and_a_second_run_skips_its_stages(tmp_path: Path, capsys) -> None:
    words = ["run", str(FOLDER / "debug.yaml"), f"output={tmp_path / 'debug'}"]
    assert lightning_main(words) == 0
    stages = list(recipes.load("debug")["stages"])
    assert ivideogpt.from_pretrained(tmp_path / "debug" / "model").reward_head is not None
    assert (tmp_path / "debug" / "evaluate" / "results.json").is_file()
    assert lightning_main(words) == 0
    second = capsys.readouterr().out
    assert [stage for stage in stages if f"{stage}: finished before, skipped" in second] == stages


@pytest.mark.parametrize("name", NAMES)
def test_header_says_command_hardware_time_and_expected_result(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    header = text.split("\nname:")[0]
    assert f"Command   lightning run recipes/{name}.yaml" in header
    for word in ("Data", "Hardware", "Time", "Expected"):
        assert f"\n# {word} " in header
    assert f"name: {name}\n" in text
    assert name in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_portable(name: str) -> None:
    recipe = recipes.load(name)
    assert resolve(parse_yaml(dump_yaml(recipe), name)) == recipe

    def strings(node: object) -> list[str]:
        if isinstance(node, dict):
            return [*node, *(text for value in node.values() for text in strings(value))]
        if isinstance(node, list):
            return [text for value in node for text in strings(value)]
        return [node] if isinstance(node, str) else []

    assert not [text for text in strings(recipe) if text.startswith(("/", "~"))]
    if name in EMBEDDED:
        for stage in recipe["stages"].values():
            assert stage["module"]["init_args"].get("perceptual_weight", 0.0) == 0.0
