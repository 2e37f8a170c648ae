"""Why two people get different numbers: each usual reason alone, computed on the user's own recordings and model.

The same predictions are scored again and again, each time with one habit changed, so that a row reads "this alone
changes the metric from x to y". S samples, F predicted frames, N videos.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivideogpt.metrics import alterations as other
from ivideogpt.metrics.judges import HIGHER_IS_BETTER, Judges
from ivideogpt.metrics.measuring import Clips, RollsOut, Work, as_floats, full_float32, predict, recorded_actions
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.results import OVERALL

VIDEOS, SAMPLES = 16, 10
"""How many clips, and futures of each, the reasons are computed on."""
DRAWS = 2_000
"""Draws of fewer videos."""

Frame = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass
class Explanation:
    """One reason.

    Attributes:
        reason: the usual reason.
        change: what alone was changed.
        values: metric -> (as the protocol has it, with the change).
    """

    reason: str
    change: str
    values: dict[str, tuple[float, float]]


@dataclasses.dataclass
class _Seen:
    """One clip: prediction (S, T, C, H, W), video (T, C, H, W), the recorded frames in their own size if larger."""

    prediction: Tensor
    video: Tensor
    original: Tensor | None
    greedy: Tensor | None


@full_float32()
@torch.inference_mode()
def explain(
    model: RollsOut,
    clips: Clips,
    protocol: EvaluationProtocol,
    judges: Judges,
    *,
    seed: int = 0,
    alternative: Frame | None = None,
    missing: Mapping[str, str] | None = None,
    result: Mapping[str, Any] | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Computes every usual reason for another number.

    Args:
        model: in eval mode.
        clips: of the protocol.
        protocol: settled for the model.
        judges: what judges the predictions.
        seed: of the predictions.
        alternative: LPIPS with the other network.
        missing: reasons that cannot be computed here, and why, in words.
        result: of the evaluation, for what its videos and features tell.
        watch: is told how many clips are done.

    Returns:
        JSON: ``videos``, ``samples`` (what it was computed on), ``rows`` and ``not_computed``.
    """
    count = min(VIDEOS, len(clips))
    samples = 1 if protocol.greedy else SAMPLES
    wide = dataclasses.replace(protocol, num_samples=samples)
    work = Work(model, clips, wide, judges, seed, samples)
    scores = _Scores(min(protocol.num_samples, samples))
    chosen = sorted(np.random.default_rng(0).permutation(len(clips))[:count].tolist())
    for done, number in enumerate(chosen):
        seen = _see(work, number)
        for reason, change, values in _rescored(seen, protocol, judges, alternative):
            scores.add(reason, change, values)
        if watch is not None:
            watch(done + 1, count)
    rows = scores.rows(samples)
    rows += _from_result(result)
    not_computed = dict(missing or {})
    if importlib.util.find_spec("av") is None:
        not_computed["lossy frames, H.264"] = "needs PyAV: pip install 'ivideogpt[video]'"
    if protocol.greedy:
        not_computed["number of samples"] = "argmax gives one future"
    return {
        "videos": count,
        "samples": samples,
        "rows": [dataclasses.asdict(row) | {"values": {m: list(v) for m, v in row.values.items()}} for row in rows],
        "not_computed": not_computed,
    }


def _see(work: Work, number: int) -> _Seen:
    batch = work.clips.batch([number])
    video = as_floats(batch["video"], work.model.device)[:, : work.protocol.frames]
    actions = recorded_actions(work, batch)
    prediction = predict(work, 0, [number], video, actions, range(work.protocol.num_samples)).video
    greedy = None
    if not work.protocol.greedy:
        argmax = dataclasses.replace(work, protocol=dataclasses.replace(work.protocol, temperature=0.0))
        greedy = predict(argmax, 0, [number], video, actions, [0]).video
    original = getattr(work.clips, "original", lambda _: None)(number)
    if original is not None:
        original = as_floats(original, work.model.device)
        original = None if original.shape[-2:] == video.shape[-2:] else original
    return _Seen(prediction, video[0], original, greedy)


Scored = tuple[str, str, dict[str, np.ndarray]]


def _rescored(seen: _Seen, protocol: EvaluationProtocol, judges: Judges, alternative: Frame | None) -> list[Scored]:
    """(reason, change, metric -> (S,)) of one clip; the first is as the protocol has it."""
    t0 = protocol.context_length
    assert t0 is not None
    frames: dict[str, Frame] = dict(judges.frames)
    predicted, truth = seen.prediction[:, t0:], seen.video[t0:]

    def score(pred: Tensor, real: Tensor, metrics: Mapping[str, Frame] = frames) -> dict[str, np.ndarray]:
        against = real.expand(len(pred), *real.shape)
        return {name: metric(pred, against).mean(1).double().cpu().numpy() for name, metric in metrics.items()}

    found: list[Scored] = [("", "", score(predicted, truth))]

    def add(reason: str, change: str, values: dict[str, np.ndarray]) -> None:
        found.append((reason, change, values))

    lossy = "lossy frames"
    add(lossy, "recordings stored with colours at half the resolution (4:2:0), nothing else lost",
        score(predicted, other.chroma_420(truth)))  # fmt: skip
    for quality in (95, 75):
        add(lossy, f"recordings stored as JPEG, quality {quality}, 4:2:0", score(predicted, other.jpeg(truth, quality)))
    film = other.h264(seen.video)
    if film is not None:
        add(lossy, "recordings stored as H.264, crf 18, 4:2:0", score(predicted, film[t0:]))
    kernel = "resize kernel"
    if seen.original is not None and protocol.resolution is not None:
        for name in other.KERNELS:
            again = other.resized(seen.original, protocol.resolution, name)[t0:]
            add(kernel, f"scored frames resized with: {name}", score(predicted, again))
    else:
        for factor, name in ((2, "both enlarged twice (bicubic) before scoring"), (0.5, "both halved before scoring")):
            if truth.shape[-1] * factor >= 16:
                add(kernel, name, score(_scaled(predicted, factor), _scaled(truth[None], factor)[0]))
    scale = "value range"
    add(scale, "predictions rounded to 8 bits", score((predicted * 255).round() / 255, truth))
    signed: dict[str, Frame] = {"psnr": other.signed_psnr, "ssim": other.signed_ssim(1.0), "mse": other.signed_mse}
    add(scale, "pixels in [-1, 1], a data range of 1 kept", score(predicted, truth, signed))
    add(scale, "pixels in [-1, 1], a data range of 2", score(predicted, truth, {"ssim": other.signed_ssim(2.0)}))
    if "lpips" in frames:
        add(scale, "LPIPS given [0, 1] where [-1, 1] belongs",
            score((predicted + 1) / 2, (truth + 1) / 2, {"lpips": frames["lpips"]}))  # fmt: skip
    window = "SSIM variant"
    add(window, "the border counted too", score(predicted, truth, {"ssim": other.whole_ssim}))
    add(window, "uniform 7 x 7 window (scikit-image's default)", score(predicted, truth, {"ssim": other.uniform_ssim}))
    add(window, "grey frames", score(predicted, truth, {"ssim": other.grey_ssim}))
    frames_counted = "frames counted"
    add(frames_counted, "context frames counted too", score(seen.prediction, seen.video))
    add(frames_counted, "PSNR of the clip's mean squared error", score(predicted, truth, {"psnr": other.clip_psnr}))
    if seen.greedy is not None:
        add("sampling", "argmax (temperature 0), one sample", score(seen.greedy[:, t0:], truth))
    if alternative is not None:
        name = "alex" if protocol.lpips == "vgg" else "vgg"
        add("LPIPS network", f"LPIPS with {name}", score(predicted, truth, {"lpips": alternative}))
    return found


def _scaled(video: Tensor, factor: float) -> Tensor:
    options: dict[str, Any] = (
        {"mode": "area"} if factor < 1 else {"mode": "bicubic", "align_corners": False, "antialias": True}
    )
    flat = torch.nn.functional.interpolate(video.flatten(0, 1), scale_factor=factor, **options)
    return flat.clamp(0, 1).unflatten(0, video.shape[:2])


class _Scores:
    """Adds up clips and takes the best of the protocol's samples at the end."""

    def __init__(self, best_of: int) -> None:
        self.best_of = best_of
        self.usual: dict[str, np.ndarray] = {}  # of the clip that is being added
        self.found: dict[tuple[str, str], dict[str, list[tuple[np.ndarray, np.ndarray]]]] = {}

    def add(self, reason: str, change: str, values: dict[str, np.ndarray]) -> None:
        """Adds one clip's values, those without a change first: a row is held against the clips that are in it."""
        if (reason, change) == ("", ""):
            self.usual = values
        row = self.found.setdefault((reason, change), {})
        for metric, one in values.items():
            row.setdefault(metric, []).append((self.usual[metric], one))

    def _best(self, metric: str, clips: list[np.ndarray], count: int) -> float:
        choose = np.max if HIGHER_IS_BETTER[metric] else np.min
        return float(np.mean([choose(values[:count]) for values in clips]))

    def rows(self, samples: int) -> list[Explanation]:
        """All reasons, against the first entry."""
        usual = {metric: [one for one, _ in pairs] for metric, pairs in self.found.pop(("", "")).items()}
        base = {metric: self._best(metric, clips, self.best_of) for metric, clips in usual.items()}

        def both(metric: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
            before, after = zip(*pairs, strict=True)
            return self._best(metric, list(before), self.best_of), self._best(metric, list(after), self.best_of)

        rows = [
            Explanation(reason, change, {metric: both(metric, pairs) for metric, pairs in values.items()})
            for (reason, change), values in self.found.items()
        ]
        if samples > 1:
            for count in sorted({1, samples} - {self.best_of}):
                values = {m: (base[m], self._best(m, clips, count)) for m, clips in usual.items()}
                rows.append(Explanation("number of samples", f"best of {count} instead of {self.best_of}", values))
            mean = {m: (base[m], float(np.mean([v[: self.best_of] for v in clips]))) for m, clips in usual.items()}
            if self.best_of > 1:
                rows.append(Explanation("number of samples", f"mean of {self.best_of} instead of the best", mean))
        return rows


def _from_result(result: Mapping[str, Any] | None) -> list[Explanation]:
    """What fewer videos do, drawn from the values of all videos: the far ends of 95 % of the draws."""
    if result is None:
        return []
    metrics = list(result["videos"][0]["best"])
    values = np.array([[np.mean(video["best"][m]) for m in metrics] for video in result["videos"]])  # (N, M)
    rows, rng, total = [], np.random.default_rng(0), len(values)
    for count in sorted({n for n in (8, 16, 64, 128) if n < total}):
        draws = np.stack([values[rng.permutation(total)[:count]].mean(0) for _ in range(DRAWS)])
        for end, share in (("low", 0.025), ("high", 0.975)):
            ends = np.quantile(draws, share, axis=0)
            rows.append(
                Explanation(
                    "number of videos",
                    f"{count} of the {total} videos: {end} end of 95 % of such draws",
                    {m: (float(values[:, i].mean()), float(ends[i])) for i, m in enumerate(metrics)},
                )
            )
    distance = result[OVERALL].get("fvd") or {}
    for name, change in (("half_the_videos", "half of the videos"), ("one_sample", "one sample of each video")):
        if distance.get(name) is not None:
            reason = "number of videos" if "half" in name else "number of samples"
            rows.append(Explanation(reason, change, {"fvd": (distance["value"], distance[name])}))
    return rows
