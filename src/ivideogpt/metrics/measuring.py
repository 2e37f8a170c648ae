"""Measures a few clips: rolls the model out, sample by sample in bounded memory, and judges what it predicts.

B clips, S samples a clip, k of them at once, T frames, t0 context frames, F = T - t0 predicted ones, D features.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ivideogpt.data.transforms import to_float
from ivideogpt.metrics.judges import Judges
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.tokens import TokenPerplexity

BATCH_SIZE = 32
"""Samples that are rolled out at once."""

REAL, PREDICTED = "real", "predicted"
"""Whose features: of the recordings, of the predictions."""


class RollsOut(Protocol):
    """What is needed of a world model (``ivideogpt.WorldModel`` is one)."""

    @property
    def config(self) -> Any:
        """Its configuration."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def rollout(self) -> Callable[..., Any]:
        """Predicts what follows the context: gives an object with ``video`` and ``rewards``."""


class Clips(Protocol):
    """What is needed of the clips (:class:`ivideogpt.metrics.clips.ClipSet` are some)."""

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know of them."""

    def __len__(self) -> int: ...

    def place(self, number: int) -> tuple[str, str, int]:
        """Key of a clip's episode, its source, and the start frame."""

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Video (B, T, C, H, W), actions (B, T, A) and rewards (B, T) if any."""

    def data(self) -> dict[str, Any]:
        """What tells these recordings from others."""


@dataclass(frozen=True)
class Work:
    """All that an evaluation was given."""

    model: RollsOut
    clips: Clips
    protocol: EvaluationProtocol
    judges: Judges
    seed: int
    batch_size: int

    @cached_property
    def places(self) -> list[tuple[str, str, int]]:
        """Episode, source and start frame of each clip."""
        return [self.clips.place(number) for number in range(len(self.clips))]

    @cached_property
    def frame_precision(self) -> str | None:
        """That frames are decoded in: float32 on every device, unless the model itself is in something coarser."""
        parameters = getattr(self.model, "parameters", lambda: iter(()))()
        coarser = any(one.dtype in (torch.bfloat16, torch.float16) for one in parameters)
        return None if coarser else "float32"

    @property
    def groups(self) -> list[tuple[int, list[int]]]:
        """(run, clips) that are rolled out together: the same ones however many processes there are."""
        at_once = max(1, self.batch_size // self.protocol.num_samples)
        count = len(self.places)
        return [
            (run, list(range(first, min(first + at_once, count))))
            for run in range(self.protocol.runs)
            for first in range(0, count, at_once)
        ]

    @cached_property
    def by_source(self) -> dict[str, list[int]]:
        """Clips of each source."""
        found: dict[str, list[int]] = {}
        for number, (_, source, _) in enumerate(self.places):
            found.setdefault(source, []).append(number)
        return found

    def donor(self, run: int, number: int) -> int | None:
        """Clip of another episode of the same source, whose actions are tried; None without one."""
        key, source, start = self.places[number]
        others = self.by_source[source]
        offset = sample_seed(self.seed, run, key, start, -1) % len(others)
        return next((n for n in [*others[offset:], *others[:offset]] if self.places[n][0] != key), None)


def sample_seed(seed: int, run: int, key: str, start: int, sample: int) -> int:
    """Seed of one sample's random numbers."""
    text = json.dumps([seed, run, key, start, sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1  # manual_seed takes 63 bits


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Inside, a GPU computes float32 as float32, not as TF32, by torch's global switches; nothing changes on a CPU."""
    switches: list[Any] = [getattr(torch.backends.cudnn, "conv"), torch.backends.cuda.matmul]  # noqa: B009 (mypy)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def as_floats(video: Tensor, device: torch.device) -> Tensor:
    """Video in [0, 1] on ``device``.

    Raises:
        ValueError: if it is not finite.
    """
    if not video.is_floating_point():
        return to_float(video.to(device))
    if not bool(torch.isfinite(video).all()):
        raise ValueError("the recorded frames hold values that are not finite (NaN or infinity): repair the recordings")
    return video.to(device)


def predict(
    work: Work, run: int, numbers: Sequence[int], video: Tensor, actions: Tensor | None, samples: Sequence[int]
) -> Any:
    """Rolls out some samples of some clips, each with random numbers of its own, drawn on the CPU for any device.

    Args:
        work: the evaluation.
        run: of it.
        numbers: B clips.
        video: of them, (B, T, C, H, W) in [0, 1].
        actions: of them, (B, T, A), or others.
        samples: k numbers of samples.

    Returns:
        The rollout, its video (B*k, T, C, H, W), the samples of a clip side by side.

    Raises:
        ValueError: if a predicted frame is not finite.
    """
    protocol = work.protocol
    streams = []
    for number in numbers:
        key, _, start = work.places[number]
        for sample in samples:
            streams.append(torch.Generator().manual_seed(sample_seed(work.seed, run, key, start, sample)))
    found = work.model.rollout(
        video[:, : protocol.context_length],
        None if actions is None else actions[:, : protocol.frames - 1],
        horizon=protocol.horizon,
        temperature=protocol.temperature,
        top_k=protocol.top_k,
        num_samples=len(samples),
        generator=streams,
        frame_precision=work.frame_precision,
    )
    finite = torch.isfinite(found.video).flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = numbers[int((~finite).nonzero()[0]) // len(samples)]
        raise ValueError(
            f"the model predicts frames that are not finite (NaN or infinity) for episode {work.places[bad][0]!r}, "
            f"run {run}: its weights are broken, or its precision is too low"
        )
    return found


def recorded_actions(work: Work, batch: dict[str, Any]) -> Tensor | None:
    """The actions that the model is given, None where it takes none.

    Raises:
        ValueError: if the clips have none, or of another width.
    """
    wanted = work.model.config.action_dim
    if wanted is None:
        return None
    actions = batch.get("actions")
    if actions is None:
        raise ValueError(f"the model needs actions and the clips have none (first clip: {batch['key'][0]!r})")
    if actions.shape[-1] != wanted:
        raise ValueError(
            f"the model takes actions of {wanted} numbers, the clips have {actions.shape[-1]} "
            f"(first clip: {batch['key'][0]!r})"
        )
    return actions.float()


@full_float32()
@torch.inference_mode()
def measure(work: Work, run: int, numbers: Sequence[int]) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Measures clips of one group in one run.

    Returns:
        Of each clip its record, which JSON can hold, and its features. A record has ``samples``: metric -> (S,), means
        over the predicted frames; ``curve``: metric -> (F,), means over samples; ``rewards``; ``shuffled``: metric ->
        [own actions, another clip's], over the same samples; and in run 0 ``repeat``: metric -> (F,) of the last
        context frame repeated, ``still`` (nothing moves), and ``tokens``.
    """
    protocol, judges, t0 = work.protocol, work.judges, work.protocol.context_length
    assert t0 is not None
    batch = work.clips.batch(numbers)
    video = as_floats(batch["video"], work.model.device)
    if video.shape[1] < protocol.frames:
        raise ValueError(
            f"clips of {video.shape[1]} frames are too short for {t0} context frames and a horizon of "
            f"{protocol.horizon}"
        )
    video = video[:, : protocol.frames]
    truth = video[:, t0:]
    actions = recorded_actions(work, batch)
    found: dict[str, list[Tensor]] = {metric: [] for metric in judges.frames}
    features: list[Tensor] = []
    rewards: list[Tensor] = []
    at_once = min(protocol.num_samples, work.batch_size)
    for first in range(0, protocol.num_samples, at_once):
        samples = range(first, min(first + at_once, protocol.num_samples))
        prediction = predict(work, run, numbers, video, actions, samples)
        for metric, values in _judge(judges, prediction.video[:, t0:], truth, len(samples)).items():
            found[metric].append(values)
        if judges.features is not None:
            features.append(
                judges.features(prediction.video.clamp(0, 1)).float().cpu().unflatten(0, (len(numbers), -1))
            )
        if prediction.rewards is not None and "rewards" in batch:
            rewards.append(prediction.rewards.double().cpu().unflatten(0, (len(numbers), -1)))
    every = {metric: torch.cat(values, dim=1) for metric, values in found.items()}  # (B, S, F)
    shuffled = _shuffled(work, run, numbers, video, actions, every)
    repeated = _judge(judges, video[:, t0 - 1 : t0].expand_as(truth), truth, 1) if run == 0 else {}
    real = judges.features(video).float().cpu() if judges.features is not None and run == 0 else None
    records = []
    for row, number in enumerate(numbers):
        key, source, start = work.places[number]
        record: dict[str, Any] = {"run": run, "video": number, "key": key, "source": source, "start": start}
        record["samples"] = {metric: values[row].mean(1).tolist() for metric, values in every.items()}
        record["curve"] = {metric: values[row].mean(0).tolist() for metric, values in every.items()}
        record["shuffled"] = shuffled[row]
        if rewards:
            true = batch["rewards"][row, t0 : protocol.frames].double().tolist()
            record["rewards"] = {"true": true, "predicted": torch.cat(rewards, dim=1)[row].mean(0).tolist()}
        kept = {PREDICTED: torch.cat(features, dim=1)[row].numpy()} if features else {}
        if run == 0:
            record["repeat"] = {metric: values[row, 0].tolist() for metric, values in repeated.items()}
            record["still"] = bool((truth[row] == video[row, t0 - 1 : t0]).all())
            tokens = _tokens(work, video[row : row + 1], None if actions is None else actions[row : row + 1])
            record |= {} if tokens is None else {"tokens": tokens}
            kept |= {} if real is None else {REAL: real[row : row + 1].numpy()}
        records.append((record, kept))
    return records


def _judge(judges: Judges, predicted: Tensor, truth: Tensor, samples: int) -> dict[str, Tensor]:
    """Each metric (B, k, F), float64 on the CPU, of ``predicted`` (B*k, F, ...) against ``truth`` (B, F, ...)."""
    against = truth.repeat_interleave(samples, dim=0)
    return {
        metric: judge(predicted, against).double().cpu().unflatten(0, (-1, samples))
        for metric, judge in judges.frames.items()
    }


def _shuffled(
    work: Work, run: int, numbers: Sequence[int], video: Tensor, actions: Tensor | None, own: dict[str, Tensor]
) -> list[dict[str, list[float]] | None]:
    """Metric -> [own actions, another clip's], means over the same samples with the same random numbers."""
    if actions is None:
        return [None] * len(numbers)
    t0, count = work.protocol.context_length, work.protocol.shuffled_samples
    donors = [work.donor(run, number) for number in numbers]
    given = actions.clone()
    wanted = [(row, number) for row, number in enumerate(donors) if number is not None]
    if not wanted:
        return [None] * len(numbers)
    theirs = recorded_actions(work, work.clips.batch([number for _, number in wanted]))
    assert theirs is not None
    for (row, _), one in zip(wanted, theirs, strict=True):
        given[row] = one[: given.shape[1]]
    prediction = predict(work, run, numbers, video, given, range(count))
    other = _judge(work.judges, prediction.video[:, t0:], video[:, t0:], count)
    return [
        None
        if donors[row] is None
        else {metric: [float(own[metric][row, :count].mean()), float(other[metric][row].mean())] for metric in own}
        for row in range(len(numbers))
    ]


def _tokens(work: Work, video: Tensor, actions: Tensor | None) -> dict[str, Any] | None:
    """Teacher-forced: the loss of the future frames' ids (slots left out), how many, and which entries are in use.

    One clip (1, T, C, H, W) at a time: the logits of a clip are 50 MB for the published vocabulary.
    """
    model: Any = work.model
    if getattr(model, "tokenizer", None) is None:
        return None
    tokens, labels = model.tokenizer.tokenize(video.to(next(model.tokenizer.parameters()).dtype))
    logits = model(tokens, None if actions is None else actions[:, : video.shape[1]]).logits
    perplexity = TokenPerplexity(left_out=(model.layout.dynamics_slot_id,))  # slots are no news
    perplexity.update(logits, labels)
    context, dynamics = model.layout.split(tokens)
    return {
        "loss": float(perplexity.loss),
        "count": int(perplexity.tokens),
        "context": torch.unique(context).tolist(),
        "dynamics": torch.unique(dynamics).tolist(),
    }
