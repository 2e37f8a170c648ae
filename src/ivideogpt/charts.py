"""Charts of the HTML pages: inline SVG that the page's CSS variables colour, and pictures as data URIs."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field


def data_uri(content: bytes, kind: str) -> str:
    """The content as something that an `src` attribute can hold."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Series:
    """A line of a chart; `role` names its CSS class, `band` holds (x, low, high) around it."""

    name: str
    points: Sequence[tuple[float, float]]
    role: str
    band: Sequence[tuple[float, float, float]] = ()


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
    points += [(x, end) for one in series for x, *ends in one.band for end in ends]
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
        if one.band:
            edge = [(a, high) for a, _, high in one.band] + [(a, low) for a, low, _ in reversed(one.band)]
            corners = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in edge)
            parts.append(f'<polygon class="band {one.role}" points="{corners}"/>')
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


def interval_chart(
    value: float, low: float, high: float, reference: float | None, label: str, width: int = 190, height: int = 22
) -> str:
    """A dot with its interval on a line of its own, and a tick where the reference stands."""
    ends = [low, high, value, *([] if reference is None else [reference])]
    room = 0.08 * (max(ends) - min(ends) or 1.0)
    x = _Scale(min(ends) - room, max(ends) + room, 2, width - 2)
    middle = height / 2
    parts = [f'<svg class="interval" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    parts.append(f'<line class="grid" x1="0" x2="{width}" y1="{middle}" y2="{middle}"/>')
    if reference is not None:
        at = f"{x(reference):.1f}"
        parts.append(f'<line class="tick-mark truth" x1="{at}" x2="{at}" y1="4" y2="{height - 4}"/>')
    left, wide = x(low), max(x(high) - x(low), 1.0)
    parts.append(
        f'<rect class="span prediction" x="{left:.1f}" y="{middle - 3}" width="{wide:.1f}" height="6" rx="3"/>'
    )
    parts.append(f'<circle class="dot prediction" cx="{x(value):.1f}" cy="{middle}" r="4.5"/>')
    return "".join([*parts, "</svg>"])
