"""What an evaluation shows in the terminal: its progress, the protocol, tables of the result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ivideogpt.metrics.judges import HIGHER_IS_BETTER, LABELS
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.results import OVERALL


def protocol_table(protocol: EvaluationProtocol) -> Table:
    """The protocol as a person reads it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in protocol.rows():
        table.add_row(name, text)
    return table


def result_table(result: Mapping[str, Any]) -> Table:
    """A row a metric: the model with deviation and interval, the mean of its samples, the last frame repeated."""
    protocol, overall = result["protocol"], result[OVERALL]
    samples, runs = protocol["num_samples"], protocol["runs"]
    title = f"{result['model'] or 'world model'}: {protocol['horizon']} frames from {protocol['context_length']}"
    caption = f"protocol {protocol['name']}, {overall['clips']} clips, {runs} run{'s' * (runs > 1)}, "
    caption += f"seed {result['seed']}, {result['seconds']:.0f} s"
    table = Table(title=title, caption=caption)
    table.add_column("metric")
    table.add_column(f"best of {samples}" if samples > 1 else "model", justify="right")
    for heading in ("± runs", "95 % over videos", "mean of samples", "last frame", "actions of another clip"):
        table.add_column(heading, justify="right")
    following = overall["shuffled_actions"]
    for metric, value in overall["model"].items():
        arrow = "↑" if HIGHER_IS_BETTER.get(metric, False) else "↓"
        deviation, ends = overall["std_over_runs"].get(metric), overall["interval"].get(metric)
        shuffled = None if following is None else following["shuffled"].get(metric)
        table.add_row(
            f"{LABELS.get(metric, metric)} {arrow}",
            number(metric, value),
            "-" if deviation is None else number(metric, deviation),
            "-" if ends is None else f"{number(metric, ends[0])} to {number(metric, ends[1])}",
            number(metric, overall["mean_of_samples"].get(metric)),
            number(metric, overall["repeat_last_frame"].get(metric)),
            number(metric, shuffled),
        )
    return table


def task_table(result: Mapping[str, Any]) -> Table | None:
    """A row a task, the model beside repeating the last frame; None where there is one task."""
    if len(result["tasks"]) < 2:
        return None
    metrics = list(next(iter(result["tasks"].values()))["model"])
    table = Table(caption="model / last frame repeated")
    table.add_column("task")
    for heading in ("clips", *(LABELS.get(metric, metric) for metric in metrics), "MSE, other actions", "reward r"):
        table.add_column(heading, justify="right")
    for task, entry in result["tasks"].items():
        following, reward = entry["shuffled_actions"], entry["reward"]
        correlation = None if reward is None else reward["pearson_r"]
        table.add_row(
            task,
            str(entry["clips"]),
            *(
                f"{number(metric, entry['model'][metric])} / {number(metric, entry['repeat_last_frame'].get(metric))}"
                for metric in metrics
            ),
            "-" if following is None else f"{following['shuffled']['mse']:.5f} ({times(following['mse_ratio'])})",
            "-" if correlation is None else f"{correlation:.3f}",
        )
    return table


def number(metric: str, value: float | None) -> str:
    """A value with the digits that a metric deserves."""
    if value is None:
        return "-"
    digits = {"psnr": 2, "ssim": 4, "lpips": 4, "mse": 5}.get(metric, 1)
    return f"{value:.{digits}f}"


def times(ratio: float | None) -> str:
    """A factor, or a dash."""
    return "-" if ratio is None or not math.isfinite(ratio) else f"x{ratio:.2f}"


@contextlib.contextmanager
def watching(console: Console | None) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar with the time that is left, to be given to an evaluation; nothing without a console."""
    if console is None:
        yield None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task: Any = None

        def watch(done: int, total: int) -> None:
            nonlocal task
            if task is None:  # what was finished before must not count for the speed
                task = progress.add_task("evaluate", total=total, completed=done)
            else:
                progress.update(task, completed=done)

        yield watch
