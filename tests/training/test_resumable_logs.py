"""Rows of a resumed training are those of one that never stopped, over the updates, wherever it was killed."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ivideogpt.models.discriminator import PatchDiscriminator
from ivideogpt.recipes.loggers import all_loggers
from ivideogpt.training import TokenizerModule, TransformerModule
from ivideogpt.training.callbacks import SeededUpdates, Throughput
from ivideogpt.training.checkpoints import Checkpoints, latest_checkpoint
from ivideogpt.training.grpo_module import GRPOModule
from ivideogpt.training.logs import MetricsCSV
from ivideogpt.training.resumable_logs import ResumableLogs

Row = dict[str, str]


class KillError(Exception):
    """What stands for a SIGKILL: nothing is saved or logged behind it."""


def module_of(kind: str, model: Any) -> Any:
    torch.manual_seed(0)
    if kind == "critic":
        critic = PatchDiscriminator(3, 8, 2)
        return TokenizerModule(
            model.tokenizer, perceptual_weight=0.0, discriminator=critic, accumulate=3, codebook_restart=2
        )
    if kind == "grpo":
        return GRPOModule(
            model.transformer, model.tokenizer, group_size=2, inner_updates=2, warmup_updates=0, perceptual_weight=0.0
        )
    return TransformerModule(model.transformer, model.tokenizer, model.reward_head, warmup_updates=0)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"max_steps": 6, "val_check_interval": 2},
    "epochs": {"max_steps": 8, "val_check_interval": 4},  # validated at the end of each epoch
    "accumulated": {"max_steps": 6, "val_check_interval": 6, "accumulate_grad_batches": 3},
    "grpo": {"max_steps": 12, "val_check_interval": 2},
    "critic": {"max_steps": 6, "val_check_interval": 6},
}


@pytest.fixture
def fit(tiny_world_model, data, trainer, tmp_path: Path) -> Callable[..., list[Row]]:
    """``fit(kind, folder)`` trains on, from the newest checkpoint in the folder, and gives the rows of the logs."""

    def run(kind: str, name: str) -> list[Row]:
        folder = tmp_path / name
        found = latest_checkpoint(folder / "checkpoints")
        loggers = all_loggers(None, folder, 0 if found is None else found[0] + 1)
        callbacks = [
            Throughput(),
            SeededUpdates(5),
            ResumableLogs(),
            Checkpoints(2, folder=str(folder / "checkpoints")),
        ]
        run = trainer(
            **SETTINGS[kind], logger=loggers, callbacks=callbacks, check_val_every_n_epoch=None,
            log_every_n_steps=1 if kind == "accumulated" else 2, enable_checkpointing=True, default_root_dir=folder,
        )  # fmt: skip
        model = tiny_world_model(action_dim=3, reward=True)
        clips = data(epoch_batches=18 if kind in ("accumulated", "critic") else 4)
        run.fit(module_of(kind, model), datamodule=clips, ckpt_path=found and found[1], weights_only=True)
        return rows_of(folder)

    return run


def rows_of(folder: Path) -> list[Row]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if value and not name.endswith("_per_second")} for row in rows]


def scalars_of(folder: Path, name: str) -> list[int]:
    def begun(file: Path) -> tuple[int, int]:  # their names do not sort where several began in one second
        parts = file.name.split(".")
        return int(parts[3]), int(parts[-1])

    ordered = folder / "ordered"
    shutil.rmtree(ordered, ignore_errors=True)
    ordered.mkdir()
    for number, file in enumerate(sorted((folder / "tensorboard").glob("events.*"), key=begun)):
        shutil.copy(file, ordered / f"events.out.tfevents.{number:010d}")
    events = EventAccumulator(str(ordered))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


def killed(patch: pytest.MonkeyPatch, owner: type, name: str, when: Callable[..., bool]) -> None:
    """Lets the method ``name`` fail where ``when`` says so."""
    whole = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if when(self, *args, **kwargs):
            raise KillError
        return whole(self, *args, **kwargs)

    patch.setattr(owner, name, method)


MOMENTS = ("update", "row", "validation")


def kill_at(patch: pytest.MonkeyPatch, kind: str, moment: str) -> None:
    at = {"grpo": 8, "epochs": 4}.get(kind, 4)
    module = {"critic": TokenizerModule, "grpo": GRPOModule}.get(kind, TransformerModule)
    if moment == "update":  # some updates behind the checkpoint
        killed(patch, module, "training_step", lambda self, *_: self.global_step > at)
    elif moment == "row":  # when the checkpoint is saved, and the update not yet logged
        killed(patch, TensorBoardLogger, "log_metrics", lambda self, metrics, step: step == at)
    else:
        killed(patch, module, "validation_step", lambda self, *_: self.global_step == at)


@pytest.mark.parametrize("kind", [*list(SETTINGS)[:-1], pytest.param("critic", marks=pytest.mark.slow)])
def test_rows_are_those_of_a_training_that_never_stopped(kind: str, fit, tmp_path: Path) -> None:
    straight = fit(kind, "straight")
    last, every = SETTINGS[kind]["max_steps"], 1 if kind == "accumulated" else 2
    trained = [int(row["step"]) for row in straight if "train/loss" in row]
    assert trained == list(range(every, last + 1, every))
    assert all("train/gradient_norm" in row for row in straight if "train/loss" in row)
    error = "val/l1" if kind == "grpo" else "val/loss"
    validated = [int(row["step"]) for row in straight if error in row]
    distance = 4 if kind in ("epochs", "grpo") else 2
    assert validated == list(range(distance, last + 1, distance))
    for moment in MOMENTS:
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, kind, moment)
            with pytest.raises(KillError):
                fit(kind, moment)
        assert len(rows_of(tmp_path / moment)) < len(straight)
        assert fit(kind, moment) == straight, moment
        assert scalars_of(tmp_path / moment, "train/loss") == trained
        assert scalars_of(tmp_path / moment, error) == validated


def test_a_kill_before_the_first_checkpoint_leaves_no_row_twice(fit, tmp_path: Path) -> None:
    straight = fit("plain", "straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "_save", lambda *_: None)
        killed(patch, TransformerModule, "training_step", lambda self, *_: self.global_step == 3)
        with pytest.raises(KillError):
            fit("plain", "killed")
    assert rows_of(tmp_path / "killed")
    assert fit("plain", "killed") == straight
    assert scalars_of(tmp_path / "killed", "train/loss") == [2, 4, 6]


def test_time_of_all_starts_is_kept() -> None:
    first = ResumableLogs()
    first.begin -= 100
    second = ResumableLogs()
    second.load_state_dict(first.state_dict())
    second.begin -= 10
    assert 110 <= second.seconds < 120


def test_the_newest_values_are_read_back(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    assert log.last_values() == {}
    log.log_metrics({"train/loss": 3.0, "epoch": 0}, 2)
    log.log_metrics({"val/loss": 2.5}, 2)
    log.log_metrics({"train/loss": 1.0, "epoch": 1}, 4)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,1")  # a row of update 40 or so, cut off
    assert MetricsCSV(tmp_path).last_values() == {"train/loss": 1.0, "val/loss": 2.5}
    assert log.names_at(2) == {"train/loss", "val/loss"}
    log.drop_at(2, but=["val/loss"])
    assert log.names_at(2) == {"val/loss"}
