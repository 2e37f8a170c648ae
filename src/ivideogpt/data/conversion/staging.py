"""The hidden folder in which finished units wait until all are there, and how they become sets.

    OUT/.staging/plan.json                 what the plan was made of
    OUT/.staging/unit-000012-000.tar       shards of unit 12
    OUT/.staging/unit-000012.json          written when they are whole: the unit is finished
    OUT/.staging/*.lock                    held by running processes; the system frees them when one dies

Every file is written aside and renamed, so each moment is one that a kill may leave behind.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ivideogpt.data.conversion.plan import Plan, Unit
from ivideogpt.data.conversion.unit import Row, row_file, shard_file
from ivideogpt.data.locking import locked
from ivideogpt.data.manifest import MANIFEST, ShardRow, commit_set, list_left_out, refuse_to_replace, write_json

STAGING = ".staging"
AFRESH = "give the same command as before, or begin afresh with --overwrite"


class Staging:
    """The finished units of a conversion.

    Args:
        out: Folder given by the user.
        folders: Folders of the sets.
        plan: What is converted.
        overwrite: Replace sets that are there, and forget what is staged.

    Raises:
        ValueError: Something else is in the folders or staged there; the message says how it differs.
    """

    def __init__(self, out: Path, folders: Sequence[Path], plan: Plan, overwrite: bool) -> None:
        self.out, self.folders, self.plan = out, list(folders), plan
        self.folder = out / STAGING
        self._made = [folder for folder in (*folders, out) if not folder.exists()]
        self.finished = not overwrite and self._is_finished()
        if self.finished:
            return
        facts, replaces = self._staged_plan()
        if facts is not None and not overwrite and facts != json.loads(json.dumps(plan.facts)):
            raise ValueError(f"{out} holds an unfinished conversion: {plan.difference(facts)}; {AFRESH}")
        self._begin_anew = overwrite or (facts is not None and plan.facts["source_digest"] is None)
        self.overwrite = overwrite or replaces
        for folder in folders:
            if facts is None or not any(self._rows()):
                refuse_to_replace(folder, self.overwrite)
            elif not self._is_ours(folder):
                refuse_to_replace(folder, self.overwrite, unfinished=True)

    def _is_ours(self, folder: Path) -> bool:
        """Whether the set in a folder was made by this plan: a kill may come between two sets."""
        try:
            found = _head(folder / MANIFEST)["extra"]["conversion"]["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return found == self.plan.digest

    def _is_finished(self) -> bool:
        return not (self.folder / "plan.json").exists() and all(self._is_ours(folder) for folder in self.folders)

    def _staged_plan(self) -> tuple[dict[str, Any] | None, bool]:
        try:
            found = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
            return found["facts"], bool(found["overwrite"])
        except FileNotFoundError:
            return None, False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / 'plan.json'} is not readable ({error!r}); {AFRESH}") from error

    def _rows(self) -> Iterator[Path]:
        return self.folder.glob("unit-*.json")

    @contextlib.contextmanager
    def running(self, alone: bool) -> Iterator[None]:
        """Keeps the folder for this process, or for parts of the same conversion.

        Raises:
            ValueError: Another process converts into it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _running(self.folder / "running.lock", alone, self.folder.parent):
            if self._begin_anew:
                for path in self.folder.iterdir():
                    if path.suffix != ".lock":
                        path.unlink()
            if not (self.folder / "plan.json").exists():
                write_json(self.folder / "plan.json", {"facts": self.plan.facts, "overwrite": self.overwrite})
            if alone:  # no other process has begun anything
                for path in self.folder.glob(".*.partial"):
                    path.unlink(missing_ok=True)
            yield

    def row(self, unit: Unit) -> Row | None:
        """The row of a unit that is finished."""
        try:
            found = json.loads(row_file(self.folder, unit.number).read_text(encoding="utf-8"))
            row = Row(**{name: found[name] for name in ("episodes", "frames", "quarantine")})
            for index, shard in enumerate(found["shards"]):
                path = shard_file(self.folder, unit.number, index)
                if path.exists() and path.stat().st_size != shard["size"]:
                    return None
                if not path.exists() and not self._published(shard["size"]):
                    return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return row

    def _published(self, size: int) -> bool:
        """Whether a kill came while shards were being published: then one of that size has its name already."""
        return any(path.stat().st_size == size for folder in self.folders for path in folder.glob("*.tar"))

    def commit(self, command: str, extra: dict[str, Any]) -> bool:
        """Makes the sets, under a lock; False where another process has done it.

        Raises:
            ValueError: A set would be empty, or two episodes have one key.
            OSError: Something cannot be written.
        """
        with locked(self.folder / "commit.lock"):
            if not (self.folder / "plan.json").exists():
                return False
            rows = {
                unit.number: json.loads(row_file(self.folder, unit.number).read_text(encoding="utf-8"))
                for unit in self.plan.units
            }
            for part, folder in enumerate(self.folders):
                if not any(rows[unit.number]["episodes"] for unit in self.plan.units if unit.part == part):
                    raise ValueError(f"no episode is left for {folder}, as all of them are bad; no set was made")
            conversion = {"conversion": {"digest": self.plan.digest} | self.plan.facts}
            for part, folder in enumerate(self.folders):
                staged = []
                quarantine: list[dict[str, Any]] = []
                for unit in self.plan.units:
                    if unit.part == part:
                        row = rows[unit.number]
                        quarantine += row["quarantine"]
                        staged += [
                            (shard_file(self.folder, unit.number, index), partial(self._shard, unit.number, index))
                            for index in range(len(row["shards"]))
                        ]
                if self._is_ours(folder) and self.parts_left(part) == 0:
                    with list_left_out(folder, [json.dumps(line) for line in quarantine]):
                        continue  # a kill may have come just before this list
                folder.mkdir(parents=True, exist_ok=True)
                commit_set(folder, staged, command=command, extra=extra | conversion, quarantine=quarantine)
            for folder in self.folders:
                for path in folder.glob(".*.partial"):  # lists that a process which was killed had begun
                    path.unlink(missing_ok=True)
            self.remove()
        return True

    def parts_left(self, part: int) -> int:
        """Shards of a set that are still staged."""
        numbers = [unit.number for unit in self.plan.units if unit.part == part]
        return sum(1 for number in numbers for _ in self.folder.glob(f"unit-{number:06d}-*.tar"))

    def _shard(self, number: int, index: int) -> ShardRow:
        row = json.loads(row_file(self.folder, number).read_text(encoding="utf-8"))
        return ShardRow.from_json(row["shards"][index])

    def remove(self, with_folders: bool = False) -> None:
        """Removes what is staged, the plan first; and the folders that were made for it where they are empty."""
        (self.folder / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        if with_folders:
            for folder in self._made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _head(manifest: Path) -> dict[str, Any]:
    """A manifest, read whole."""
    return json.loads(manifest.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _running(path: Path, alone: bool, out: Path) -> Iterator[None]:
    """Holds the lock of a conversion; one that reads all of it runs alone."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, shared=not alone, wait=False))
        except BlockingIOError:
            raise ValueError(f"another process is converting into {out}; wait for it, or use --part in both") from None
        yield
