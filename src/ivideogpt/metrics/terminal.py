"""What an evaluation shows in the terminal: its progress, the protocol, tables of the result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ivideogpt.metrics.comparison import Difference
from ivideogpt.metrics.judges import HIGHER_IS_BETTER, LABELS
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.results import OVERALL


def protocol_table(protocol: EvaluationProtocol) -> Table:
    """The protocol as a person reads it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in protocol.rows():
        table.add_row(name, escape(str(text)))
    return table


def result_table(result: Mapping[str, Any]) -> Table:
    """A row a metric: the model with deviation and interval, the mean of its samples, the last frame repeated."""
    protocol, overall = result["protocol"], result[OVERALL]
    samples, runs = protocol["num_samples"], protocol["runs"]
    title = f"{result['model'] or 'world model'}: {protocol['horizon']} frames from {protocol['context_length']}"
    caption = f"protocol {protocol['name']}, {overall['clips']} clips, {runs} run{'s' * (runs > 1)}, "
    caption += f"seed {result['seed']}, {result['seconds']:.0f} s"
    table = Table(title=escape(title), caption=escape(caption))
    table.add_column("metric")
    table.add_column(f"best of {samples}" if samples > 1 else "model", justify="right")
    for heading in ("± runs", "95 % over episodes", "mean of samples", "last frame", "with another clip's actions"):
        table.add_column(heading, justify="right")
    following = overall["shuffled_actions"]
    for metric, value in overall["model"].items():
        arrow = "↑" if HIGHER_IS_BETTER.get(metric, False) else "↓"
        deviation, ends = overall["std_over_runs"].get(metric), overall["interval"].get(metric)
        change = None if following is None else following["change"].get(metric)
        table.add_row(
            f"{LABELS.get(metric, metric)} {arrow}",
            number(metric, value),
            "-" if deviation is None else number(metric, deviation),
            "-" if ends is None else f"{number(metric, ends[0])} to {number(metric, ends[1])}",
            number(metric, overall["mean_of_samples"].get(metric)),
            number(metric, overall["repeat_last_frame"].get(metric)),
            "-" if change is None else signed(metric, change),
        )
    return table


def task_table(result: Mapping[str, Any]) -> Table | None:
    """A row a task, the model beside repeating the last frame; None where there is one task."""
    if len(result["tasks"]) < 2:
        return None
    metrics = list(next(iter(result["tasks"].values()))["model"])
    caption = "model / last frame repeated; other actions: mean of the samples, against that with their own"
    table = Table(caption=caption)
    table.add_column("task")
    for heading in ("clips", *(LABELS.get(metric, metric) for metric in metrics), "MSE, other actions", "reward r"):
        table.add_column(heading, justify="right")
    for task, entry in result["tasks"].items():
        following, reward = entry["shuffled_actions"], entry["reward"]
        correlation = None if reward is None else reward["pearson_r"]
        table.add_row(
            escape(task),
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
def watching(console: Console | None, what: str = "evaluate") -> Iterator[Callable[[int, int], None] | None]:
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
                task = progress.add_task(what, total=total, completed=done)
            else:
                progress.update(task, completed=done)

        yield watch


def comparison_table(differences: Sequence[Difference], first: Mapping[str, Any], second: Mapping[str, Any]) -> Table:
    """A row a metric: both results, their difference with its interval, and what that means."""
    names = [str(result["model"] or "world model") for result in (first, second)]
    same = first["hashes"]["model"] == second["hashes"]["model"]
    twice = f"{names[0]}, {'measured twice' if same else 'two sets of weights'}"
    title = f"{names[0]} against {names[1]}" if names[0] != names[1] else twice
    caption = f"protocol {first['protocol']['name']}, {len(first['videos'])} videos, paired bootstrap over episodes"
    table = Table(title=escape(title), caption=escape(caption))
    table.add_column("metric")
    for heading in ("first", "second", "change", "95 % of the change", "p", "second better in"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for one in differences:
        arrow = "↑" if HIGHER_IS_BETTER.get(one.metric, False) else "↓"
        ends = "-" if one.interval is None else " to ".join(f"{signed(one.metric, end)}" for end in one.interval)
        colour = "" if not one.real else "[green]" if one.better else "[red]"
        table.add_row(
            f"{LABELS.get(one.metric, one.metric)} {arrow}",
            number(one.metric, one.first),
            number(one.metric, one.second),
            signed(one.metric, one.change),
            ends,
            "-" if one.p_value is None else f"{one.p_value:.3f}" if one.p_value >= 0.001 else "< 0.001",
            "-" if one.wins is None else f"{100 * one.wins:.0f} %",
            f"{colour}{one.verdict}",
        )
    return table


def signed(metric: str, value: float) -> str:
    """A change with its sign."""
    return ("+" if value >= 0 else "") + number(metric, value)


def explanation_table(explanation: Mapping[str, Any]) -> Table:
    """A row a reason: this alone changes the metric from x to y."""
    metrics = list(dict.fromkeys(metric for row in explanation["rows"] for metric in row["values"]))
    title = f"What alone would give another number ({explanation['videos']} clips, {explanation['samples']} samples)"
    table = Table(title=title)
    table.add_column("reason")
    table.add_column("change")
    for metric in metrics:
        table.add_column(LABELS.get(metric, metric), justify="right")
    reason = None
    for row in explanation["rows"]:
        cells = [
            " → ".join(number(metric, value) for value in row["values"][metric]) if metric in row["values"] else ""
            for metric in metrics
        ]
        table.add_row("" if row["reason"] == reason else row["reason"], row["change"], *cells)
        reason = row["reason"]
    return table
