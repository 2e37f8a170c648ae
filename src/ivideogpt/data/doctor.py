"""Looks for what spoils training before it costs a week: one pass over the episodes of a shard set, then findings.

An episode is reduced to a `Reading` of some numbers and hashes, so that memory does not grow with its pixels. Lags are
those of this package's convention, in which actions[t] changes frame t into frame t + 1: that is lag 0. A robot with
inertia answers later, at lag 1 or 2; one that moves before it is told to has its actions shifted.

T frames, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.segments import shrink_stride

LAGS = tuple(range(-5, 6))
FLAT = 2.0
"""Standard deviation of a frame's pixels (0..255) below which nothing is to be seen on it."""
MARGIN, SMALL_MARGIN = 0.1, 0.03
"""How much better than the lags that are as they should be another lag must fit: slow robots make broad curves.

What fits better by less than the first is a warning, and by less than the second nothing."""
FROZEN_SHARE = 0.5
"""Share of a recording's steps without any change of a pixel from which on it counts as frozen."""
SEVERITIES = ("note", "warning", "error")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is kept of an episode.

    Attributes:
        key: its key.
        source: where it comes from.
        fps: frames a second.
        frames: T.
        resolution: height and width.
        hashes: of each frame.
        flat: number of frames on which nothing is to be seen.
        frozen: number of steps without any change.
        actions: (A, 5) count, mean, mean of squares, smallest and largest of each dimension; None without actions.
        at_ends: (A,) how many values lie at the smallest or the largest of the episode.
        lags: correlation of the size of the action with the change of the frames at each of `LAGS`; NaN where none.
        rewards: (smallest, largest) of rewards[1:]; None without rewards.
    """

    key: str
    source: str
    fps: float
    frames: int
    resolution: tuple[int, int]
    hashes: tuple[bytes, ...]
    flat: int
    frozen: int
    actions: np.ndarray | None
    at_ends: np.ndarray | None
    lags: np.ndarray
    rewards: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was found: how bad, which check, what it means and what to do, and the episodes it is about."""

    severity: str
    check: str
    text: str
    keys: tuple[str, ...] = ()


def examine(key: str, episode: Episode) -> Reading:
    """The reading of one episode."""
    video = episode.video
    hashes = tuple(hashlib.blake2b(frame.tobytes(), digest_size=12).digest() for frame in video)
    motion = np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(video)])
    actions = at_ends = None
    lags = np.full(len(LAGS), np.nan)
    if episode.actions is not None and len(video) > 1:
        rows = episode.actions[:-1].astype(np.float64)  # the last may be a filler
        low, high = rows.min(0), rows.max(0)
        actions = np.stack([np.full(len(low), len(rows)), rows.mean(0), (rows**2).mean(0), low, high], axis=1)
        at_ends = ((rows == low) | (rows == high)).sum(0)
        lags = correlations(rows, motion)
    rewards = None
    if episode.rewards is not None and len(video) > 1:
        rewards = float(episode.rewards[1:].min()), float(episode.rewards[1:].max())
    return Reading(
        key,
        episode.source,
        float(episode.fps),
        len(video),
        episode.resolution,
        hashes,
        sum(float(frame.std()) < FLAT for frame in video),
        sum(a == b for a, b in pairwise(hashes)),
        actions,
        at_ends,
        lags,
        rewards,
    )


def correlations(actions: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Correlation of the size of actions (T-1, A) with the change of frames (T-1,) `lag` steps later, for each lag."""
    spread = actions.std(0)
    moving = spread > 0
    size = np.linalg.norm(actions[:, moving] / spread[moving], axis=1)
    found = np.full(len(LAGS), np.nan)
    for index, lag in enumerate(LAGS):
        x, y = size[max(-lag, 0) : len(size) - max(lag, 0)], motion[max(lag, 0) : len(motion) - max(-lag, 0)]
        if len(x) >= 4 and x.std() > 0 and y.std() > 0:
            found[index] = np.corrcoef(x, y)[0, 1]
    return found


def read_set(
    shards: ShardSet, most: int | None = None, progress: Callable[[int, int | None], None] | None = None
) -> tuple[list[Reading], list[Finding]]:
    """Readings of the episodes, or of `most` of them evenly spread, and a finding for each that cannot be read."""
    count = len(shards) if most is None else min(most, len(shards))
    readings: list[Reading] = []
    bad = [Finding("error", "unreadable", reason, (key,)) for key, reason in shards.skipped.items()]
    for done, index in enumerate(np.linspace(0, len(shards) - 1, count).round().astype(int)):
        key = shards.key(int(index))
        episode = shards.episode(int(index))
        if episode is None:
            bad.append(Finding("error", "unreadable", shards.skipped[key], (key,)))
        else:
            readings.append(examine(key, episode))
        if progress is not None:
            progress(done + 1, count)
    return readings, bad


def check(readings: Sequence[Reading], segment_length: int = 16, stride: int = 1) -> list[Finding]:
    """Everything that can be said about one set, the worst first."""
    found = [*_pictures(readings), *_copies(readings), *_actions(readings), *_rewards(readings)]
    found += _shapes(readings, segment_length, stride)
    return sorted(found, key=lambda finding: -SEVERITIES.index(finding.severity))


def check_leaks(train: Iterable[Reading], held_out: Iterable[Reading]) -> list[Finding]:
    """Frames of training that are in the validation set, too."""
    known = {frame for reading in train for frame in reading.hashes}
    whole, part = [], []
    for reading in held_out:
        shared = sum(frame in known for frame in reading.hashes)
        if shared == reading.frames:
            whole.append(reading.key)
        elif shared > reading.frames // 10:
            part.append(reading.key)
    found = []
    if whole:
        text = f"{len(whole)} validation episodes are in the training set: scores on them are worth nothing"
        found.append(Finding("error", "leak", text, tuple(whole)))
    if part:
        text = f"{len(part)} validation episodes share more than a tenth of their frames with the training set"
        found.append(Finding("warning", "leak", text, tuple(part)))
    return found


def _pictures(readings: Sequence[Reading]) -> Iterable[Finding]:
    flat = [r.key for r in readings if r.flat]
    if flat:
        frames = sum(r.flat for r in readings)
        text = f"{frames} frames of one colour (black, white, or a camera that was off): leave these episodes out"
        yield Finding("error" if len(flat) > len(readings) / 10 else "warning", "flat frames", text, tuple(flat))
    frozen = [r.key for r in readings if r.frames > 1 and r.frozen >= FROZEN_SHARE * (r.frames - 1)]
    if frozen:
        text = f"{len(frozen)} episodes in which the picture stands still for half of the time or more"
        yield Finding("warning", "frozen frames", text, tuple(frozen))
    some = [r.key for r in readings if 0 < r.frozen < FROZEN_SHARE * (r.frames - 1)]
    if some:
        text = f"{len(some)} episodes with repeated frames: a pause of the robot, or frames that were dropped"
        yield Finding("note", "repeated frames", text, tuple(some))


def _copies(readings: Sequence[Reading]) -> Iterable[Finding]:
    groups: dict[tuple[bytes, ...], list[str]] = defaultdict(list)
    for reading in readings:
        groups[reading.hashes].append(reading.key)
    copies = tuple(key for keys in groups.values() for key in keys[1:])
    if copies:
        text = f"{len(copies)} episodes have exactly the frames of another: they count twice, or leak into validation"
        yield Finding("warning", "duplicates", text, copies)
    owners: dict[bytes, set[int]] = defaultdict(set)
    for number, reading in enumerate(readings):
        for frame in reading.hashes:
            owners[frame].add(number)
    shared: Counter[int] = Counter()
    for numbers in owners.values():
        if len(numbers) == 2:  # frames that many share are a pose at the start, say
            shared.update(numbers)
    parts = tuple(
        readings[i].key for i, count in shared.items() if readings[i].frames // 2 <= count < readings[i].frames
    )
    if parts:
        text = f"{len(parts)} episodes share half of their frames or more with another: cut out of the same recording?"
        yield Finding("warning", "overlapping episodes", text, parts)


def _actions(readings: Sequence[Reading]) -> Iterable[Finding]:
    having = [r for r in readings if r.actions is not None]
    widths = Counter(len(r.actions) for r in having if r.actions is not None)
    if len(widths) > 1 or (having and len(having) < len(readings)):
        counts = [f"{count} episodes of {width}" for width, count in sorted(widths.items())]
        counts += [f"{len(readings) - len(having)} without"] if len(having) < len(readings) else []
        yield Finding("warning", "action sizes", f"actions differ in size: {', '.join(counts)}; they cannot be mixed")
    if len(widths) != 1:
        return
    table = np.stack([r.actions for r in having if r.actions is not None])  # (episodes, A, 5)
    counts, low, high = table[:, :, 0].sum(0), table[:, :, 3].min(0), table[:, :, 4].max(0)
    constant = np.flatnonzero(low == high)
    if len(constant):
        text = (
            f"dimensions {constant.tolist()} never change ({low[constant].tolist()}): nothing can be learnt from them"
        )
        yield Finding("warning", "constant actions", text)
    ends = np.zeros(len(low))
    for reading in having:
        assert reading.actions is not None and reading.at_ends is not None
        at_end = (reading.actions[:, 3] == low) | (reading.actions[:, 4] == high)
        ends += np.where(at_end, reading.at_ends, 0)
    clipped = np.flatnonzero((ends > 0.3 * counts) & (low != high) & (np.abs(low + high) < 1e-6))
    if len(clipped):
        share = (ends / counts)[clipped].round(2).tolist()
        text = f"dimensions {clipped.tolist()} lie at their smallest or largest value {share} of the time: clipped?"
        yield Finding("note", "clipped actions", text)
    yield from _scales(having, np.sqrt(np.maximum(table[:, :, 2].mean(0), 0)))
    yield from _alignment(having)


def _scales(having: Sequence[Reading], size: np.ndarray) -> Iterable[Finding]:
    some = size[size > 0]
    if len(some) and some.max() > 100 * some.min():
        text = f"dimensions differ in size by {some.max() / some.min():.0f} times ({size.round(4).tolist()}): normalise"
        yield Finding("warning", "action scales", text)
    by_source: dict[str, list[np.ndarray]] = defaultdict(list)
    for reading in having:
        assert reading.actions is not None
        by_source[reading.source].append(reading.actions[:, 2])
    sizes = {source: np.sqrt(np.mean(values, axis=0)) for source, values in by_source.items()}
    names = sorted(sizes)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            pair = np.stack([sizes[name], sizes[other]])
            ratio = (pair.max(0) / np.maximum(pair.min(0), 1e-12))[pair.min(0) > 0]
            if len(ratio) and np.median(ratio) > 5:
                text = f"actions of {name} and {other} differ in size by {np.median(ratio):.1f} times: other units?"
                yield Finding("warning", "action scales of sources", text)


def lag_curve(readings: Sequence[Reading]) -> np.ndarray:
    """Mean correlation at each of `LAGS` over the episodes that have one."""
    rows = [r.lags for r in readings if np.isfinite(r.lags).all()]
    return np.mean(rows, axis=0) if rows else np.full(len(LAGS), np.nan)


def _alignment(having: Sequence[Reading], draws: int = 200) -> Iterable[Finding]:
    rows = np.array([r.lags for r in having if np.isfinite(r.lags).all()])
    if len(rows) < 2:
        return
    best = LAGS[int(rows.mean(0).argmax())]
    rng = np.random.default_rng(0)
    again = [LAGS[int(rows[rng.integers(len(rows), size=len(rows))].mean(0).argmax())] for _ in range(draws)]
    exactly, before = float(np.mean([lag == best for lag in again])), float(np.mean([lag < 0 for lag in again]))
    by_lag = dict(zip(LAGS, rows.mean(0).tolist(), strict=True))
    better = by_lag[best] - max(by_lag[lag] for lag in ((0,) if 0 < best <= 2 else (0, 1, 2)))
    clear = exactly > 0.9 and better >= MARGIN
    # that actions come too late, if not by how much; a few episodes may agree by chance
    likely = best < 0 and before > 0.9 and better >= SMALL_MARGIN and len(rows) >= 8
    if not (clear or likely):
        return
    curve = ", ".join(f"{lag:+d}: {value:.2f}" for lag, value in by_lag.items())
    if best < 0:
        agree = f"({exactly if clear else before:.0%} of resampled sets agree)"
        when = f"{-best} steps before" if clear else "before"
        text = (
            f"frames change {when} the action that should change them {agree}: action[t] of these recordings seems to "
            f"lead to frame t, or to one before; move the actions {'' if clear else 'some '}{-best} rows to the front. "
            f"Correlation by lag: {curve}"
        )
        yield Finding("error" if clear else "warning", "misaligned actions", text)
    elif best > 2:
        text = f"frames change {best} steps after their action: a slow robot, or actions shifted. By lag: {curve}"
        yield Finding("warning", "misaligned actions", text)
    else:
        yield Finding(
            "note", "late answer", f"frames change most {best} steps after the action (inertia). By lag: {curve}"
        )


def _rewards(readings: Sequence[Reading]) -> Iterable[Finding]:
    having = [r.rewards for r in readings if r.rewards is not None]
    if not having:
        return
    if len(having) < len(readings):
        yield Finding(
            "warning", "rewards", f"{len(readings) - len(having)} of {len(readings)} episodes have no rewards"
        )
    low, high = min(r[0] for r in having), max(r[1] for r in having)
    if low == high:
        text = f"rewards are always {low:g}: a reward head learns nothing from them"
        yield Finding("warning", "rewards", text)


def _shapes(readings: Sequence[Reading], segment_length: int, stride: int) -> Iterable[Finding]:
    short = tuple(r.key for r in readings if r.frames < segment_length)
    if short:
        text = f"{len(short)} episodes are shorter than a clip of {segment_length} frames: their last frame is repeated"
        yield Finding("warning" if len(short) > len(readings) / 10 else "note", "short episodes", text, short)
    shrunk = tuple(
        r.key
        for r in readings
        if r.frames >= segment_length and shrink_stride(stride, r.frames, segment_length) < stride
    )
    if shrunk:
        text = f"{len(shrunk)} episodes are too short for a stride of {stride}: they are read with a smaller one"
        yield Finding("note", "short episodes", text, shrunk)
    sizes = Counter(r.resolution for r in readings)
    if len(sizes) > 1:
        text = ", ".join(f"{height} x {width} ({count})" for (height, width), count in sizes.most_common())
        yield Finding("note", "resolutions", f"frames differ in size: {text}; they are cropped and resized on reading")
    rates = Counter(r.fps for r in readings)
    if len(rates) > 1:
        text = ", ".join(f"{rate:g} ({count})" for rate, count in rates.most_common(8))
        yield Finding("note", "frame rates", f"frames a second differ: {text}; set stride or target_rate by them")
