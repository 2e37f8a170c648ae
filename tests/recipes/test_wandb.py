"""Weights & Biases by one line of a recipe: a real run, offline, of two stages, and a run that is resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ivideogpt
from ivideogpt.recipes.loggers import place_wandb

STRIPS = "transformer.trainer.callbacks=[{class_path: ivideogpt.training.callbacks.RolloutStrips}]"
LINE = "trainer.logger={class_path: lightning.pytorch.loggers.WandbLogger}"


def run(recipe: Path, folder: Path, *words: str) -> str:
    """Runs the recipe as a user does, in a folder of its own; what it printed."""
    environment = {
        **os.environ, "PYTHONPATH": str(Path(ivideogpt.__file__).parents[1]), "WANDB_MODE": "offline",
        "WANDB_CONFIG_DIR": str(folder / "config"), "WANDB_CACHE_DIR": str(folder / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-m", "ivideogpt.cli", "run", str(recipe), *words]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def records(stage: Path) -> list[tuple[str, bytes]]:
    """Offline runs under a stage's folder: the id, and the file that would be sent."""
    files = sorted(stage.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    return [(path.stem.removeprefix("run-"), path.read_bytes()) for path in files]


@pytest.mark.slow
def test_each_stage_is_a_run_with_its_metrics_and_goes_on_when_it_is_resumed(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    path, output = recipe(), tmp_path / "out"
    printed = run(path, tmp_path, LINE, STRIPS)
    assert "already in progress" not in printed
    found = {stage: records(output / stage) for stage in ("tokenizer", "transformer")}
    for stage, metrics in (("tokenizer", (b"train/l", b"val/psnr")), ("transformer", (b"train/token_loss", b"val/"))):
        ((identity, content),) = found[stage]
        assert identity.startswith(f"tiny-{stage}-20")
        assert all(name in content for name in (*metrics, b"trainer/global_step"))
    assert b"train/token_loss" not in found["tokenizer"][0][1]  # a run of its own
    assert not (tmp_path / "wandb").exists()  # nothing where the command was started
    assert (output / "transformer" / "metrics.csv").is_file()  # the usual logs are there, too

    (animation,) = output.glob("transformer/wandb/offline-run-*/files/media/videos/val/*.gif")
    with Image.open(animation) as gif:
        assert gif.n_frames > 1

    run(path, tmp_path, LINE, STRIPS, "transformer.trainer.max_steps=9", "on_change=continue")
    identities = [identity for identity, _ in records(output / "transformer")]
    assert identities == [found["transformer"][0][0]] * 2
    assert len(records(output / "tokenizer")) == 1


def test_what_the_recipe_says_stays(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    given = {"project": "mine", "dir": "elsewhere", "version": "seven"}
    node = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": given}
    trainer: dict[str, Any] = {"logger": node, "max_steps": 3}
    placed = place_wandb(trainer, tmp_path / "stage", "bair", "tokenizer", "2026-01-02T03:04:05+00:00")
    assert placed["max_steps"] == 3
    assert placed["logger"][0]["init_args"] == {**given, "name": "tokenizer"}
    assert trainer["logger"]["init_args"] == given  # the recipe itself is as it was
    bare = {"logger": [{"class_path": "lightning.pytorch.loggers.WandbLogger"}]}
    placed = place_wandb(bare, tmp_path / "stage", "bair", "tokenizer", "2026-01-02T03:04:05+00:00")
    assert placed["logger"][0]["init_args"] == {
        "save_dir": str(tmp_path / "stage"), "project": "bair", "name": "tokenizer",
        "id": "bair-tokenizer-202601020304050000",
    }  # fmt: skip


def test_other_loggers_are_left_alone_and_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}}
    assert place_wandb(trainer, tmp_path, "bair", "tokenizer", "2026") is trainer
    assert place_wandb({"logger": False}, tmp_path, "bair", "tokenizer", "2026") == {"logger": False}
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a package that is not there comes to
    wandb = {"logger": {"class_path": "lightning.pytorch.loggers.WandbLogger"}}
    with pytest.raises(ValueError, match=r"stages\.tokenizer\.trainer\.logger.*pip install 'ivideogpt\[wandb\]'"):
        place_wandb(wandb, tmp_path, "bair", "tokenizer", "2026")
