"""The demo's report: one self-contained HTML page with rollouts, reward curves and a table of scores.

Pictures are data URIs and charts are inline SVG coloured by the page's CSS variables, so the file can be mailed
around and follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ivideogpt.drawing import gif_bytes, png_bytes


@dataclass(frozen=True)
class Example:
    """One rollout beside its recording.

    `truth` and `prediction` are uint8 (T, H, W, 3), the first `context_length` frames are given, not predicted;
    `true_rewards` and `predicted_rewards` are (T,) and (T - context_length,), or None.
    """

    task: str
    name: str
    truth: np.ndarray
    prediction: np.ndarray
    context_length: int
    psnr: float
    baseline_psnr: float
    true_rewards: np.ndarray | None = None
    predicted_rewards: np.ndarray | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table: a task's scores by method, `scores[method][metric]`."""

    task: str
    episodes: int
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """A column group of the table."""

    key: str
    label: str
    digits: int
    higher_is_better: bool
    scale: float = 1.0  # the score is multiplied by it


METRICS = (
    Metric("psnr", "PSNR, dB", 2, True),
    Metric("ssim", "SSIM", 3, True),
    Metric("mse", "MSE × 1000", 2, False, 1000.0),
)

ERROR_GAIN = 3  # a good prediction's error is hard to see at its true brightness


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    title: str
    summary: str
    facts: Sequence[tuple[str, str]]  # (name, value) pairs in the header
    methods: Sequence[str]  # columns of the table, the baseline first
    rows: Sequence[Row]
    examples: Sequence[Example]
    notes: Sequence[str] = ()  # below the table: protocol and what the columns are
    checks: Sequence[Sequence[str]] = ()  # a second table as text, its heading row first
    loss: Sequence[tuple[float, float]] = ()  # (update, training loss)
    commands: Sequence[tuple[str, str]] = ()  # (what it does, the command or code)


def write_report(report: Report, path: Path) -> None:
    """Renders the page and writes it; an older file stays whole until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(render(report))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def render(report: Report) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2")
    return page.render(
        report=report,
        metrics=METRICS,
        best=best,
        error_gain=ERROR_GAIN,
        cards=[_card(example) for example in report.examples],
        loss_chart=line_chart([Series("training loss", report.loss, "prediction")], "update", 960, 200),
    )


def best(row: Row, metric: Metric) -> str:
    """The method that wins a metric on a task."""
    order = max if metric.higher_is_better else min
    return order(row.scores, key=lambda method: row.scores[method][metric.key])


def _card(example: Example) -> dict[str, object]:
    """What the template needs of an example: its pictures as data URIs and its reward chart."""
    chart = ""
    if example.true_rewards is not None and example.predicted_rewards is not None:
        t0 = example.context_length
        truth = [(float(t), float(reward)) for t, reward in enumerate(example.true_rewards)]
        predicted = [(float(t0 + i), float(reward)) for i, reward in enumerate(example.predicted_rewards)]
        chart = line_chart([Series("true", truth, "truth"), Series("predicted", predicted, "prediction")], "frame")
    error = np.abs(example.truth.astype(np.int16) - example.prediction) * ERROR_GAIN
    rows = [example.truth, example.prediction, error.clip(0, 255).astype(np.uint8)]
    # Plain pixels: the page enlarges and captions them.
    return {
        "example": example,
        "gif": data_uri(gif_bytes(np.concatenate(rows, axis=2)), "image/gif"),
        "strip": data_uri(png_bytes(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])), "image/png"),
        "frames": len(example.truth),
        "rewards": chart,
    }


def data_uri(content: bytes, kind: str) -> str:
    """The content as something that an `src` attribute can hold."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Series:
    """A line of a chart; `role` names its CSS class."""

    name: str
    points: Sequence[tuple[float, float]]
    role: str


@dataclass(frozen=True)
class _Scale:
    """Maps values linearly to pixels."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...] = field(default=())

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(series: Sequence[Series], x_label: str, width: int = 420, height: int = 150) -> str:
    """An SVG of lines over a light grid, with the points' values as tooltips."""
    points = [point for one in series for point in one.points if all(math.isfinite(value) for value in point)]
    if not points:
        return ""
    left, right, top, bottom = 44, 8, 8, 30
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    x = _Scale(x_low, max(x_high, x_low + 1), left, width - right, x_ticks)
    y = _Scale(y_ticks[0], y_ticks[-1], height - bottom, top, y_ticks)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{x_label}">']
    for value in y.ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    for value in x.ticks:
        if x.low <= value <= x.high:
            parts.append(
                f'<text class="tick" x="{x(value):.1f}" y="{height - 16}" text-anchor="middle">{value:g}</text>'
            )
    middle = (left + width - right) / 2
    parts.append(f'<text class="label" x="{middle:.0f}" y="{height - 3}" text-anchor="middle">{x_label}</text>')
    for one in series:
        places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in one.points if math.isfinite(a) and math.isfinite(b))
        parts.append(f'<polyline class="line {one.role}" points="{places}"/>')
        for a, b in one.points if len(one.points) <= 40 else ():
            if math.isfinite(a) and math.isfinite(b):
                title = f"<title>{one.name}, {x_label} {a:g}: {b:.3g}</title>"
                parts.append(f'<circle class="dot {one.role}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5">{title}</circle>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> tuple[float, ...]:
    """Round values around `low`..`high`, about `count` steps of 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if step * factor * count >= high - low)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 10) for index in range(first, last + 1))
