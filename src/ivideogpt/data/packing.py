"""Packs recordings into a shard set: of any known format, another shard set, or one WebDataset tar as a stream."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ivideogpt.data.blocks import DEFAULT_CODEC, codec_named
from ivideogpt.data.conversion.listing import SET, STREAM, is_set_or_stream, list_source, unique_keys
from ivideogpt.data.conversion.local import Done, run_here, run_processes
from ivideogpt.data.conversion.plan import Settings, Unit, make_plan
from ivideogpt.data.conversion.staging import Staging
from ivideogpt.data.conversion.unit import CannotWriteError, Row, Writing
from ivideogpt.data.manifest import MANIFEST, QUARANTINE, episodes_of
from ivideogpt.data.reader import POLICIES
from ivideogpt.data.shards import SHARD_BYTES

__all__ = ["ENGINES", "QUARANTINE", "SET", "STREAM", "PackReport", "is_set_or_stream", "pack", "unique_keys"]

ENGINES = ("local", "ray")
MAX_BAD = 0.5


@dataclasses.dataclass
class PackReport:
    """What was packed.

    Args:
        folders: Folders of the sets.
        episodes: Episodes in them.
        frames: Their frames.
        quarantine: Key, reason and kind of each episode that was left out.
        format: What the source was read as.
        resumed: Episodes that an earlier try had packed already.
        missing: Units that other parts have to convert before the sets can be made; 0: they are made.
        found: Whether the sets were there already, made in the same way.
    """

    folders: list[Path]
    episodes: int = 0
    frames: int = 0
    quarantine: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    format: str = ""
    resumed: int = 0
    missing: int = 0
    found: bool = False

    @property
    def bad(self) -> int:
        """Number of episodes that were left out."""
        return episodes_of(self.quarantine)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(key, reason) of what was left out."""
        return [(line["key"], line["reason"]) for line in self.quarantine]

    def add(self, row: Row) -> None:
        """Counts a unit."""
        self.episodes, self.frames = self.episodes + row.episodes, self.frames + row.frames
        self.quarantine += row.quarantine


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Any = None,
    resize: int | None = None,
    holdout: float = 0.0,
    policy: str = "error",
    allow: Sequence[str] = (),
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int, int | None], None] | None = None,
    format: str | None = None,  # noqa: A002
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    cameras: Sequence[str] = (),
    holdout_every: int | None = None,
    max_bad: float = MAX_BAD,
    part: tuple[int, int] | None = None,
    engine: str = "local",
    codec: str = DEFAULT_CODEC,
) -> PackReport:
    """Packs every episode of `source` into shards.

    The work is cut into units, by the source and the options alone, so the shards do not depend on who does it. Units
    that are finished stay in a hidden folder when a conversion is killed, interrupted or runs out of disk, and the same
    call goes on with the others. The sets appear when all are there.

    Args:
        source: Recordings of a known format, a shard set (folder, manifest or `embedded:...`), or the URL of one
            WebDataset tar of ours, read as a stream.
        out: Folder of the shard set. With `holdout` the sets are `out/train` and `out/heldout`.
        options: How to read the recordings: what `formats.FORMATS[format].options_class()` makes.
        resize: Centre-crop and resize the frames to this many pixels; None leaves them.
        holdout: Share of the recordings that is kept apart: at least one, evenly spread over the order of the source.
        policy: `error` stops at a bad episode; `skip` puts it into quarantine: it is left out and reported, and
            `quarantine.jsonl` beside the manifest names it with the reason.
        allow: URLs that may be opened although they run a command (`pipe:` and other schemes), letter by letter.
        overwrite: Replace sets that are there, and begin anew.
        command: The command line to name in the manifest.
        progress: Called with (episodes done, episodes in all or None) now and then.
        format: A name of `formats.FORMATS`; None recognises it where that is safe.
        workers: Processes that read and encode; 1 is this one.
        shard_bytes: A shard is closed when it holds so many, and a unit has about so many bytes of the source.
        cameras: Cameras to read, or `all`: an episode each, with the same `recording` in the metadata.
        holdout_every: Instead of `holdout`: every so many-th recording is kept apart.
        max_bad: Largest share of bad episodes under `skip`.
        part: (i, n): converts the i-th of n parts, i from 1; the one that ends last makes the sets.
        engine: `local`, or `ray` for a cluster.
        codec: How frames are stored: a name of `blocks`; only the JPEGs lose something.

    Raises:
        ValueError: Nothing to pack, too many bad episodes, one under `error`, arguments out of range, or something
            else in the folder.
        OSError: The output cannot be written; sets that were there stay whole.
    """
    _check(resize, holdout, holdout_every, policy, workers, max_bad, part, engine, overwrite)
    text, out = os.fspath(source), Path(out)
    settings = Settings(resize, shard_bytes, policy == "error", codec_named(codec).name)
    listing = list_source(text, format, options, cameras, allow, max(shard_bytes // 16, 1))
    facts = {"options": None if options is None else repr(options), "cameras": list(cameras)}
    plan = make_plan(listing, settings, holdout, holdout_every, facts)
    folders = [out / "train", out / "heldout"] if plan.parts == 2 else [out]
    report = PackReport(folders, format=listing.name)
    staging = Staging(out, folders, plan, overwrite)
    if staging.finished:
        return _found(report)
    with staging.running(alone=part is None):
        rows = {unit.number: row for unit in plan.units if (row := staging.row(unit)) is not None}
        report.resumed = sum(row.episodes for row in rows.values())
        mine = [unit for unit in plan.units if part is None or unit.number % part[1] == part[0] - 1]
        left = [unit for unit in mine if unit.number not in rows]
        done_before = plan.total and sum(unit.episodes for unit in plan.units if unit.number in rows)

        def tell(done: int) -> None:
            if progress is not None:
                progress(done + (done_before or 0), plan.total)

        try:
            if policy == "error":
                _refuse_bad(rows)
            with closing(_run(left, staging.folder, settings, tell, workers, engine)) as results:
                for unit, result in results:
                    if isinstance(result, Exception):
                        raise result
                    rows[unit.number] = result
                    _warn(result, rows)
            for unit in plan.units:  # other parts may have finished theirs
                if unit.number not in rows and (late := staging.row(unit)) is not None:
                    rows[unit.number] = late
            for number in sorted(rows):
                report.add(rows[number])
            report.missing = len(plan.units) - len(rows)
            if report.missing:
                return report
            _refuse_mostly_bad(report, text, max_bad)
            with Writing(out):
                staging.commit(command, {})
        except CannotWriteError as error:
            raise OSError(
                error.errno,
                f"could not write the shard set ({error.strerror}); what was finished is kept, so make room and give "
                "the same command again",
                str(out),
            ) from error
        except ValueError:
            if not any(row.episodes for row in rows.values()):  # nothing worth going on with
                staging.remove(with_folders=True)
            raise
    return report


def _check(
    resize: int | None, holdout: float, every: int | None, policy: str, workers: int, max_bad: float,
    part: tuple[int, int] | None, engine: str, overwrite: bool,
) -> None:  # fmt: skip
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {POLICIES}")
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not one of {ENGINES}")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be in [0, 1), got {holdout}")
    if every is not None and (every < 2 or holdout):
        raise ValueError(f"holdout_every must be at least 2 and stand without holdout, got {every} and {holdout}")
    if resize is not None and resize < 8:
        raise ValueError(f"resize must be at least 8 pixels, got {resize}")
    if workers < 1:
        raise ValueError(f"at least 1 worker is needed, got {workers}")
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad must be in [0, 1], got {max_bad}")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ValueError(f"part {part[0]}/{part[1]} is none of 1/{part[1]} to {part[1]}/{part[1]}")
    if part is not None and overwrite:
        raise ValueError("overwrite would remove what other parts have done; remove the old set, then start the parts")


def _run(
    units: list[Unit], folder: Path, settings: Settings, tell: Callable[[int], None], workers: int, engine: str
) -> Generator[Done, None, None]:
    if engine == "ray":
        from ivideogpt.data.conversion.on_ray import run_on_ray

        yield from run_on_ray(units, folder, settings, tell, workers)
    elif workers == 1:
        yield from run_here(units, folder, settings, tell)
    else:
        yield from run_processes(units, folder, settings, tell, workers)


def _warn(row: Row, rows: dict[int, Row]) -> None:
    count = sum(len(other.quarantine) for other in rows.values()) - len(row.quarantine)
    for number, line in enumerate(row.quarantine, start=count + 1):
        warnings.warn(f"{line['key']} skipped ({number} so far): {line['reason']}", stacklevel=3)


def _refuse_bad(rows: dict[int, Row]) -> None:
    for number in sorted(rows):
        for line in rows[number].quarantine:
            raise ValueError(f"{line['key']}: {line['reason']}")


def _refuse_mostly_bad(report: PackReport, source: str, max_bad: float) -> None:
    bad = report.bad
    total = bad + report.episodes
    if bad == 0:
        return
    key, reason = report.skipped[0]
    if not report.episodes:
        raise ValueError(f"all {bad} episodes of {source} are bad, the first, {key}: {reason}")
    if bad > max_bad * total:
        raise ValueError(
            f"{bad} of {total} episodes of {source} are bad, more than --max-bad {max_bad:g} allows; the first, {key}: "
            f"{reason}. What was converted is kept: give the same command with a higher --max-bad to use it"
        )


def _found(report: PackReport) -> PackReport:
    """The report of sets that are there already."""
    for folder in report.folders:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        report.episodes += manifest["counts"]["episodes"]
        report.frames += manifest["counts"]["frames"]
        if (folder / QUARANTINE).is_file():
            lines = (folder / QUARANTINE).read_text(encoding="utf-8").splitlines()
            report.quarantine += [json.loads(line) for line in lines]
    report.found = True
    return report
