"""The demo's report: one self-contained HTML page with rollouts, reward curves and a table of scores.

Pictures are data URIs and charts are inline SVG coloured by the page's CSS variables, so the file can be mailed
around and follows the reader's light or dark setting.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ivideogpt.charts import Series, data_uri, line_chart
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
