"""The journal of an evaluation: an append-only record of every video that is finished, so that a kill costs little.

A folder beside the result file. `header.json` says what the numbers are of; each start of each process appends to a
pair of files of its own, `part-*.jsonl` (a line a finished video) and `part-*.bin` (its features, float32). A line is
written after its features, so whatever a kill leaves behind the last whole line counts for nothing. All numbers are
summed up in the order of the videos at the end, which is why neither a kill nor the number of processes changes a bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.locking import locked

HEADER = "header.json"
FORMAT = "ivideogpt-evaluation-journal"


class Journal:
    """Reads what earlier starts have finished and appends to it.

    Args:
        folder: of the journal.
        header: everything that decides the numbers; a journal with another header is refused.
        begin: whether this process may make the folder; the others wait until it has.

    Raises:
        ValueError: if the journal there is of something else, naming what differs, or damaged.
        OSError: if it cannot be written.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], begin: bool = True) -> None:
        self.folder = folder
        self.header = {"format": FORMAT, **json.loads(json.dumps(header))}
        if begin:
            folder.mkdir(parents=True, exist_ok=True)
            self._begin()
        self.records: dict[tuple[int, int], dict[str, Any]] = {}
        for path in sorted(folder.glob("part-*.jsonl")):
            for record in _lines(path):
                self.records.setdefault((int(record["run"]), int(record["video"])), record)
        self._lines: Any = None
        self._features: Any = None

    def _begin(self) -> None:
        path = self.folder / HEADER
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); remove {self.folder} to begin anew") from error
            differing = sorted(
                name for name in {*found, *self.header} if found.get(name, None) != self.header.get(name, None)
            )
            if differing:
                shown = "; ".join(
                    change for name in differing for change in _changes(name, found.get(name), self.header.get(name))
                )
                raise ValueError(
                    f"{self.folder} holds an evaluation that was begun with other settings ({shown}); give another "
                    f"--out, or --restart to drop what it has finished (in a recipe or in Python: remove this folder)"
                )
            return
        aside = path.with_name(f".{HEADER}.{os.getpid()}")
        aside.write_text(json.dumps(self.header, indent=1), encoding="utf-8")
        os.replace(aside, path)

    def __contains__(self, place: tuple[int, int]) -> bool:
        return place in self.records

    def append(self, record: dict[str, Any], features: Mapping[str, np.ndarray]) -> None:
        """Adds a finished video.

        Args:
            record: JSON with ``run`` and ``video``.
            features: by name, each (N, D).
        """
        if self._lines is None:
            self._open()
        places = {}
        for name, values in features.items():
            content = np.ascontiguousarray(values, dtype="<f4").tobytes()
            places[name] = {"file": Path(self._features.name).name, "offset": self._features.tell(),
                            "shape": list(values.shape), "crc32": zlib.crc32(content)}  # fmt: skip
            self._features.write(content)
        self._features.flush()
        record = {**record, "features": places}
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()  # to the system: a killed process loses nothing then
        self.records[record["run"], record["video"]] = record

    def _open(self) -> None:
        for number in range(1_000_000):
            stem = self.folder / f"part-{number:06d}"
            try:
                handle = os.open(stem.with_suffix(".jsonl"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                continue
            self._lines = os.fdopen(handle, "w", encoding="utf-8")
            self._features = open(stem.with_suffix(".bin"), "wb")  # noqa: SIM115 (stays open as long as the journal)
            return
        raise OSError(f"no free name for another part in {self.folder}")

    def features(self, record: Mapping[str, Any], name: str) -> np.ndarray | None:
        """Features (N, D) of a finished video, None if it has none of that name.

        Raises:
            ValueError: if they are not what was written.
        """
        place = record["features"].get(name)
        if place is None:
            return None
        path = self.folder / Path(place["file"]).name  # a name, never a path
        rows, size = (int(value) for value in place["shape"])
        with open(path, "rb") as file:
            file.seek(int(place["offset"]))
            content = file.read(4 * rows * size)
        if len(content) != 4 * rows * size or zlib.crc32(content) != place["crc32"]:
            raise ValueError(f"{path} is damaged at {place['offset']}; remove {self.folder} to begin anew")
        return np.frombuffer(content, dtype="<f4").reshape(rows, size)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._lines, self._features):
            if file is not None:
                file.close()
        self._lines = self._features = None

    def remove(self) -> None:
        """Deletes the folder, once the result is written."""
        self.close()
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def only_evaluation(folder: Path) -> Iterator[None]:
    """Keeps a second evaluation away from the journal in ``folder``, by a lock file beside it, which is removed.

    Raises:
        ValueError: if another evaluation is under way there.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, wait=False))
            stack.callback(lock.unlink, missing_ok=True)  # while it is held
        except ImportError:
            pass  # no such lock on Windows
        except BlockingIOError as error:
            raise ValueError(f"another evaluation writes to {folder}: wait for it, or give another --out") from error
        yield


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a part; what a kill left of the last one is dropped."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
                _ = record["run"], record["video"], record["features"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged in line {number + 1}; remove its folder to begin anew") from error
            yield record


def _changes(name: str, one: object, other: object) -> Iterator[str]:
    """``name: one against other``, of mappings for each key that differs."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            if one.get(key) != other.get(key):
                yield from _changes(f"{name}.{key}", one.get(key), other.get(key))
    else:
        yield f"{name}: {_short(one)} against {_short(other)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
