"""Real recordings, packed, train an update of each module: BAIR, RT-1 and Meta-World."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ivideogpt.data import ShardSet, VideoDataModule
from ivideogpt.data.packing import pack
from ivideogpt.training import RewardModule, TokenizerModule, TransformerModule

RECORDINGS = {"bair": ("bair_sample.npz", 4, False), "rt-1": ("fractal_sample.npz", None, False),
              "metaworld": ("metaworld/plate-slide", 4, True)}  # fmt: skip


@pytest.mark.parametrize("name", RECORDINGS)
def test_packed_recordings_train_each_module(
    name: str, shared: Path, tiny_world_model, trainer, tmp_path: Path
) -> None:
    file, action_dim, has_rewards = RECORDINGS[name]
    report = pack(shared / "data" / file, tmp_path / "set", resize=32, max_bad=0.0)
    shards = ShardSet(tmp_path / "set", verify=True)
    assert len(shards) == report.episodes >= 1
    assert shards.manifest["action_dims"] == [action_dim or 0]
    assert shards.manifest["has_rewards"] == has_rewards
    model = tiny_world_model(action_dim=action_dim, reward=has_rewards)
    common: dict[str, Any] = {"learning_rate": 1e-3, "warmup_updates": 0}
    modules: dict[str, Any] = {
        "tokenizer": TokenizerModule(model.tokenizer, perceptual_weight=0.0, **common),
        "transformer": TransformerModule(model.transformer, model.tokenizer, model.reward_head, **common),
    }
    if has_rewards:
        modules["reward_head"] = RewardModule(model.reward_head, model.transformer, model.tokenizer, **common)
    for part, module in modules.items():
        getattr(model, part).requires_grad_(True)  # a later module froze it
        before = {key: value.clone() for key, value in getattr(model, part).state_dict().items()}
        data = VideoDataModule(
            str(tmp_path / "set"), str(tmp_path / "set"), segment_length=5, context_length=2, resolution=32,
            batch_size=2, num_workers=0, epoch_batches=1,
        )  # fmt: skip
        run = trainer(max_steps=1)
        run.fit(module, datamodule=data)
        assert torch.isfinite(run.callback_metrics["train/loss"])
        after = getattr(model, part).state_dict()
        assert any(not torch.equal(value, before[key]) for key, value in after.items()), part


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("kind", ["tokenizer", "transformer", "reward"])
def test_pixels_train_in_true_bfloat16(
    kind: str, augment: bool, tiny_world_model: Any, data: Any, trainer: Any
) -> None:
    model = tiny_world_model(action_dim=3, reward=True)
    modules: dict[str, Any] = {
        "tokenizer": lambda: TokenizerModule(model.tokenizer, perceptual_weight=0.0),
        "transformer": lambda: TransformerModule(model.transformer, model.tokenizer, model.reward_head),
        "reward": lambda: RewardModule(model.reward_head, model.transformer, model.tokenizer),
    }
    module = modules[kind]()
    run = trainer(precision="bf16-true")
    run.fit(module, datamodule=data(augment=augment))
    assert {p.dtype for part in module.trained_parts() for p in part.parameters()} == {torch.bfloat16}
    assert run.callback_metrics["train/loss"].isfinite()
