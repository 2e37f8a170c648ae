"""Tests of launching: ranks, numbers of processes that do not match, who reports an error, ends in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ivideogpt
from ivideogpt import recipes
from ivideogpt.recipes.launch import Launch
from ivideogpt.recipes.results import read_record

SLURM = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "ivideogpt"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a launcher says, and with the changes."""
    said = ("SLURM_", "TORCHELASTIC_", "MASTER_", "JSM_", "LSB_")
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(said) and key not in names}
    sources = str(Path(ivideogpt.__file__).parents[1])
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": sources, **changes}


def start(words: list[str], processes: int = 1, **changes: str) -> subprocess.Popen[str]:
    """Starts `ivideogpt run ...`, by torchrun where there are to be several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "ivideogpt.cli", "run", *words]
    return subprocess.Popen(
        command, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=_default_signals,
    )  # fmt: skip


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test that was started in the background ignores it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch(0)),
        ({"NODE_RANK": "1"}, Launch(1)),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, Launch(1, 2, is_child=True)),
        (ELASTIC, Launch(3, 4, 2)),
        ({**SLURM, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}, Launch(5, 8, 2)),
        ({**SLURM, "SLURM_PROCID": "5", **ELASTIC}, Launch(3, 4, 2)),  # torchrun inside of a job
        (SLURM, Launch(0)),  # a shell of the job, not one of its tasks
    ],
)
def test_the_launcher_says_the_rank(variables: dict[str, str], expected: Launch, monkeypatch) -> None:
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Launch.find() == expected


def test_slurm_tasks_without_a_number_for_each_machine_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(ValueError, match="ntasks-per-node=2"):
        Launch.find()


def test_other_numbers_of_processes_are_refused_with_both() -> None:
    Launch(0, 4, 2).check({"tokenizer": 4, "transformer": 4})
    Launch(0).check({"tokenizer": 1, "transformer": 4})  # the trainer starts the others at the second stage
    with pytest.raises(ValueError, match=r"uses 8 processes, and 4 .* set trainer.num_nodes=2 trainer.devices=2, or "):
        Launch(0, 4, 2).check({"tokenizer": 4, "transformer": 8})
    with pytest.raises(ValueError, match=r"uses 2 processes, and 1 process .* set trainer.devices=1, or start 2"):
        Launch(0, 1).check({"tokenizer": 2})
    with pytest.raises(ValueError, match=r"stages.b.trainer uses 1 process, and stages.a.trainer 2"):
        Launch(0).check({"a": 2, "b": 1})


def test_a_process_too_many_is_refused_before_anything_is_written(recipe, tmp_path: Path, monkeypatch) -> None:
    for name, value in {**ELASTIC, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for devices in ("1", "auto"):
        words = [f"defaults.trainer.devices={devices}"]
        with pytest.raises(ValueError, match="trainer uses 1 process, and 2 processes .* set trainer.devices=2"):
            recipes.run(recipe(), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_report_a_common_error_once_and_their_own_each(recipe, tmp_path: Path) -> None:
    process = start([str(recipe()), "trainer.devices=1"], 2)
    _, errors = process.communicate(timeout=200)
    said = [line for line in errors.splitlines() if line.startswith("ivideogpt: error:")]
    assert process.returncode == 1  # torchrun's
    assert len(said) == 1 and "2 processes of this run were started: set trainer.devices=2" in said[0], errors[-4000:]
    assert not (tmp_path / "out").exists()
    # a loss above its limit: each process names its own clips; nobody hangs, and nobody's threads are cut off
    words = [str(recipe()), "trainer.devices=2", "trainer.strategy=ddp", "tokenizer.module.loss_limit=1e-6"]
    process = start(words)  # the trainer starts the other one
    _, errors = process.communicate(timeout=200)
    said = [line for line in errors.splitlines() if line.startswith("ivideogpt: error:")]
    assert sorted("ivideogpt: error: process 1: train/loss" in line for line in said) == [False, True], errors[-4000:]
    assert all("train/loss is" in line for line in said)
    assert "terminate called" not in errors


def test_a_stage_that_made_nothing_begins_anew_with_other_settings(recipe, tmp_path: Path) -> None:
    path = recipe(stages=("tokenizer",))
    with pytest.raises(ValueError, match="train/loss"):
        recipes.run(path, ["tokenizer.module.loss_limit=1e-6"])
    folder = tmp_path / "out" / "tokenizer"
    record = read_record(folder)
    assert record is not None and record["state"] == "running"
    recipes.run(path, ["tokenizer.trainer.max_steps=2"])
    record = read_record(folder)
    assert record is not None
    assert (record["state"], record["updates"]) == ("finished", 2)
    record["state"] = "running"  # as where a kill came, with a checkpoint
    (folder / "stage.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was running with other settings"):
        recipes.run(path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_an_evaluation_and_the_same_command_goes_on(recipe, tmp_path, tiny_world_model, processes) -> None:
    tiny_world_model(action_dim=3).save_pretrained(tmp_path / "model")
    words = [
        str(recipe(stages=("transformer", "evaluate"))), "transformer=null", f"trainer.devices={processes}",
        f"evaluate.module.world_model={{from: {tmp_path / 'model'}}}", "evaluate.module.runs=8",
        "evaluate.module.report=false", "evaluate.data.val_clips_per_episode=4", "evaluate.module.num_examples=0",
        "evaluate.trainer.limit_test_batches=8", "evaluate.module.batch_size=1", "evaluate.module.num_samples=4",
    ]  # fmt: skip
    process = start(words)  # with two, the trainer starts the other
    journal = tmp_path / "out" / "evaluate" / "results.json.journal"
    deadline = time.monotonic() + 200
    while not any(path.stat().st_size for path in journal.glob("part-*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-4000:]
        time.sleep(0.02)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors[-4000:]
    assert time.monotonic() - asked < 15
    assert errors.count("what was measured is kept; the same command goes on from there") == 1
    assert "terminate called" not in errors
    parts = {path: path.read_text() for path in journal.glob("part-*.jsonl")}
    measured = sum(text.count("\n") for text in parts.values())
    assert 0 < measured < 8 * 16
    record = read_record(tmp_path / "out" / "evaluate")
    assert record is not None and record["state"] == "running"
    again = start(words)
    deadline = time.monotonic() + 200
    while not {path for path in journal.glob("part-*.jsonl") if path.stat().st_size} - parts.keys():
        assert again.poll() is None and time.monotonic() < deadline, again.communicate()[1][-4000:]
        time.sleep(0.02)
    assert all(path.read_text() == text for path, text in parts.items())
    _, errors = again.communicate(timeout=250)
    assert again.returncode == 0, errors[-4000:]
    results = json.loads((tmp_path / "out" / "evaluate" / "results.json").read_text())
    assert results["processes"] == processes
