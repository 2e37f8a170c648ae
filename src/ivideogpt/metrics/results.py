"""The result of an evaluation: summed up from the journal, written whole or not at all, read with its schema checked.

R runs, N videos, S samples, F predicted frames, M metrics. Values of videos are float64 and are summed in the order of
the videos, whatever order they were measured in.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ivideogpt.metrics.bootstrap import interval, num_episodes
from ivideogpt.metrics.frechet_results import frechet_summary
from ivideogpt.metrics.journal import Journal
from ivideogpt.metrics.judges import HIGHER_IS_BETTER, Judges
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.rollouts import RewardAccuracy

SCHEMA_VERSION = 2
"""1 had one run, no protocol and no values of single videos."""

OVERALL = "overall"
DIGITS = 7
"""Significant digits of a single video's values: what float32 can tell."""


def assemble(
    kept: Journal, protocol: EvaluationProtocol, judges: Judges, places: Sequence[tuple[str, str, int]]
) -> dict[str, Any]:
    """Sums up what the journal holds: what is missing, tasks, overall, and the values of each video."""
    metrics = [name for name in (*protocol.metrics, *judges.frames) if name in judges.frames]
    metrics = list(dict.fromkeys(metrics))
    runs, videos = range(protocol.runs), range(len(places))
    values = _Values([[kept.records[run, video] for video in videos] for run in runs], metrics)
    by_task: dict[str, list[int]] = {}
    for number, (_, source, _) in enumerate(places):
        by_task.setdefault(source, []).append(number)
    tasks = {task: _summary(values, by_task[task]) for task in sorted(by_task)}
    overall = tasks[next(iter(tasks))] if len(tasks) == 1 else _summary(values, list(videos))
    overall = copy.deepcopy(overall)  # it gets the FVD, which the only task must not
    notes = []
    still = sum(bool(record.get("still")) for record in values.records[0])
    if still:
        notes.append(
            f"{still} of {len(places)} clips do not move at all: repeating the last frame is perfect there, "
            f"which PSNR counts as 100 dB"
        )
    episodes = num_episodes([key for key, _, _ in places])
    if episodes < 30:
        notes.append(f"an interval over {episodes} episodes is itself uncertain")
    if protocol.greedy:
        notes.append("argmax draws nothing: one sample and one run stand for all")
    if judges.features is not None:
        distance = frechet_summary(kept, protocol, judges, len(places), notes)
        overall["fvd" if judges.features.is_reference else "distance_of_other_features"] = distance
        if distance is not None and judges.features.is_reference:
            overall["model"]["fvd"], overall["runs"]["fvd"] = distance["value"], distance["runs"]
            overall["std_over_runs"]["fvd"] = distance["std_over_runs"]
    return {
        "missing": dict(judges.missing),
        "notes": notes,
        "tasks": tasks,
        OVERALL: overall,
        "videos": [values.video(number, place) for number, place in enumerate(places)],
    }


class _Values:
    """The journal's numbers as arrays.

    Attributes:
        records: by run, then video.
        best: metric -> (R, N), the best sample.
        mean: metric -> (R, N), the mean over samples.
        curve: metric -> (R, N, F), means over samples.
        repeat: metric -> (N, F).
    """

    def __init__(self, records: list[list[dict[str, Any]]], metrics: list[str]) -> None:
        self.records, self.metrics = records, metrics
        samples = {m: np.array([[record["samples"][m] for record in run] for run in records]) for m in metrics}
        self.best = {m: v.max(2) if HIGHER_IS_BETTER[m] else v.min(2) for m, v in samples.items()}
        self.mean = {m: v.mean(2) for m, v in samples.items()}
        self.curve = {m: np.array([[record["curve"][m] for record in run] for run in records]) for m in metrics}
        self.repeat = {m: np.array([record["repeat"][m] for record in records[0]]) for m in metrics}

    def video(self, number: int, place: tuple[str, str, int]) -> dict[str, Any]:
        """One video's values: metric -> a value each run."""
        key, source, start = place
        row: dict[str, Any] = {"key": key, "source": source, "start": start}
        row["best"] = {m: [_rounded(v) for v in self.best[m][:, number]] for m in self.metrics}
        if len(self.records[0][0]["samples"][self.metrics[0]]) > 1:
            row["mean"] = {m: [_rounded(v) for v in self.mean[m][:, number]] for m in self.metrics}
        row["repeat_last_frame"] = {m: _rounded(self.repeat[m][number].mean()) for m in self.metrics}
        return row


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _summary(values: _Values, numbers: list[int]) -> dict[str, Any]:
    """What is said of some of the videos."""
    metrics, runs = values.metrics, len(values.records)
    best = {m: values.best[m][:, numbers] for m in metrics}  # (R, N)
    curves = {m: values.curve[m][:, numbers].mean(0) for m in metrics}  # (N, F)
    repeated = {m: values.repeat[m][numbers] for m in metrics}
    episodes = [values.records[0][number]["key"] for number in numbers]
    wanted = np.concatenate([np.stack([best[m].mean(0) for m in metrics], 1), *curves.values()], axis=1)
    ends = interval(wanted, episodes=episodes)
    frames = curves[metrics[0]].shape[1]
    low_high = {m: ends[:, len(metrics) + i * frames : len(metrics) + (i + 1) * frames] for i, m in enumerate(metrics)}
    records = [[run[number] for number in numbers] for run in values.records]
    return {
        "clips": len(numbers),
        "episodes": num_episodes(episodes),
        "model": {m: float(best[m].mean()) for m in metrics},
        "std_over_runs": {m: float(best[m].mean(1).std(ddof=1)) if runs > 1 else None for m in metrics},
        # of one episode nothing is known of others
        "interval": {m: ends[:, i].tolist() for i, m in enumerate(metrics)} if num_episodes(episodes) > 1 else {},
        "runs": {m: best[m].mean(1).tolist() for m in metrics},
        "mean_of_samples": {m: float(values.mean[m][:, numbers].mean()) for m in metrics},
        "repeat_last_frame": {m: float(repeated[m].mean()) for m in metrics},
        "curves": {
            "model": {m: curves[m].mean(0).tolist() for m in metrics},
            "interval": {m: low_high[m].tolist() for m in metrics},
            "repeat_last_frame": {m: repeated[m].mean(0).tolist() for m in metrics},
        },
        "shuffled_actions": _following(records, metrics),
        "reward": _rewards(records),
        "tokens": _tokens(records[0]),
    }


def _following(records: list[list[dict[str, Any]]], metrics: list[str]) -> dict[str, Any] | None:
    rows = [number for number, record in enumerate(records[0]) if record["shuffled"] is not None]
    if not rows:
        return None
    pairs = np.array([[[run[number]["shuffled"][m] for m in metrics] for number in rows] for run in records])
    pairs = pairs.mean(0)  # (N, M, 2)
    own, shuffled = ({m: float(pairs[:, i, which].mean()) for i, m in enumerate(metrics)} for which in (0, 1))
    ends = interval(pairs[..., 1] - pairs[..., 0], episodes=[records[0][number]["key"] for number in rows])
    return {
        "clips": len(rows),
        "own": own,
        "shuffled": shuffled,
        "change": {m: shuffled[m] - own[m] for m in metrics},
        "change_interval": {m: ends[:, i].tolist() for i, m in enumerate(metrics)},
        "mse_ratio": shuffled["mse"] / own["mse"] if own["mse"] > 0 else None,
    }


def _rewards(records: list[list[dict[str, Any]]]) -> dict[str, Any] | None:
    given = [record["rewards"] for run in records for record in run if record.get("rewards")]
    if not given:
        return None
    accuracy = RewardAccuracy(sync_on_compute=False)  # the journal holds what all processes have seen
    for one in given:
        accuracy.update(*(torch.tensor(one[which], dtype=torch.float64) for which in ("predicted", "true")))
    found = {name: float(value) for name, value in accuracy.compute().items()}
    return {
        "frames": sum(len(record["rewards"]["true"]) for record in records[0] if record.get("rewards")),
        "pearson_r": None if math.isnan(found["pearson_r"]) else found["pearson_r"],
        "mse": found["mse"],
    }


def _tokens(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    given = [record["tokens"] for record in records if "tokens" in record]
    if not given:
        return None
    loss = sum(one["loss"] for one in given) / max(1, sum(one["count"] for one in given))
    return {
        "perplexity": math.exp(min(loss, 700.0)),
        "context_entries_used": len({entry for one in given for entry in one["context"]}),
        "dynamics_entries_used": len({entry for one in given for entry in one["dynamics"]}),
    }


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    found = {"python": platform.python_version()}
    for name in ("ivideogpt", "torch", "torchmetrics", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "unknown"
    return found


def write_results(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes ``result`` as JSON, whole or not at all: an older file stays until the new one is complete."""
    path = Path(path)
    head = json.dumps({k: v for k, v in result.items() if k != "videos"}, indent=2, allow_nan=False)
    if "videos" in result:  # one line a video
        rows = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in result["videos"])
        head = head.removesuffix("\n}") + f',\n  "videos": [\n{rows}\n  ]\n}}'
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(head + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode is for its owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The result of an evaluation from its file.

    Raises:
        ValueError: if it is no such file, or one of another schema.
        OSError: if it cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{path} is no result of `ivideogpt evaluate`: it is not JSON ({error})") from error
    if not isinstance(found, dict) or "schema_version" not in found:
        raise ValueError(f"{path} is no result of `ivideogpt evaluate`: it has no schema_version")
    number = found["schema_version"]
    if number != SCHEMA_VERSION:
        what = "an older" if isinstance(number, int) and number < SCHEMA_VERSION else "another"
        raise ValueError(
            f"{path} has {what} results schema ({number}; this version writes {SCHEMA_VERSION}), which does not hold "
            f"its protocol and the values of each video: measure again with `ivideogpt evaluate`"
        )
    for name, kind in (("protocol", dict), ("videos", list), (OVERALL, dict), ("tasks", dict)):
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{path} is damaged: it has no {name!r}")
    try:
        _check_sums(found)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged or was changed: {error}") from error
    return found


def _check_sums(found: Mapping[str, Any]) -> None:
    """Raises ValueError where what is said of all videos is not what the videos give."""
    hashes = found["hashes"]
    _ = [dict(hashes["networks"]), {name: dict(shards) for name, shards in hashes["data"].items()}]
    for video in found["videos"]:
        _ = (str(video["key"]), int(video["start"]))
    for metric, value in found[OVERALL]["model"].items():
        if metric not in found["videos"][0]["best"]:
            continue  # of all videos together
        values = np.array([video["best"][metric] for video in found["videos"]], np.float64)
        if not np.isfinite(values).all() or not math.isclose(values.mean(), value, rel_tol=1e-5, abs_tol=1e-9):
            raise ValueError(f"{metric} is {value} for all videos, and the videos give {values.mean():.7g}")
