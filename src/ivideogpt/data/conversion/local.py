"""Runs units in this process, or in several that may die: one that does costs the episode that it died of, no more."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from ivideogpt.data.conversion.plan import Settings, Unit
from ivideogpt.data.conversion.unit import CRASHED, Row, convert_unit

DEATHS = 2
"""Processes that an episode may take down before it is left out: the first may have been somebody else's fault."""

Done = tuple[Unit, Row | Exception]
Progress = Callable[[int], None]


def run_here(units: Sequence[Unit], folder: Path, settings: Settings, progress: Progress) -> Iterator[Done]:
    """Converts units one after another in this process.

    Args:
        units: What to convert.
        folder: Staging folder.
        settings: What is done to each episode.
        progress: Called with the number of episodes done so far.
    """
    before = 0
    for unit in units:

        def at(index: int, before: int = before) -> None:
            if index:
                progress(before + index)

        done = attempt(unit, folder, settings, {}, at)
        before += unit.episodes
        yield unit, done


def run_processes(
    units: Sequence[Unit], folder: Path, settings: Settings, progress: Progress, workers: int
) -> Iterator[Done]:
    """The same in processes; units come out as they are finished."""
    waiting = deque((unit, Counter[int]()) for unit in units)
    pool = [_Process() for _ in range(min(workers, len(units)))]
    finished = 0
    try:
        for process in pool:
            process.give(*waiting.popleft(), folder, settings)
        while busy := [process for process in pool if process.unit is not None]:
            for ready in connection.wait([process.pipe for process in busy]):
                process = next(one for one in busy if one.pipe is ready)
                unit = process.unit
                assert unit is not None
                try:
                    message = process.pipe.recv()
                except (EOFError, OSError):  # it died
                    process.died(folder)
                    process.give(unit, process.deaths, folder, settings)
                    continue
                if isinstance(message, int):
                    process.index = message
                    progress(finished + sum(one.index or 0 for one in pool if one.unit is not None))
                    continue
                process.unit = None
                finished += unit.episodes
                yield unit, message
                if waiting:
                    process.give(*waiting.popleft(), folder, settings)
    finally:
        for process in pool:
            process.kill()


class _Process:
    """A process that converts the units it is given."""

    def __init__(self) -> None:
        self.unit: Unit | None = None
        self.index: int | None = None  # of the episode that is read; None: it has not begun
        self.deaths: Counter[int] = Counter()
        self.idle_deaths = 0
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def died(self, folder: Path) -> None:
        """Notes the episode that was read, and starts another process in place of this one."""
        self.kill()
        for aside in folder.glob(f".*.{self.process.pid}.partial"):
            aside.unlink(missing_ok=True)
        if self.index is not None:
            self.deaths[self.index] += 1
        else:
            self.idle_deaths += 1
            if self.idle_deaths > DEATHS:
                raise OSError(f"processes end before they read anything (exit code {self.process.exitcode})")
        self._start()

    def give(self, unit: Unit, deaths: Counter[int], folder: Path, settings: Settings) -> None:
        self.unit, self.deaths, self.index = unit, deaths, None
        crashed = {index: CRASHED for index, count in deaths.items() if count >= DEATHS}
        with contextlib.suppress(OSError):  # died meanwhile: reading from it will say so
            self.pipe.send((unit, folder, settings, crashed))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Any) -> None:
    """Converts the units that come through a pipe."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            unit, folder, settings, crashed = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(unit, folder, settings, crashed, pipe.send))


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, even killed: nobody else would."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def attempt(
    unit: Unit, folder: Path, settings: Settings, crashed: dict[int, str], at: Callable[[int], None]
) -> Row | Exception:
    """What became of a unit, or the error that ends the conversion."""
    try:
        return convert_unit(unit, folder, settings, crashed, at)
    except Exception as error:
        return error
