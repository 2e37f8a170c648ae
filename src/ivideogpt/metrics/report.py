"""The evaluation's report: one self-contained HTML page with intervals, drift, videos, futures and entropy maps.

Pictures are data URIs, charts are inline SVG, nothing is fetched and nothing runs; the page follows the reader's light
or dark setting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ivideogpt.charts import Series, data_uri, interval_chart, line_chart
from ivideogpt.drawing import gif_bytes, png_bytes, replace_file
from ivideogpt.metrics.examples import Examples, ShownVideo
from ivideogpt.metrics.judges import HIGHER_IS_BETTER, LABELS
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.results import OVERALL
from ivideogpt.metrics.terminal import number, signed, times

ERROR_GAIN = 3
"""A good prediction's error is hard to see at its true brightness."""
HEAT = ((13, 8, 60), (110, 20, 120), (205, 60, 80), (250, 155, 50), (252, 245, 160))
"""Colours of an entropy map, from sure to unsure; they grow lighter, so that grey tells them apart too."""
CELL = 64
"""Pixels of a frame in an entropy map."""


def write_report(result: Mapping[str, Any], examples: Examples | None, path: str | os.PathLike[str]) -> None:
    """Renders the page and writes it; an older file stays whole until the new one is complete.

    Args:
        result: of the evaluation.
        examples: videos; None leaves them out.
        path: of the file.
    """
    replace_file(Path(path), render(result, examples).encode())


def render(result: Mapping[str, Any], examples: Examples | None = None) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    protocol = EvaluationProtocol(**{**result["protocol"], "metrics": tuple(result["protocol"]["metrics"])})
    return environment.get_template("evaluation.html.j2").render(
        title=result["model"] or "World model",
        lead=_lead(result),
        facts=_facts(result, protocol),
        rows=[_row(result, metric) for metric in result[OVERALL]["model"]],
        samples=protocol.num_samples,
        tasks=_tasks(result),
        curves=_curves(result[OVERALL]),
        best=[] if examples is None else [_card(video, examples.metric) for video in examples.best],
        worst=[] if examples is None else [_card(video, examples.metric) for video in examples.worst],
        by=None if examples is None else LABELS[examples.metric].split(",")[0],
        futures=None if examples is None else _futures(examples.median),
        entropy=_entropy_cards(examples, protocol),
        heat=", ".join(f"rgb{colour}" for colour in HEAT),
        error_gain=ERROR_GAIN,
        missing=result["missing"],
        notes=result["notes"],
        explanation=_explanation(result.get("explanation")),
        protocol=protocol.rows(),
        hashes=_hashes(result["hashes"]),
        command=result.get("command"),
    )


def _lead(result: Mapping[str, Any]) -> str:
    overall, protocol = result[OVERALL], result["protocol"]
    metric = next(iter(overall["model"]))
    value, last = overall["model"][metric], overall["repeat_last_frame"].get(metric)
    label = LABELS.get(metric, metric).split(",")[0]
    unit = " dB" if metric == "psnr" else ""
    text = f"Predicting {protocol['horizon']} frames from {protocol['context_length']} on {overall['clips']} "
    text += f"clips: {label} {number(metric, value)}{unit}"
    if metric in overall["interval"]:
        low, high = overall["interval"][metric]
        text += f" (95 % of bootstraps over episodes: {number(metric, low)} to {number(metric, high)})"
    if last is not None:
        better = (value > last) == HIGHER_IS_BETTER[metric]
        text += (
            f", {number(metric, abs(value - last))}{unit} {'better' if better else 'worse'} than repeating the last "
        )
        text += "frame"
    return text + "."


def _facts(result: Mapping[str, Any], protocol: EvaluationProtocol) -> list[tuple[str, str]]:
    named = protocol.name if protocol.base is None else f"{protocol.name}, made of {protocol.base}"
    sampling = "argmax" if protocol.greedy else (
        f"{protocol.num_samples} a clip, temperature {protocol.temperature:g}, top-k {protocol.top_k or 'off'}"
    )  # fmt: skip
    return [
        ("Protocol", named),
        ("Futures", sampling),
        ("Runs", f"{protocol.runs}, seed {result['seed']}"),
        ("Recordings", ", ".join(result["hashes"]["data"])),
        ("Time", f"{result['seconds']:.0f} s on {result['device']}"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in result["versions"].items())),
        ("Written", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())),
    ]


def _row(result: Mapping[str, Any], metric: str) -> dict[str, Any]:
    overall = result[OVERALL]
    value, last = overall["model"][metric], overall["repeat_last_frame"].get(metric)
    ends, deviation = overall["interval"].get(metric), overall["std_over_runs"].get(metric)
    following = overall["shuffled_actions"]
    changed = None if following is None else following["change"].get(metric)
    span = "" if following is None or changed is None else " to ".join(
        signed(metric, end) for end in following["change_interval"][metric]
    )  # fmt: skip
    up = HIGHER_IS_BETTER.get(metric, False)
    return {
        "label": f"{LABELS.get(metric, metric)} {'↑' if up else '↓'}",
        "value": number(metric, value),
        "deviation": "" if deviation is None else f"± {number(metric, deviation)}",
        "interval": "" if ends is None else f"{number(metric, ends[0])} – {number(metric, ends[1])}",
        "chart": "" if ends is None else interval_chart(value, ends[0], ends[1], last, f"{metric} with its interval"),
        "mean": number(metric, overall["mean_of_samples"].get(metric)),
        "last": number(metric, last),
        "win": last is not None and (value > last) == up and value != last,
        "changed": "-" if changed is None else signed(metric, changed),
        "changed_interval": span,
    }


def _tasks(result: Mapping[str, Any]) -> dict[str, Any] | None:
    if len(result["tasks"]) < 2:
        return None
    metrics = list(next(iter(result["tasks"].values()))["model"])
    prefix = _common_folder(list(result["tasks"]))
    rows = []
    for task, entry in result["tasks"].items():
        following, reward = entry["shuffled_actions"], entry["reward"]
        correlation = None if reward is None else reward["pearson_r"]
        rows.append(
            {
                "task": task.removeprefix(prefix),
                "clips": entry["clips"],
                "values": [
                    {
                        "model": number(m, entry["model"][m]),
                        "last": number(m, entry["repeat_last_frame"][m]),
                        "win": (entry["model"][m] > entry["repeat_last_frame"][m]) == HIGHER_IS_BETTER[m]
                        and entry["model"][m] != entry["repeat_last_frame"][m],
                    }
                    for m in metrics
                ],
                "ratio": "-" if following is None else times(following["mse_ratio"]),
                "reward": "-" if correlation is None else f"{correlation:.2f}",
            }
        )
    return {"metrics": [LABELS.get(metric, metric) for metric in metrics], "rows": rows}


def _common_folder(names: Sequence[str]) -> str:
    """What all names begin with, up to a slash."""
    shared = ""
    for level in zip(*(name.split("/")[:-1] for name in names), strict=False):
        if len(set(level)) > 1:
            break
        shared += f"{level[0]}/"
    return shared


def _curves(overall: Mapping[str, Any]) -> list[dict[str, str]]:
    curves, found = overall["curves"], []
    for metric, values in curves["model"].items():
        scale = 1000 if metric == "mse" else 1
        model, last = (
            [(float(i + 1), scale * value) for i, value in enumerate(line)]
            for line in (values, curves["repeat_last_frame"][metric])
        )
        low, high = curves["interval"][metric]
        band = [(float(i + 1), scale * a, scale * b) for i, (a, b) in enumerate(zip(low, high, strict=True))]
        series = [Series("last frame repeated", last, "truth"), Series("model", model, "prediction", band)]
        label = LABELS.get(metric, metric) + (" × 1000" if scale > 1 else "")
        found.append({"label": label, "chart": line_chart(series, "predicted frame", 380, 190)})
    return found


def _card(video: ShownVideo, metric: str) -> dict[str, Any]:
    error = np.abs(video.truth.astype(np.int16) - video.samples[0]) * ERROR_GAIN
    columns = [video.truth, video.samples[0], error.clip(0, 255).astype(np.uint8)]
    unit = " dB" if metric == "psnr" else ""
    return {
        "name": f"{video.key}, frame {video.start} on",
        "source": video.source,
        "score": f"{number(metric, video.values[metric])}{unit}",
        "last": f"{number(metric, video.last_frame[metric])}{unit}",
        "others": ", ".join(
            f"{LABELS[m].split(',')[0]} {number(m, value)}" for m, value in video.values.items() if m != metric
        ),
        "gif": data_uri(gif_bytes(np.concatenate(columns, axis=2)), "image/gif"),
    }


def _futures(video: ShownVideo) -> dict[str, Any] | None:
    """Several futures of one clip: an animation of all, and how far they are apart in the end."""
    if len(video.samples) < 2:
        return None
    spread = video.samples[:, -1].astype(np.float64).std(0).mean(-1)
    share = spread / max(spread.max(), 1e-9)
    heat = _coloured(share)
    return {
        "name": f"{video.key}, frame {video.start} on",
        "gif": data_uri(gif_bytes(np.concatenate([video.truth, *video.samples], axis=2)), "image/gif"),
        "strip": data_uri(
            png_bytes(np.concatenate([video.truth[-1], *video.samples[:, -1], heat], axis=1)), "image/png"
        ),
        "count": len(video.samples),
        "spread": f"{spread.max() / 255:.2f}",
    }


def _entropy_cards(examples: Examples | None, protocol: EvaluationProtocol) -> dict[str, Any] | None:
    """Entropy maps over the predicted frames: of the best, the middle and the worst video, on one scale."""
    if examples is None:
        return None
    videos = [("best", examples.best[0]), ("middle", examples.median), *(("worst", one) for one in examples.worst[:1])]
    known = [(name, video, video.entropy) for name, video in videos if video.entropy is not None]
    if not known:
        return None
    top = max(float(entropy.max()) for _, _, entropy in known) or 1.0
    t0 = protocol.context_length or 0
    cards = []
    for name, video, entropy in known:
        rows = []
        for frame, bits in zip(video.samples[0][t0:], entropy, strict=True):
            picture = np.asarray(Image.fromarray(frame).resize((CELL, CELL), Image.Resampling.BILINEAR))
            cells = np.asarray(Image.fromarray(_coloured(bits / top)).resize((CELL, CELL), Image.Resampling.NEAREST))
            grey = picture.mean(-1, keepdims=True).repeat(3, axis=-1)
            rows.append(np.concatenate([picture, (0.35 * grey + 0.65 * cells).astype(np.uint8)], axis=0))
        cards.append(
            {
                "name": name,
                "key": f"{video.key}, frame {video.start} on",
                "strip": data_uri(png_bytes(np.concatenate(rows, axis=1)), "image/png"),
                "mean": f"{entropy.mean():.1f}",
                "frames": [f"{bits.mean():.1f}" for bits in entropy],
            }
        )
    return {"cards": cards, "top": f"{top:.1f}"}


def _coloured(share: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as colours, uint8 (..., 3)."""
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(share, stops, [colour[channel] for colour in HEAT]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _explanation(explanation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if explanation is None:
        return None
    metrics = list(dict.fromkeys(metric for row in explanation["rows"] for metric in row["values"]))
    rows, reason = [], None
    for row in explanation["rows"]:
        cells: Sequence[str] = [
            f"{number(m, row['values'][m][0])} → {number(m, row['values'][m][1])}" if m in row["values"] else ""
            for m in metrics
        ]
        rows.append(
            {"reason": "" if row["reason"] == reason else row["reason"], "change": row["change"], "cells": cells}
        )
        reason = row["reason"]
    return {
        "metrics": [LABELS.get(metric, metric) for metric in metrics],
        "rows": rows,
        "videos": explanation["videos"],
        "samples": explanation["samples"],
        "not_computed": explanation["not_computed"],
    }


def _hashes(hashes: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("model", hashes["model"] or "-")]
    rows += [
        (f"{name}, {shard}", digest) for name, shards in hashes["data"].items() for shard, digest in shards.items()
    ]
    return rows + [(f"network {name}", digest) for name, digest in hashes["networks"].items()]
