"""The doctor's page: findings, film strips, histograms of actions and rewards and the lag curve, in one HTML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from ivideogpt.charts import data_uri
from ivideogpt.data.doctor import LAGS, Finding, Reading, lag_curve
from ivideogpt.data.reader import ShardSet
from ivideogpt.drawing import png_bytes

STRIPS = 8
"""Episodes that are shown: those that findings are about, then others evenly spread."""
STRIP_FRAMES, STRIP_HEIGHT = 10, 72
BINS, BAR = 32, 6
SAMPLED = 200
"""Episodes whose actions and rewards are in the histograms."""


def render_page(
    name: str, looked: str, findings: Sequence[Finding], readings: Sequence[Reading], shards: ShardSet
) -> str:
    """The page as HTML without anything from outside of it.

    Args:
        name: Of the set.
        looked: How many episodes were looked at, in words.
        findings: The worst first.
        readings: Of the episodes of `shards`.
        shards: The set that was looked at.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("ivideogpt").joinpath("assets/doctor.html.j2").read_text("utf-8"))
    number_of = {shards.key(index): index for index in range(len(shards))}
    return template.render(
        name=name,
        looked=looked,
        findings=findings,
        sources=_sources(readings),
        strips=_strips(findings, readings, shards, number_of),
        histograms=_histograms(readings, shards, number_of),
        lags=_curve(readings),
        bar=BAR,
    )


def _sources(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    rows = []
    for source, count in sorted(Counter(reading.source for reading in readings).items()):
        mine = [reading for reading in readings if reading.source == source]
        lengths = np.array([reading.frames for reading in mine])
        rows.append(
            {
                "source": source or "unnamed",
                "episodes": count,
                "frames": f"{lengths.sum()}",
                "lengths": f"{lengths.min()} / {np.median(lengths):g} / {lengths.max()}",
                "fps": ", ".join(f"{fps:g}" for fps in sorted({reading.fps for reading in mine})),
                "resolution": ", ".join(f"{h} x {w}" for h, w in sorted({reading.resolution for reading in mine})),
            }
        )
    return rows


def _strips(
    findings: Sequence[Finding], readings: Sequence[Reading], shards: ShardSet, number_of: dict[str, int]
) -> list[dict[str, str]]:
    reasons: dict[str, str] = {}
    for finding in findings:
        for key in finding.keys[:2]:
            if key in number_of:
                reasons.setdefault(key, finding.check)
    spread = [readings[i].key for i in np.linspace(0, len(readings) - 1, min(STRIPS, len(readings))).astype(int)]
    strips = []
    for key in [*reasons, *(key for key in dict.fromkeys(spread) if key not in reasons)][:STRIPS]:
        record = shards.record(number_of[key])
        if record is None:
            continue
        try:
            frames = record.frames(np.linspace(0, len(record) - 1, STRIP_FRAMES).round().astype(int))
        except ValueError:  # it is among the findings already
            continue
        caption = f"{key}: {len(record)} frames"
        strips.append({"caption": caption, "reason": reasons.get(key, ""), "image": _strip(frames)})
    return strips


def _strip(frames: np.ndarray) -> str:
    """Frames (T, H, W, 3) side by side, as a PNG in a data address."""
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    width = round(strip.width * STRIP_HEIGHT / strip.height)
    content = png_bytes(strip.resize((width, STRIP_HEIGHT), Image.Resampling.BILINEAR))
    return data_uri(content, "image/png")


def _histograms(readings: Sequence[Reading], shards: ShardSet, number_of: dict[str, int]) -> list[dict[str, Any]]:
    """Bars of each action dimension and of the rewards, over some evenly spread episodes."""
    chosen = np.linspace(0, len(readings) - 1, min(SAMPLED, len(readings))).astype(int)
    records = [shards.record(number_of[readings[i].key]) for i in chosen]
    tensors = [record.tensors for record in records if record is not None]
    actions = [found["actions"][:-1] for found in tensors if "actions" in found]
    columns: list[tuple[str, np.ndarray]] = []
    if actions and len({rows.shape[1] for rows in actions}) == 1:
        columns += [(f"action {i}", column) for i, column in enumerate(np.concatenate(actions).T)]
    rewards = [found["rewards"][1:] for found in tensors if "rewards" in found]
    columns += [("reward", np.concatenate(rewards))] if rewards else []
    found = []
    for title, values in columns:
        if not len(values):
            continue
        counts, edges = np.histogram(values, BINS)
        heights = (60 * np.sqrt(counts / counts.max())).round(1).tolist()  # roots, so that rare values can be seen
        found.append({"title": title, "low": f"{edges[0]:.3g}", "high": f"{edges[-1]:.3g}", "heights": heights})
    return found


def _curve(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """Bars of the lag curve; none where there is nothing to correlate."""
    curve = lag_curve(readings)
    if not np.isfinite(curve).all():
        return []
    best = int(curve.argmax())
    return [
        {"lag": f"{lag:+d}" if lag else "0", "value": f"{value:.2f}", "height": round(90 * max(float(value), 0), 1),
         "best": index == best}
        for index, (lag, value) in enumerate(zip(LAGS, curve, strict=True))
    ]  # fmt: skip
