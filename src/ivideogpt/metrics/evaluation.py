"""Evaluation of a world model's rollouts: accuracy, drift, action-following, rewards; per task and overall.

B clips, S samples a clip, T frames, t0 context frames, F future frames, A action size. All numbers are autoregressive:
the model sees the context frames and the actions, nothing else.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import Tensor

from ivideogpt.metrics.video import HIGHER_IS_BETTER, METRICS, best_of, frame_metrics

SCHEMA_VERSION = 1
OVERALL = "overall"
DONORS_KEPT = 256
"""Action sequences a task that are remembered for shuffling; bounds the memory of a long evaluation."""


class RollsOut(Protocol):
    """What is needed of a world model (``ivideogpt.WorldModel`` is one)."""

    reward_head: Any

    @property
    def config(self) -> Any:
        """Its configuration."""

    @property
    def rollout(self) -> Callable[..., Any]:
        """Predicts what follows the context: gives an object with ``video`` and ``rewards``."""


@dataclass
class _Sums:
    """What is added up over the clips of one task: per-frame sums (F,) and rewards."""

    clips: int = 0
    episodes: set[str] = field(default_factory=set)
    curves: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    best: dict[str, float] = field(default_factory=lambda: dict.fromkeys(METRICS, 0.0))
    paired: int = 0
    followed: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    true_rewards: list[float] = field(default_factory=list)
    predicted_rewards: list[float] = field(default_factory=list)

    def add_curve(self, which: str, name: str, values: Tensor) -> None:
        self.curves[which][name] = self.curves[which].get(name, 0.0) + values

    def add_followed(self, which: str, name: str, value: float) -> None:
        self.followed[which][name] = self.followed[which].get(name, 0.0) + value


def evaluate_rollouts(
    world_model: RollsOut,
    clips: Iterable[Mapping[str, Any]],
    horizon: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
    device: torch.device | str | None = None,
    *,
    top_k: int | None = 100,
    name: str | None = None,
) -> dict[str, Any]:
    """Rolls the model out on recorded clips and compares with what was recorded.

    Every number is a mean over clips. ``model`` holds PSNR, SSIM and MSE over the future frames: with several samples
    the mean over a clip's frames, then the best sample, each metric on its own. ``repeat_last_frame`` is the same for
    repeating the last context frame. ``curves`` holds both per future frame (mean over samples). ``shuffled_actions``
    compares rollouts with their own actions and with those of another episode of the same task, from the same context
    and the same seed, over the clips that another episode was seen for: a model that follows its actions gets worse.
    ``reward`` is the correlation (Pearson) and the squared error of predicted and recorded rewards over all future
    frames, the prediction being the mean over samples.

    Args:
        world_model: put it in eval mode and on ``device`` before.
        clips: batches, read once: "video" (B, T, C, H, W) float in [0, 1] or uint8, "actions" (B, T, A) and "rewards"
            (B, T) where there are any, "key" naming each clip's episode, and "source" naming its task; without it
            the task is the key without its trailing number and letter-number parts.
        horizon: future frames; None takes all that the clips have.
        temperature: of the sampling; 0 is argmax.
        seed: of the sampling and of the shuffling.
        num_samples: futures a clip.
        device: where the rollouts run; None is where the model is.
        top_k: of the sampling.
        name: of the model, for the result.

    Returns:
        A dictionary that JSON can hold, see above; :func:`write_results` and :func:`format_table` take it.

    Raises:
        ValueError: if there is no clip, or a clip does not fit the model or the horizon.
    """
    started = time.perf_counter()
    device = torch.device(device) if device is not None else _device_of(world_model)
    context_length = world_model.config.context_length
    takes_actions = world_model.config.action_dim is not None
    tasks: dict[str, _Sums] = defaultdict(_Sums)
    donors: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    shuffler = random.Random(seed)
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "num_samples": num_samples}

    for index, batch in enumerate(clips):
        video = _floats(batch["video"])
        if horizon is None:
            horizon = video.shape[1] - context_length
        settings["horizon"] = horizon
        needed = context_length + horizon
        if horizon < 1 or video.shape[1] < needed:
            raise ValueError(
                f"clips of {video.shape[1]} frames are too short for {context_length} context frames "
                f"and a horizon of {horizon}"
            )
        video = video[:, :needed].to(device)
        keys = [str(key) for key in batch["key"]]
        names = [str(source) for source in batch.get("source", [task_of(key) for key in keys])]
        truth, last = video[:, context_length:], video[:, context_length - 1 : context_length]
        actions = None
        if takes_actions:
            if "actions" not in batch:
                raise ValueError(f"the model needs actions and the clips have none (first clip: {keys[0]!r})")
            actions = batch["actions"][:, : needed - 1].float()

        def imagine(actions: Tensor | None, context: Tensor, batch_index: int = index) -> Any:
            # own and shuffled actions are sampled with the same numbers, which takes luck out of their difference
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + batch_index)
            return world_model.rollout(context, actions, generator=generator, **settings)

        prediction = imagine(actions, video[:, :context_length])
        values = _sample_values(prediction.video[:, context_length:], truth, num_samples)
        repeated = frame_metrics(last.expand_as(truth), truth)
        for row, task in enumerate(names):
            sums = tasks[task]
            sums.clips += 1
            sums.episodes.add(keys[row])
            for metric in METRICS:
                sums.add_curve("model", metric, values[metric][row].mean(0))
                sums.add_curve("repeat_last_frame", metric, repeated[metric][row])
                sums.best[metric] += float(best_of(values[metric][row], num_samples, HIGHER_IS_BETTER[metric]))
        _add_rewards(tasks, names, batch, prediction.rewards, num_samples, context_length, horizon)
        if actions is not None:
            swapped, has_donor = _swap_actions(actions, keys, names, donors, shuffler)
            if any(has_donor):
                other = imagine(swapped, video[:, :context_length])
                other_values = _sample_values(other.video[:, context_length:], truth, num_samples)
                for row in (row for row, found in enumerate(has_donor) if found):
                    tasks[names[row]].paired += 1
                    for metric in METRICS:
                        tasks[names[row]].add_followed("own", metric, float(values[metric][row].mean()))
                        tasks[names[row]].add_followed("shuffled", metric, float(other_values[metric][row].mean()))

    if not tasks:
        raise ValueError("there is no clip to evaluate: the iterable of batches is empty")
    return {
        "schema_version": SCHEMA_VERSION,
        "model": name,
        "context_length": context_length,
        "horizon": horizon,
        **{key: settings[key] for key in ("temperature", "top_k", "num_samples")},
        "seed": seed,
        "measured": "autoregressive",
        "device": str(device),
        "seconds": round(time.perf_counter() - started, 3),
        "versions": _versions(),
        "tasks": {task: _summary(sums) for task, sums in sorted(tasks.items())},
        OVERALL: _summary(_add_up(tasks.values())),
    }


def task_of(key: str) -> str:
    """Task that an episode's key names: all but its trailing parts of a number or a letter and a number.

    ``door-lock-s7-n030-00012`` is of ``door-lock``; keys that are nothing but numbers are all of one task, "clips".
    """
    stem = re.sub(r"((^|[-_/.])[a-z]?\d+)+$", "", key)
    return stem or "clips"


def _device_of(world_model: Any) -> torch.device:
    parameters: Iterator[Tensor] = world_model.parameters()
    return next(parameters).device


def _floats(video: Tensor) -> Tensor:
    return video if video.is_floating_point() else video.float() / 255


def _sample_values(prediction: Tensor, truth: Tensor, num_samples: int) -> dict[str, Tensor]:
    """Each metric (B, S, F) of the predicted future frames (B*S, F, C, H, W) against ``truth`` (B, F, C, H, W)."""
    samples = prediction.unflatten(0, (-1, num_samples))
    values = [frame_metrics(samples[:, sample], truth) for sample in range(num_samples)]
    return {metric: torch.stack([value[metric] for value in values], dim=1) for metric in METRICS}


def _add_rewards(
    tasks: dict[str, _Sums],
    names: list[str],
    batch: Mapping[str, Any],
    predicted: Tensor | None,
    num_samples: int,
    context_length: int,
    horizon: int,
) -> None:
    if predicted is None or "rewards" not in batch:
        return
    means = predicted.double().cpu().unflatten(0, (-1, num_samples)).mean(1)  # (B, F)
    true = batch["rewards"][:, context_length : context_length + horizon].double().cpu()
    for row, task in enumerate(names):
        tasks[task].true_rewards += true[row].tolist()
        tasks[task].predicted_rewards += means[row].tolist()


def _swap_actions(
    actions: Tensor,
    keys: list[str],
    names: list[str],
    donors: dict[str, list[tuple[str, Tensor]]],
    shuffler: random.Random,
) -> tuple[Tensor, list[bool]]:
    """Actions (B, T, A) of other episodes of each clip's task, and which clips such an episode was found for."""
    for row, task in enumerate(names):
        kept = donors[task]
        entry = (keys[row], actions[row].clone())
        if len(kept) < DONORS_KEPT:
            kept.append(entry)
        else:
            kept[shuffler.randrange(DONORS_KEPT)] = entry
    swapped, has_donor = actions.clone(), []
    for row, task in enumerate(names):
        others = [given for key, given in donors[task] if key != keys[row] and given.shape == actions[row].shape]
        has_donor.append(bool(others))
        if others:
            swapped[row] = shuffler.choice(others)
    return swapped, has_donor


def _add_up(parts: Iterable[_Sums]) -> _Sums:
    total = _Sums()
    for part in parts:
        total.clips += part.clips
        total.episodes |= part.episodes
        total.paired += part.paired
        total.true_rewards += part.true_rewards
        total.predicted_rewards += part.predicted_rewards
        for metric in METRICS:
            total.best[metric] += part.best[metric]
        for which, curves in part.curves.items():
            for metric, values in curves.items():
                total.add_curve(which, metric, values)
        for which, sums in part.followed.items():
            for metric, value in sums.items():
                total.add_followed(which, metric, value)
    return total


def _summary(sums: _Sums) -> dict[str, Any]:
    curves = {
        which: {metric: (values / sums.clips).tolist() for metric, values in by_metric.items()}
        for which, by_metric in sums.curves.items()
    }
    repeated = curves["repeat_last_frame"]
    return {
        "clips": sums.clips,
        "episodes": len(sums.episodes),
        "model": {metric: total / sums.clips for metric, total in sums.best.items()},
        "repeat_last_frame": {metric: sum(values) / len(values) for metric, values in repeated.items()},
        "curves": curves,
        "shuffled_actions": _following(sums),
        "reward": _reward_summary(sums.true_rewards, sums.predicted_rewards),
    }


def _following(sums: _Sums) -> dict[str, Any] | None:
    if not sums.paired:
        return None
    own, shuffled = (
        {metric: total / sums.paired for metric, total in sums.followed[which].items()} for which in ("own", "shuffled")
    )
    change = {metric: shuffled[metric] - own[metric] for metric in METRICS}
    ratio = shuffled["mse"] / own["mse"] if own["mse"] > 0 else None
    return {"clips": sums.paired, "own": own, "shuffled": shuffled, "change": change, "mse_ratio": ratio}


def _reward_summary(true: list[float], predicted: list[float]) -> dict[str, Any] | None:
    if not true:
        return None
    x, y = torch.tensor(true, dtype=torch.float64), torch.tensor(predicted, dtype=torch.float64)
    return {"frames": len(true), "pearson_r": pearson(x, y), "mse": float((x - y).square().mean())}


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Correlation of ``x`` and ``y`` (N,); None where one of them does not vary (or there are fewer than two)."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    # rounding leaves a constant with a tiny norm, whose direction means nothing
    if len(x) < 2 or not scale > 1e-12 * len(x):
        return None
    return max(-1.0, min(1.0, float(x @ y) / scale))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["ivideogpt"] = version("ivideogpt")
    except PackageNotFoundError:  # run from a source tree that is not installed
        found["ivideogpt"] = "unknown"
    return found


def write_results(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes ``result`` as JSON, whole or not at all: an older file stays until the new one is complete."""
    path = Path(path)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode is for its owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def format_table(result: Mapping[str, Any]) -> Table:
    """Table of a result: a row a task and one for all, the model beside repeating the last frame."""
    title = f"{result['model'] or 'world model'}: {result['horizon']} frames from {result['context_length']}"
    table = Table(title=title, caption=f"model / last frame repeated; seed {result['seed']}, {result['seconds']:.0f} s")
    table.add_column("task")
    for heading in ("clips", "PSNR dB", "SSIM", "MSE", "MSE, actions shuffled", "reward r"):
        table.add_column(heading, justify="right")
    rows = list(result["tasks"].items())
    for task, entry in rows + ([(OVERALL, result[OVERALL])] if len(rows) > 1 else []):
        model, repeated = entry["model"], entry["repeat_last_frame"]
        following, reward = entry["shuffled_actions"], entry["reward"]
        correlation = None if reward is None else reward["pearson_r"]
        table.add_row(
            task,
            str(entry["clips"]),
            f"{model['psnr']:.2f} / {repeated['psnr']:.2f}",
            f"{model['ssim']:.3f} / {repeated['ssim']:.3f}",
            f"{model['mse']:.5f} / {repeated['mse']:.5f}",
            "-" if following is None else f"{following['shuffled']['mse']:.5f} ({_times(following['mse_ratio'])})",
            "-" if correlation is None else f"{correlation:.3f}",
        )
    return table


def _times(ratio: float | None) -> str:
    return "-" if ratio is None or not math.isfinite(ratio) else f"x{ratio:.2f}"
