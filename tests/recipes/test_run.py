"""Tests of running recipes: skip, resume after SIGKILL, changed settings, where stages start from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ivideogpt
from ivideogpt import recipes
from ivideogpt.recipes.results import differences, read_record
from ivideogpt.training import TokenizerModule


def weights(output: Path) -> dict[str, str]:
    """Hash of every weight file under ``output``."""
    files = sorted(output.rglob("*.safetensors"))
    return {path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "ivideogpt.cli", "run", str(recipe), *overrides]


def test_killed_run_ends_with_the_weights_of_one_that_was_not(recipe, tmp_path: Path) -> None:
    path, words = recipe(), ["transformer.trainer.max_steps=60"]  # long enough that the kill comes in the middle
    straight = recipes.run(path, words)
    assert straight is not None
    threads = os.environ.get("OMP_NUM_THREADS", "2")  # sums over another number of threads differ in the last bit
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(Path(ivideogpt.__file__).parents[1])}
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(path, f"output={killed}", *words), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    checkpoints = killed / "transformer" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("update-*.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    record = read_record(killed / "transformer")
    assert record is not None, errors.decode()
    assert record["state"] == "running"
    assert recipes.run(path, [f"output={killed}", *words]) == killed
    assert weights(killed) == weights(straight)
    assert "model/transformer/model.safetensors" in weights(killed)


def test_finished_stages_are_skipped_and_the_results_can_be_loaded(recipe, capsys) -> None:
    path = recipe(stages=("tokenizer", "transformer", "evaluate"))
    output = recipes.run(path)
    assert output is not None
    files = {file: file.stat().st_mtime_ns for file in output.glob("*/*/*.safetensors")}
    capsys.readouterr()
    recipes.run(path)
    printed = capsys.readouterr().out
    assert [f"{name}: finished before, skipped" in printed for name in ("tokenizer", "transformer", "evaluate")] == [
        True, True, True,
    ]  # fmt: skip
    assert files == {file: file.stat().st_mtime_ns for file in output.glob("*/*/*.safetensors") if file in files}
    model = ivideogpt.from_pretrained(output / "model")
    assert model.reward_head is not None
    assert model.extras["recipe"] == "tiny"
    assert model.extras["training"] == {"stage": "transformer", "updates": 6, "seed": 3}
    resolved = yaml.safe_load((output / "model" / "recipe.yaml").read_text())
    assert resolved["stages"]["transformer"]["module"]["init_args"]["learning_rate"] == 1e-3
    assert (output / "recipe.yaml").read_text() == (output / "model" / "recipe.yaml").read_text()
    assert str(output) not in (output / "recipe.yaml").read_text()
    assert (output / "evaluate" / "results.json").is_file()
    record = read_record(output / "transformer")
    assert record is not None
    assert (record["state"], record["updates"]) == ("finished", 6)
    columns = (output / "transformer" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"step", "train/loss", "val/loss", "val/reward_correlation"} <= set(columns)
    assert list((output / "transformer" / "tensorboard").glob("events*"))


def test_a_finished_stage_with_other_settings_is_never_overwritten_unasked(recipe) -> None:
    path = recipe(stages=("tokenizer",))
    output = recipes.run(path)
    assert output is not None
    before = weights(output)
    change = "tokenizer.module.learning_rate=1e-3"
    with pytest.raises(ValueError, match=r"'tokenizer' .* finished with other .*learning_rate: 0.0005 -> 0.001. Give"):
        recipes.run(path, [change])
    assert weights(output) == before
    recipes.run(path, ["tokenizer.trainer.log_every_n_steps=1"])  # changes no weights: no reason to stop
    recipes.run(path, [change, "on_change=rerun"])
    assert {f"tokenizer/{name}": value for name, value in weights(output / "tokenizer.previous-1").items()} == before
    assert weights(output / "tokenizer") != weights(output / "tokenizer.previous-1")
    recipes.run(path, [change, "tokenizer.trainer.max_steps=8", "on_change=continue"])
    record = read_record(output / "tokenizer")
    assert record is not None
    assert record["updates"] == 8


def test_a_changed_earlier_stage_is_noticed_by_the_later_one(recipe, capsys) -> None:
    path = recipe()
    recipes.run(path)
    changes = ["tokenizer.module.learning_rate=1e-3", "on_change=rerun"]
    output = recipes.run(path, changes)
    assert output is not None
    assert "inputs.tokenizer" in capsys.readouterr().out.replace("\n", "")
    assert (output / "transformer.previous-1").is_dir()


def test_stages_start_from_a_folder_or_a_zoo_name_too(recipe, tiny_world_model, tmp_path: Path) -> None:
    model = tiny_world_model(action_dim=3, reward=True)
    model.extras |= {"action_mean": [0.5, 0.0, 0.0], "action_std": [1.0, 2.0, 1.0]}
    folder = model.save_pretrained(tmp_path / "start")
    words = [f"transformer.module.{part}={{from: {folder}}}" for part in ("tokenizer", "transformer", "reward_head")]
    output = recipes.run(recipe(stages=("transformer",)), words)
    assert output is not None
    tuned = ivideogpt.from_pretrained(output / "model")
    assert tuned.extras["action_mean"] == [0.5, 0.0, 0.0]
    assert "base_model" not in tuned.extras, "a folder means nothing on another machine"
    for part in ("tokenizer", "transformer", "reward_head"):
        old, new = getattr(model, part).state_dict(), getattr(tuned, part).state_dict()
        assert all(torch.equal(old[name], new[name]) for name in old) is (part == "tokenizer")
    with pytest.raises(ValueError, match=r"stages.transformer.module.tokenizer.from: .*no-such-model"):
        recipes.run(
            recipe(stages=("transformer",), output=str(tmp_path / "b")),
            ["transformer.module.tokenizer.from=no-such-model"],
        )


def test_a_mistake_in_the_last_stage_is_found_before_the_first_one_runs(recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the stage 'transformer' does not come before this one"):
        recipes.run(recipe(), ["tokenizer.module.tokenizer={from: transformer}"])
    with pytest.raises(ValueError, match=r"transformer.module.*num_layers must be a positive integer, got 0"):
        recipes.run(recipe(), ["transformer.module.transformer.num_layers=0"])
    assert not (tmp_path / "out" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokenizer.data.resolution=64", "the model's resolution is 32, that of the data is 64"),
        ("tokenizer.data.context_length=1", "the model's context_length is 2, that of the data is 1"),
        ("transformer.module.transformer.action_dim=5", "the model's action_dim is 5, that of the data is 3"),
        ("transformer.data.use_rewards=false", "has a reward head and the data have no rewards"),
        ("tokenizer.trainer.accelerator=gpu", "stages.tokenizer.trainer: .*"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_first_update(recipe, change: str, message: str) -> None:
    if change.startswith("transformer"):
        recipes.run(recipe(stages=("tokenizer",)))
    path = recipe()
    if "gpu" in change and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=message):
        recipes.run(path, [change])


def test_a_recipe_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'debgu', neither as a file .* did you mean 'debug'"):
        recipes.run("debgu")
    with pytest.raises(
        ValueError, match=r"there is no file nowhere/debug.yaml; the package has a recipe named 'debug'"
    ):
        recipes.run("nowhere/debug.yaml")


def test_printed_config_is_the_same_recipe(recipe, tmp_path: Path, capsys) -> None:
    path = recipe()
    assert recipes.run(path, ["seed=5"], print_config=True) is None
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    assert recipes.load(tmp_path / "printed.yaml") == recipes.load(path, ["seed=5"])
    assert yaml.safe_load(text)["stages"]["transformer"]["data"]["init_args"]["seed"] == 5
    assert not (tmp_path / "out").exists()


def test_a_second_run_of_the_same_output_is_refused(recipe, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    path = recipe()
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is using .*out"):
            recipes.run(path)


def test_a_damaged_newest_checkpoint_costs_only_its_updates(recipe) -> None:
    path = recipe(stages=("tokenizer",))
    output = recipes.run(path)
    assert output is not None
    before = weights(output)
    shutil.rmtree(output / "tokenizer" / "tokenizer")
    record = (output / "tokenizer" / "stage.json").read_text()
    (output / "tokenizer" / "stage.json").write_text(record.replace('"finished",', '"running",', 1))
    newest = output / "tokenizer" / "checkpoints" / "update-000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="skipping the checkpoint .*update-000006.ckpt"):
        recipes.run(path)
    assert weights(output) == before


def test_differences_name_the_place_and_both_values() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": 2}
    new = {"a": {"b": 3, "c": [1]}, "e": 2}
    assert list(differences(old, new)) == ["a.b: 1 -> 3", "d: 2 -> (absent)", "e: (absent) -> 2"]


def test_differences_of_long_values_are_shown_where_they_are() -> None:
    usage, keep = ({"class_path": f"ivideogpt.training.callbacks.{name}"} for name in ("CodebookUsage", "Throughput"))
    saves = {"class_path": "ivideogpt.training.checkpoints.Checkpoints", "init_args": {"every_n_updates": 5}}
    found = list(differences({"callbacks": [usage, saves]}, {"callbacks": [usage, {**saves, "init_args": {}}, keep]}))
    assert found == [
        "callbacks.Checkpoints.init_args.every_n_updates: 5 -> (absent)",
        "callbacks.Throughput: (absent) -> {'class_path': 'ivideogpt.training.callbacks.Throughput'}",
    ]
    assert list(differences({"callbacks": [usage, saves]}, {"callbacks": [saves, usage]})) == [
        "callbacks: their order was CodebookUsage, Checkpoints and is Checkpoints, CodebookUsage"
    ]
    sets = [f"runs/data/a-rather-long-name-of-a-set-{number}" for number in range(9)]
    (line,) = differences({"train": sets}, {"train": [*sets[:5], "other", *sets[6:]]})
    before, after = line.removeprefix("train: ").split(" -> ")
    assert "set-5" in before and "other" in after and before != after and max(len(before), len(after)) < 80


def test_the_summary_is_of_all_starts(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def summary(output: Path) -> dict[str, Any]:
        return json.loads((output / "tokenizer" / "summary.json").read_text())

    path = recipe(stages=("tokenizer",))
    output = recipes.run(path)
    assert output is not None
    whole = summary(output)
    record = json.loads((output / "tokenizer" / "stage.json").read_text())
    checkpoint = max((output / "tokenizer" / "checkpoints").iterdir())
    state = torch.load(checkpoint, weights_only=True)
    state["callbacks"]["ResumableLogs"]["seconds"] = 1000.0  # as if the first start had taken that long
    torch.save(state, checkpoint)
    # a kill between the last checkpoint and the record: nothing is left to train
    del record["finished"], record["seconds"], record["updates"]
    (output / "tokenizer" / "stage.json").write_text(json.dumps({**record, "state": "running"}))
    (output / "tokenizer" / "summary.json").unlink()
    rows = (output / "tokenizer" / "metrics.csv").read_text()
    assert recipes.run(path) == output
    assert 1000 < summary(output)["seconds"] < 1100
    assert summary(output)["updates"] == whole["updates"]
    assert summary(output)["metrics"].keys() == whole["metrics"].keys() >= {"train/loss", "val/loss"}
    assert summary(output)["metrics"]["val/loss"] == pytest.approx(whole["metrics"]["val/loss"], rel=1e-5)
    assert (output / "tokenizer" / "metrics.csv").read_text() == rows


def test_a_validation_that_a_kill_ended_at_the_last_update_is_made_up_for(recipe) -> None:
    words = ["trainer.max_steps=4"]  # validated there
    straight = recipes.run(recipe(stages=("tokenizer",), output=str(recipe().parent / "straight")), words)
    path = recipe(stages=("tokenizer",), output=str(recipe().parent / "killed"))

    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerModule, "validation_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            recipes.run(path, words)
    output = recipes.run(path, words)
    assert straight is not None and output is not None
    rows = [(folder / "tokenizer" / "metrics.csv").read_text() for folder in (straight, output)]
    assert rows[0] == rows[1]
    assert "val/loss" in json.loads((output / "tokenizer" / "summary.json").read_text())["metrics"]
