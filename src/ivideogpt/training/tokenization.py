"""Turns the clips of shard sets into a token set by a tokenizer, once, so that training never touches pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ivideogpt.data.tokenized_plan import ClipPlan, PlanSettings, collate_clips
from ivideogpt.data.tokenized_writer import TokenSetWriter
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.training.frozen_tokenizer import FrozenTokenizer
from ivideogpt.zoo.fingerprint import tokenizer_hash

SHARD_CLIPS = 8192


@dataclass(frozen=True)
class Tokenized:
    """What a run of `tokenize_clips` did.

    Attributes:
        folder: of the token set.
        made: clips of the shards that this run wrote.
        skipped: keys of the bad episodes that it met.
        complete: whether the set is whole; False while other parts are missing.
    """

    folder: Path
    made: int
    skipped: list[str]
    complete: bool


def tokenize_clips(
    tokenizer: CompressiveTokenizer,
    sources: Sequence[str],
    out: str | Path,
    segment_length: int,
    *,
    stride: int | None = 1,
    target_rate: float = 3.0,
    goal: bool = False,
    clips_per_episode: int | None = 4,
    every: int | None = None,
    draws: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    shard_clips: int = SHARD_CLIPS,
    part: tuple[int, int] = (1, 1),
    policy: str = "error",
    command: str = "",
    model: str = "",
    progress: Callable[[int, int | None], None] | None = None,
) -> Tokenized:
    """Writes the shards of a token set that are missing, and its manifest when none is.

    Args:
        tokenizer: is moved to `device`, put into eval mode and laid out channels-last, as a training has it.
        sources: shard sets.
        out: folder of the token set.
        segment_length: frames of a clip, the context and a goal frame counted.
        stride: frames to move on for each frame of the clip; None: to `target_rate` by each episode's frame rate.
        target_rate: frames a second to aim at where `stride` is None.
        goal: put the last frame of each clip in front of it.
        clips_per_episode: evenly spaced clips of each episode; None with `every`.
        every: a clip at every so many-th start frame.
        draws: augmentation draws of each clip; 0: the clip as it is.
        seed: of the draws.
        batch_size: clips at once.
        num_workers: processes that read clips.
        device: where the tokenizer computes.
        dtype: of the products, as in mixed-precision training; None: bfloat16 on a GPU, float32 elsewhere.
        shard_clips: clips of a shard, which is what a kill can cost.
        part: (i, n) makes the i-th of n parts, from 1 on.
        policy: `error` or `skip` for bad records.
        command: the command line, for the manifest.
        model: what the tokenizer was named by, for the manifest.
        progress: is told the clips done and their number.

    Raises:
        ValueError: an argument, a shard set or the folder does not fit.
        OSError: a shard cannot be written; those before it are kept, and the same call goes on behind them.
    """
    if batch_size < 1 or num_workers < 0 or shard_clips < 1:
        raise ValueError(f"too low: batch_size {batch_size}, workers {num_workers} or shard_clips {shard_clips}")
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = tokenizer.config
    settings = PlanSettings(
        segment_length, config.context_length, config.resolution, stride, target_rate, goal, clips_per_episode, every,
        draws, seed,
    )  # fmt: skip
    plan = ClipPlan(sources, settings, policy)
    decides = {"tokenizer_hash": tokenizer_hash(tokenizer), "dtype": str(dtype).removeprefix("torch.")}
    decides |= {"shard_clips": shard_clips} | plan.describe()
    writer = TokenSetWriter(out, decides, len(plan), config.vocab_size)
    missing = writer.missing(*part)
    total, done, skipped = sum(len(writer.clips_of(shard)) for shard in missing), 0, set[str]()
    if progress is not None:
        progress(0, total)
    encode = FrozenTokenizer(tokenizer.to(device).eval())
    batches = [  # none crosses a shard, so that a shard is the same whichever run makes it
        list(clips[first : first + batch_size])
        for clips in map(writer.clips_of, missing)
        for first in range(0, len(clips), batch_size)
    ]
    options: dict[str, Any] = {"collate_fn": collate_clips, "pin_memory": device.type == "cuda"}
    loader = iter(DataLoader(plan, batch_sampler=batches, num_workers=num_workers if batches else 0, **options))
    for shard in missing:
        parts, bad = [], set[str]()
        for _ in range(0, len(writer.clips_of(shard)), batch_size):
            batch = next(loader)
            bad |= set(batch["skipped"])
            if batch["key"]:
                parts.append(_arrays(batch, _encode(encode, plan, batch, device, dtype)))
        arrays = _joined(parts) if parts else _no_clips(plan, config.layout.sequence_length(segment_length))
        writer.write(shard, arrays, sorted(bad))
        done += len(writer.clips_of(shard))
        skipped |= bad
        if progress is not None:
            progress(done, total)
    complete = writer.commit(command, model, plan.names)
    return Tokenized(writer.out, done, sorted(skipped), complete)


@torch.inference_mode()
def _encode(
    encode: FrozenTokenizer, plan: ClipPlan, batch: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Tokens (B, L) of a batch, computed as training in mixed precision would compute them."""
    video = plan.to_pixels(batch | {"video": batch["video"].to(device, non_blocking=True)})
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return encode(video)


def _arrays(batch: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    arrays: dict[str, Any] = {"tokens": tokens.cpu().numpy().astype(np.uint16), "key": batch["key"]}
    for name in ("actions", "rewards"):
        if name in batch:
            arrays[name] = batch[name].numpy().astype(np.float32)
    for name, kind in (("source", np.uint16), ("episode", np.int32), ("start", np.int32), ("draw", np.uint16)):
        arrays[name] = np.array(batch[name], kind)
    return arrays


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {
        name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "key"
    }
    return joined | {"key": [key for part in parts for key in part["key"]]}


def _no_clips(plan: ClipPlan, length: int) -> dict[str, Any]:
    """The arrays of a shard all of whose episodes are bad."""
    frames = plan.settings.segment_length
    arrays: dict[str, Any] = {"tokens": np.zeros((0, length), np.uint16), "key": []}
    if plan.action_dim is not None:
        arrays["actions"] = np.zeros((0, frames, plan.action_dim), np.float32)
    if plan.has_rewards:
        arrays["rewards"] = np.zeros((0, frames), np.float32)
    kinds = (("source", np.uint16), ("episode", np.int32), ("start", np.int32), ("draw", np.uint16))
    return arrays | {name: np.zeros(0, kind) for name, kind in kinds}
