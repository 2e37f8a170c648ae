"""A training in one of several processes, for the tests: `torchrun ... parallel_fit.py SETTINGS.json`.

Trains a tiny model and writes the whole weights of the first process to the file that the settings name.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from ivideogpt.config import RewardHeadConfig, TokenizerConfig, TransformerConfig
from ivideogpt.data.datamodule import VideoDataModule
from ivideogpt.models.discriminator import PatchDiscriminator
from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.training import TokenizerModule, TransformerModule
from ivideogpt.training.callbacks import CodebookUsage, SeededUpdates
from ivideogpt.training.checkpoints import AtomicCheckpointIO, Checkpoints, latest_checkpoint
from ivideogpt.training.module import TrainingModule
from ivideogpt.training.resumption import Resumption
from ivideogpt.training.sharding import FullyShardedStrategy, is_sharded, whole_state

TOKENIZER = TokenizerConfig(
    resolution=32, block_channels=(8, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    codebook_size=32, dynamics_codebook_size=48, context_length=2, max_attention_resolution=8, attention_dropout=0.0,
)  # fmt: skip


def build(kind: str, **changes: Any) -> TrainingModule:
    """The module, the same in every process."""
    torch.manual_seed(0)
    tokenizer = CompressiveTokenizer(TOKENIZER)
    if kind == "tokenizer":
        return TokenizerModule(tokenizer, perceptual_weight=0.0, **changes)
    if kind == "adversarial":
        critic = PatchDiscriminator(base_channels=8)
        return TokenizerModule(tokenizer, perceptual_weight=0.0, discriminator=critic, **changes)
    config = TransformerConfig(
        vocab_size=TOKENIZER.vocab_size, embed_dim=32, mlp_dim=48, num_layers=2, num_heads=2, max_positions=256,
        action_dim=3, attention_dropout=0.0,
    )  # fmt: skip
    head = RewardHead(RewardHeadConfig(embed_dim=32))
    return TransformerModule(Transformer(config), tokenizer, head, learning_rate=1e-3, warmup_updates=2, **changes)


def spoil(module: TrainingModule, process: int, first: int) -> None:
    """Makes the losses of one process a billion times larger from update ``first`` on."""
    losses: Any = module.losses

    def spoilt(*args: Any) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = losses(*args)
        bad = module.global_rank == process and module.global_step >= first
        return {**terms, "loss": terms["loss"] * (1e9 if bad else 1.0)}

    module.losses = spoilt  # type: ignore[assignment]


def main(settings: dict[str, Any]) -> None:
    """Trains as the settings say."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    module = build(settings["kind"], **settings.get("module", {}))
    if "spoilt" in settings:
        spoil(module, *settings["spoilt"])
    data = VideoDataModule(
        settings["shards"], settings.get("val", settings["shards"]), segment_length=4, context_length=2, resolution=32,
        augment=False, use_rewards=settings["kind"] == "transformer", **settings["data"],
    )  # fmt: skip
    folder = Path(settings["folder"])
    strategy: Any = FullyShardedStrategy() if settings["strategy"] == "sharded" else settings["strategy"]
    trainer = Trainer(
        strategy=strategy, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=1, default_root_dir=folder, plugins=[AtomicCheckpointIO()],
        callbacks=[SeededUpdates(0), Resumption(), CodebookUsage(), Checkpoints(settings.get("every", 100))],
        **{"accelerator": "cpu", **settings["trainer"]},
    )  # fmt: skip
    found = latest_checkpoint(folder / "checkpoints")
    trainer.fit(module, datamodule=data, ckpt_path=found and found[1], weights_only=True)
    state = whole_state(module) if is_sharded(module) else module.state_dict()
    if trainer.is_global_zero:
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, folder / "weights.pt")
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    trainer.strategy.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
