"""Tests of global_batch_size: an update's clips, shared out over processes and batches, also of a run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from ivideogpt.data.position import share_of
from ivideogpt.models.discriminator import PatchDiscriminator
from ivideogpt.training import TokenizerModule
from ivideogpt.training.callbacks import SeededUpdates
from ivideogpt.training.checkpoints import Checkpoints, latest_checkpoint
from ivideogpt.training.resumption import Resumption, described

GLOBAL: dict[str, Any] = {"batch_size": None, "global_batch_size": 4}


class Linear(LightningModule):
    """Fits the rewards by the actions; notes the clips of each update."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1).double()
        self.updates: list[list[int]] = [[]]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.updates[-1] += batch["clip"].tolist()
        return (self.layer(batch["actions"].double())[..., 0] - batch["rewards"]).square().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing is to be validated."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.updates.append([])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(data, trainer, folder: Path, updates: int, accumulated: int, **settings: Any) -> Linear:
    module, found = Linear(), latest_checkpoint(folder)
    run = trainer(
        max_steps=updates, accumulate_grad_batches=accumulated, enable_checkpointing=True, limit_val_batches=0,
        callbacks=[SeededUpdates(0), Resumption(), Checkpoints(every_n_updates=2, folder=str(folder))],
    )  # fmt: skip
    run.fit(module, datamodule=data(**GLOBAL | settings), ckpt_path=found and found[1], weights_only=True)
    return module


def test_an_update_takes_the_same_clips_whatever_is_accumulated(data, trainer, tmp_path: Path) -> None:
    runs = [fit(data, trainer, tmp_path / str(count), 5, count, epoch_batches=3) for count in (1, 2, 4)]
    wanted = [list(range(first, first + 4)) for first in range(0, 20, 4)]
    for run in runs:
        assert run.updates[:5] == wanted  # in epochs of three updates, none of them smaller
        assert torch.allclose(run.layer.weight, runs[0].layer.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("stop", "before", "now"), [(4, 1, 2), (4, 4, 1), (3, 2, 1), (5, 1, 4), (2, 1, 2)])
def test_a_run_goes_on_with_other_accumulation(data, trainer, tmp_path: Path, capsys, stop, before, now) -> None:
    settings = {"epoch_batches": 3}
    fit(data, trainer, tmp_path / "run", stop, before, **settings)
    capsys.readouterr()
    resumed = fit(data, trainer, tmp_path / "run", 8, now, **settings)
    assert resumed.updates[: 8 - stop] == [list(range(first, first + 4)) for first in range(4 * stop, 32, 4)]
    whole = fit(data, trainer, tmp_path / "whole", 8, before, **settings)
    assert torch.allclose(resumed.layer.weight, whole.layer.weight, rtol=0, atol=1e-12)
    assert capsys.readouterr().out == (
        f"going on at clip {4 * stop} with accumulated batches {before} -> {now}: the order of clips is kept; an "
        f"update takes 4 clips as before\n"
    )


def test_nothing_is_said_where_nothing_changed(data, trainer, tmp_path: Path, capsys) -> None:
    fit(data, trainer, tmp_path, 2, 2)
    assert fit(data, trainer, tmp_path, 3, 2).updates[0] == [8, 9, 10, 11]
    assert "going on" not in capsys.readouterr().out


def test_what_is_said() -> None:
    before = {"position": 96, "processes": 1, "accumulated": 2, "batch_size": 8, "num_workers": 2, "clips": "a"}
    assert described(before, before) is None
    assert described(before, before | {"num_workers": 0}) == (
        "going on at clip 96 with workers of a process 2 -> 0: the order of clips is kept; an update takes 16 clips as "
        "before"
    )
    assert described(before, before | {"processes": 4, "clips": "b"}) == (
        "going on at clip 96 with processes 1 -> 4: the order of clips is another one (other training sets or clips); "
        "an update takes 64 clips, 16 before"
    )


def test_the_modules_own_accumulation_counts(tiny_world_model, data, trainer) -> None:
    critic = PatchDiscriminator(base_channels=8, num_layers=1)
    tokenizer = tiny_world_model().tokenizer
    module = TokenizerModule(tokenizer, perceptual_weight=0.0, discriminator=critic, accumulate=2)
    clips = data(**GLOBAL)
    run = trainer(max_steps=1)
    run.fit(module, datamodule=clips)
    assert (clips.batch_size, clips.position) == (2, 4)


def test_what_does_not_divide_is_refused_before_the_first_update(data, trainer) -> None:
    module = Linear()
    with pytest.raises(ValueError, match="global_batch_size 4 does not divide by 1 processes x 3 accumulated") as error:
        trainer(accumulate_grad_batches=3).fit(module, datamodule=data(**GLOBAL))
    assert "make it a multiple of 3, or change trainer.devices" in str(error.value)
    assert module.updates == [[]]
    assert share_of(64, 4, 2) == 8
