"""Test of a recipe in two processes: each stage is trained and evaluated by both, and written by one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ivideogpt
from ivideogpt.recipes.consolidation import consolidate
from ivideogpt.recipes.results import read_record


@pytest.mark.slow
def test_two_processes_run_a_recipe_and_skip_it_the_second_time(recipe, tmp_path: Path) -> None:
    path = recipe(stages=("tokenizer", "transformer", "evaluate"))
    stages = ("tokenizer", "transformer", "evaluate")
    words = [f"{stage}.trainer.{word}" for stage in stages for word in ("devices=2", "strategy=ddp")]
    command = [sys.executable, "-m", "ivideogpt.cli", "run", str(path), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ivideogpt.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "GLOBAL_RANK" not in done.stdout + done.stderr  # a line of Lightning's for each process
    assert done.stdout.count("transformer: finished in") == 1
    results = json.loads((tmp_path / "out" / "evaluate" / "results.json").read_text())
    assert (results["processes"], len(results["videos"])) == (2, results["overall"]["clips"])
    assert {path.name for path in (tmp_path / "out" / "evaluate").iterdir()} >= {"report.html", "results.json"}
    for stage in stages:
        record = read_record(tmp_path / "out" / stage)
        assert record is not None
        assert record["state"] == "finished"
    with open(tmp_path / "out" / "transformer" / "metrics.csv", newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == ["2", "4", "6"]
    assert ivideogpt.from_pretrained(tmp_path / "out" / "model").config.action_dim == 3
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before, skipped") == 3


@pytest.mark.slow
def test_a_sharded_run_makes_the_model_of_its_checkpoint(recipe, tmp_path: Path) -> None:
    path = recipe()
    words = ["tokenizer.module.codebook_restart=null"]
    for stage in ("tokenizer", "transformer"):
        words += [f"{stage}.trainer.strategy={{class_path: ivideogpt.training.sharding.FullyShardedStrategy}}"]
        words += [f"{stage}.trainer.devices=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ivideogpt.__file__).parents[1])}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "-m", "ivideogpt.cli", "run", str(path), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    model = ivideogpt.from_pretrained(tmp_path / "out" / "model")
    checkpoints = tmp_path / "out" / "transformer" / "checkpoints"
    assert all(path.is_dir() for path in checkpoints.iterdir())
    folder, update = consolidate(tmp_path / "out" / "transformer", tmp_path / "whole")
    assert update == 6
    whole = ivideogpt.from_pretrained(folder)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"no checkpoint of update 1, but of \[\d, 6\]"):
        consolidate(tmp_path / "out" / "transformer", tmp_path / "other", update=1)
    for shard in checkpoints.glob("*/__1_0.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.warns(UserWarning, match="missing or truncated"), pytest.raises(ValueError, match="no checkpoint that"):
        consolidate(tmp_path / "out" / "transformer", tmp_path / "other")
