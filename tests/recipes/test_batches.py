"""Tests of a recipe's batches: what an update takes on any number of devices, and a stage that goes on with another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ivideogpt
from ivideogpt import recipes
from ivideogpt.recipes.batches import clips_of_update, processes
from ivideogpt.recipes.results import read_record
from ivideogpt.recipes.trainer import count_processes
from ivideogpt.training.transformer_module import TransformerModule

EIGHT = ["data.batch_size=null", "data.global_batch_size=8"]


def test_a_batch_that_does_not_divide_is_refused_before_the_first_stage_runs(recipe, tmp_path: Path) -> None:
    words = [*EIGHT, "transformer.trainer.devices=3", "transformer.trainer.accumulate_grad_batches=2"]
    message = (
        "stages.transformer: global_batch_size 8 does not divide by 3 processes x 2 accumulated batches: make it a"
    )
    with pytest.raises(ValueError, match=message) as error:
        recipes.run(recipe(), words)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="batch_size 2 and global_batch_size 8 were both given"):
        recipes.run(recipe(), EIGHT[1:])
    assert not (tmp_path / "out" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("trainer", "number"),
    [
        ({"devices": 3}, 3), ({"devices": "2", "num_nodes": 4}, 8), ({"devices": [0, 2]}, 2), ({"devices": "1,"}, 1),
        ({"devices": -1, "accelerator": "cpu"}, 1), ({"accelerator": "cpu"}, 1),
    ],
)  # fmt: skip
def test_processes(trainer: dict[str, Any], number: int) -> None:
    assert processes(trainer) == number
    stage: dict[str, Any] = {"trainer": trainer, "module": {"init_args": {"accumulate": 2}}, "data": {"init_args": {}}}
    assert clips_of_update(stage) is None
    stage["data"]["init_args"] = {"batch_size": 5}
    assert clips_of_update(stage) == 10 * number


@pytest.mark.parametrize("trainer", [{}, {"devices": "auto"}, {"devices": 3}, {"devices": "2", "num_nodes": 4}])
def test_processes_by_the_settings_are_those_of_a_trainer(trainer: dict[str, Any]) -> None:
    settings = {"accelerator": "cpu", **trainer}
    assert processes(settings) == count_processes(settings, "stages.transformer")


class StopError(Exception):
    pass


def test_a_stage_goes_on_unasked_with_updates_shared_out_otherwise(recipe, capsys) -> None:
    path, step = recipe(), TransformerModule.training_step
    words = ["data.batch_size=4", "tokenizer.trainer.max_steps=2"]

    def training_step(self, batch, batch_idx):
        if self.global_step == 4:
            raise StopError
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerModule, "training_step", training_step)
        with pytest.raises(StopError):
            recipes.run(path, words)
    with pytest.raises(ValueError, match="with other settings: data.init_args.batch_size: 4 -> 2. Give"):
        recipes.run(path, ["data.batch_size=2", *words[1:]])
    capsys.readouterr()
    half = "trainer.accumulate_grad_batches=2"
    recipes.run(path, ["data.batch_size=null", "data.global_batch_size=4", half, "data.num_workers=1", *words[1:]])
    line = (
        "going on at clip 16 with accumulated batches 1 -> 2, workers of a process 0 -> 1: the order of clips is kept; "
        "an update takes 4 clips as before"
    )
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_a_killed_run_goes_on_in_another_number_of_processes(recipe, tmp_path: Path) -> None:
    words = [*EIGHT, "tokenizer.trainer.max_steps=2", "transformer.trainer.max_steps=60"]
    command = [sys.executable, "-m", "ivideogpt.cli", "run", str(recipe()), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ivideogpt.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    stage = tmp_path / "out" / "transformer"
    deadline = time.monotonic() + 200
    while not list(stage.glob("checkpoints/update-*.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    _, errors = process.communicate()
    record = read_record(stage)
    assert record is not None and record["state"] == "running", errors.decode()
    done = subprocess.run([*command, "trainer.devices=2"], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    said = "with processes 1 -> 2: the order of clips is kept; an update takes 8 clips as before"
    assert [said in line for line in done.stdout.splitlines()].count(True) == 1
    record = read_record(stage)
    assert record is not None and (record["state"], record["updates"]) == ("finished", 60)
