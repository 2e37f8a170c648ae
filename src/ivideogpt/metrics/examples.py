"""Videos that a report shows: the best and the worst, several futures of one, and where the next token is uncertain.

They are rolled out again with the random numbers of run 0, so they are the videos that were measured.
T frames, F predicted frames, k samples, g x g dynamics tokens a frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivideogpt.drawing import to_uint8
from ivideogpt.metrics.judges import HIGHER_IS_BETTER
from ivideogpt.metrics.measuring import Work, as_floats, full_float32, predict, recorded_actions

SHOWN = 3
"""How many of the best and of the worst."""
FUTURES = 5
"""Futures of one clip that are shown beside each other."""


@dataclass(frozen=True)
class ShownVideo:
    """One clip as it was predicted.

    Attributes:
        key: of its episode.
        source: of its episode.
        start: first frame.
        values: metric -> value of the best sample in run 0.
        last_frame: metric -> value of repeating the last frame.
        truth: uint8 (T, H, W, 3).
        samples: uint8 (k, T, H, W, 3), the best by the report's metric first.
        entropy: (F, g, g), bits of the next-token distribution on the way to the first sample; None if nobody can tell.
    """

    key: str
    source: str
    start: int
    values: dict[str, float]
    last_frame: dict[str, float]
    truth: np.ndarray
    samples: np.ndarray
    entropy: np.ndarray | None


@dataclass(frozen=True)
class Examples:
    """Attributes: metric by which ``best`` and ``worst`` were chosen, and ``median``, whose futures are spread out."""

    metric: str
    best: list[ShownVideo]
    worst: list[ShownVideo]
    median: ShownVideo


def choose(result: Mapping[str, Any], metric: str) -> tuple[list[int], list[int], int]:
    """Numbers of the best videos, of the worst and of the one in the middle, by run 0."""
    values = [float(video["best"][metric][0]) for video in result["videos"]]
    order = sorted(range(len(values)), key=values.__getitem__, reverse=HIGHER_IS_BETTER[metric])
    count = min(SHOWN, max(1, len(order) // 2))
    return order[:count], order[::-1][: min(count, len(order) - count)], order[len(order) // 2]


@full_float32()
@torch.inference_mode()
def gather(work: Work, result: Mapping[str, Any]) -> Examples:
    """Rolls out what a report shows.

    Args:
        work: the evaluation.
        result: of it.
    """
    metric = next(iter(result["videos"][0]["best"]))
    best, worst, middle = choose(result, metric)
    shown = {number: _roll(work, result, number, metric) for number in {*best, *worst, middle}}
    return Examples(metric, [shown[n] for n in best], [shown[n] for n in worst], shown[middle])


def _roll(work: Work, result: Mapping[str, Any], number: int, metric: str) -> ShownVideo:
    protocol, t0 = work.protocol, work.protocol.context_length
    assert t0 is not None
    batch = work.clips.batch([number])
    video = as_floats(batch["video"], work.model.device)[:, : protocol.frames]
    actions = recorded_actions(work, batch)
    # one future is enough for the measure, several are not for the eye
    count = 1 if protocol.greedy else max(FUTURES, protocol.num_samples)
    judge, sign = work.judges.frames[metric], 1 if HIGHER_IS_BETTER[metric] else -1
    best, score, tokens = -1, -math.inf, None
    shown: dict[int, Tensor] = {}  # the first futures, and the best of those that were measured
    for begin in range(0, count, work.batch_size):
        numbers = range(begin, min(begin + work.batch_size, count))
        prediction = predict(work, 0, [number], video, actions, numbers)
        future = prediction.video[:, t0:]
        values = judge(future, video[:, t0:].expand_as(future)).mean(1)
        for row, sample in enumerate(numbers):
            if sample < FUTURES:
                shown[sample] = prediction.video[row]
            if sample < protocol.num_samples and (best < 0 or sign * float(values[row]) > score):
                if best >= FUTURES:
                    del shown[best]
                best, score, shown[sample] = sample, sign * float(values[row]), prediction.video[row]
                if getattr(prediction, "tokens", None) is not None:
                    tokens = prediction.tokens[row : row + 1]
    order = [best, *(sample for sample in sorted(shown) if sample != best)][:FUTURES]
    entropy = None
    if tokens is not None and callable(work.model):
        entropy = entropy_map(work.model, tokens, None if actions is None else actions[:, : protocol.frames])
    row = result["videos"][number]
    return ShownVideo(
        key=row["key"],
        source=row["source"],
        start=row["start"],
        values={name: runs[0] for name, runs in row["best"].items()},
        last_frame=row["repeat_last_frame"],
        truth=to_uint8(video[0]),
        samples=to_uint8(torch.stack([shown[sample] for sample in order])),
        entropy=entropy,
    )


@torch.inference_mode()
def entropy_map(model: Any, tokens: Tensor, actions: Tensor | None) -> np.ndarray | None:
    """Entropy (F, g, g) in bits of the model's distribution at each token of the predicted frames, as it was drawn.

    That of the whole softmax at temperature 1, before top-k; None where a frame's tokens are no square.

    Args:
        model: a world model.
        tokens: (1, L), of a rollout.
        actions: (1, T, A).
    """
    layout = model.layout
    frames = layout.num_frames(tokens.shape[1]) - layout.context_length
    side = math.isqrt(layout.dynamics_tokens_per_frame)
    if side**2 != layout.dynamics_tokens_per_frame:
        return None
    logits = model(tokens, actions).logits[0]  # (L, V): position p tells of token p + 1
    slots = layout.slot_positions(frames, logits.device)
    places = slots[:, None] + torch.arange(layout.dynamics_tokens_per_frame, device=logits.device)
    log_p = logits[places.flatten()].float().log_softmax(-1)  # (F n, V)
    bits = -(log_p.exp() * log_p).sum(-1) / math.log(2)
    return bits.clamp_min(0).view(frames, side, side).cpu().numpy()
