"""Averaged weights (EMA) by Lightning's callback: what is saved is the average, and a resumed run has the same one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from ivideogpt.training import TransformerModule
from ivideogpt.training.callbacks import SeededUpdates
from ivideogpt.training.checkpoints import AtomicCheckpointIO, Checkpoints, latest_checkpoint

DECAY = 0.7


class Recorder(Callback):
    """Keeps the weights after each update."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.weights.append(copy.deepcopy(pl_module.transformer.state_dict()))


@pytest.fixture
def fit(tiny_world_model, data, trainer, tmp_path: Path):
    """``fit(name, updates)`` trains, or goes on with, the run of that name; the module and its weights by update."""

    def run(name: str, updates: int) -> tuple[TransformerModule, list[dict[str, torch.Tensor]]]:
        model = tiny_world_model(action_dim=3, reward=True)
        module = TransformerModule(
            model.transformer, model.tokenizer, model.reward_head, learning_rate=1e-2, warmup_updates=0,
            schedule="constant",
        )  # fmt: skip
        recorder, folder = Recorder(), tmp_path / name
        callbacks: list[Any] = [recorder, EMAWeightAveraging(decay=DECAY), SeededUpdates(0), Checkpoints(2)]
        found = latest_checkpoint(folder / "checkpoints")
        trainer(
            max_steps=updates,
            enable_checkpointing=True,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder,
        ).fit(module, datamodule=data(), ckpt_path=found and found[1], weights_only=True)
        return module, recorder.weights

    return run


def test_the_average_is_what_is_left(fit) -> None:
    module, weights = fit("one", 5)
    assert len(weights) == 5
    for name, value in module.transformer.state_dict().items():
        average = weights[0][name]
        for later in weights[1:]:
            average = DECAY * average + (1 - DECAY) * later[name]
        torch.testing.assert_close(value, average, rtol=1e-4, atol=1e-6)
    assert not torch.equal(module.transformer.norm.weight, weights[-1]["norm.weight"])


def test_a_resumed_run_has_the_same_average(fit, tmp_path: Path) -> None:
    whole, _ = fit("whole", 6)
    fit("parts", 6)
    for path in (tmp_path / "parts" / "checkpoints").glob("update-000006.ckpt"):
        path.unlink()  # as if a kill had come after update 4
    resumed, weights = fit("parts", 6)
    assert len(weights) == 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
