"""Callbacks: seeded updates, rollout strips, codebook usage and throughput."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ivideogpt.drawing import save_comparison, save_png, strip
from ivideogpt.metrics.tokens import codebook_usage
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.training.peaks import promised_rate


class SeededUpdates(Callback):
    """Seeds all random generators before each update from (seed, rank, update, micro-batch).

    Dropout is then a function of the update and not of the history, so a resumed run equals one that never stopped.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds Python, numpy and torch."""
        micro_batch = batch_idx % max(trainer.accumulate_grad_batches, getattr(pl_module, "accumulate", 1))
        entropy = (self.seed, trainer.global_rank, trainer.global_step, micro_batch)
        words = np.random.SeedSequence(entropy).generate_state(2)
        random.seed(int(words[0]))
        np.random.seed(int(words[0]))
        torch.manual_seed((int(words[0]) << 32) | int(words[1]))


class RolloutStrips(Callback):
    """Draws truth | prediction | error of held-out clips at each validation, as PNG and GIF, to TensorBoard and to W&B.

    There the strips are ``val/strips`` and the animations ``val/rollouts``.

    A tokenizer's prediction is its reconstruction, a transformer's an autoregressive rollout.

    Args:
        num_clips: clips that are drawn, from the first validation batch on.
        keep: newest validations whose files stay.
    """

    def __init__(self, num_clips: int = 4, keep: int = 5) -> None:
        if num_clips < 1 or keep < 1:
            raise ValueError(f"num_clips and keep must be positive, got {num_clips!r}, {keep!r}")
        self.num_clips = num_clips
        self.keep = keep
        self._batch: dict[str, Any] | None = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Remembers the clips."""
        if batch_idx == 0 and dataloader_idx == 0 and trainer.is_global_zero:
            if "video" not in batch:
                rank_zero_warn(
                    "there are no strips: the validation clips are tokens; give the data a shard set as `val`"
                )
                return
            self._batch = {name: value[: self.num_clips] for name, value in batch.items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws them."""
        if self._batch is None or trainer.sanity_checking:
            return
        batch, self._batch = self._batch, None
        with torch.no_grad():
            prediction = pl_module.imagine(batch)  # type: ignore[operator]
        context_length = _tokenizer(pl_module).context_length
        picture = strip(batch["video"], prediction, context_length)
        folder = Path(trainer.default_root_dir) / "strips"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"update-{trainer.global_step:06d}"
        save_png(folder / f"{stem}.png", picture)
        animation = folder / f"{stem}.gif"
        save_comparison(animation, batch["video"], prediction, context_length)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/strips", picture, trainer.global_step, dataformats="HWC")
                _add_animation(logger.experiment, "val/rollouts", animation, trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_image("val/strips", [picture], trainer.global_step)
                logger.log_video("val/rollouts", [str(animation)], trainer.global_step)
        for old in sorted(folder.glob("update-*.png"))[: -self.keep]:
            old.unlink(missing_ok=True)
            old.with_suffix(".gif").unlink(missing_ok=True)


def _add_animation(writer: SummaryWriter, tag: str, path: Path, update: int) -> None:
    """Adds a GIF to TensorBoard, as ``add_video`` would, which makes its GIFs by moviepy."""
    with Image.open(path) as gif:
        width, height = gif.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), update)


def _tokenizer(module: LightningModule) -> CompressiveTokenizer:
    tokenizer = module.tokenizer
    assert isinstance(tokenizer, CompressiveTokenizer), "this callback belongs to the modules of ivideogpt.training"
    return tokenizer


class CodebookUsage(Callback):
    """Logs perplexity and used fraction of both codebooks over the validation clips."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the last validation."""
        self._counts = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Counts the choices of a batch."""
        if not isinstance(outputs, Mapping):
            return
        config = _tokenizer(pl_module).config
        sizes = {"context": config.codebook_size, "dynamics": config.dynamics_codebook_size}
        for name, size in sizes.items():
            indices = outputs[f"{name}_indices"].flatten()
            counts = torch.bincount(indices if batch["key"] else indices[:0], minlength=size)
            self._counts[name] = self._counts.get(name, 0) + counts

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs."""
        for name in ("context", "dynamics"):
            if name not in self._counts:
                return
            counts = trainer.strategy.reduce(self._counts[name], reduce_op="sum")
            assert isinstance(counts, Tensor)
            perplexity, used = codebook_usage(counts)
            pl_module.log_dict({f"val/{name}_perplexity": perplexity, f"val/{name}_used": used}, rank_zero_only=True)


class Throughput(Callback):
    """Logs frames and tokens a second (all processes together), waiting for data included, validations left out.

    Of a transformer also ``train/mfu``, its arithmetic over what the devices could do at most, where that is known:
    not on CPUs, not of a tokenizer, whose arithmetic is not counted, and not of GRPO, most of whose is sampling. A
    tokenizer that works in the update is left out.
    """

    def __init__(self) -> None:
        self._updates = 0
        self._peak: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._start, self._frames, self._tokens = time.monotonic(), 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._restart()
        self._updates = trainer.global_step
        dtype = torch.float32 if str(trainer.precision).startswith("32") else torch.bfloat16
        self._peak = promised_rate(trainer.strategy.root_device, dtype)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock anew."""
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts, and logs where the trainer logs."""
        layout = _tokenizer(pl_module).layout
        if "tokens" in batch:
            clips, frames = len(batch["tokens"]), layout.num_frames(batch["tokens"].shape[1])
        else:
            clips, frames = batch["video"].shape[:2]
        self._frames += clips * frames * trainer.world_size
        self._tokens += clips * layout.sequence_length(frames) * trainer.world_size
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        before, self._updates = self._updates, trainer.global_step
        if every and self._updates // every > before // every:
            seconds = max(time.monotonic() - self._start, 1e-9)
            length = layout.sequence_length(frames)
            rates = {"frames": self._frames / seconds, "tokens": self._tokens / seconds}
            pl_module.log_dict({f"train/{name}_per_second": rate for name, rate in rates.items()})
            transformer = getattr(pl_module, "transformer", None)
            if self._peak and transformer is not None and pl_module.automatic_optimization:
                done = transformer.flops_per_sequence(length, layout.context_span) * rates["tokens"] / length
                pl_module.log("train/mfu", done / (self._peak * trainer.world_size))
            self._restart()
