"""Runs units as tasks of a Ray cluster, whose machines see the source and the output folder under the same paths.

A task whose process or machine dies is started again by Ray. One that dies again runs with a note, beside the staged
units, of the episode that it reads; the episode that it then dies of is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ivideogpt.data.conversion.local import Done, Progress, attempt
from ivideogpt.data.conversion.plan import Settings, Unit
from ivideogpt.data.conversion.unit import CRASHED, Row

RETRIES = 1
UNDER_WAY = 2
"""Tasks that are handed to Ray for each processor of the cluster."""


def run_on_ray(
    units: Sequence[Unit], folder: Path, settings: Settings, progress: Progress, workers: int
) -> Iterator[Done]:
    """Converts units on the cluster that `RAY_ADDRESS` or an earlier `ray.init` names, or else on this machine.

    Args:
        units: What to convert.
        folder: Staging folder, on a file system that every machine sees.
        settings: What is done to each episode.
        progress: Called with the number of episodes done so far.
        workers: Processes, where a cluster is started on this machine.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--engine ray needs Ray ({error}); install it with: pip install 'ivideogpt[ray]'") from error
    started = not ray.is_initialized()
    if started:
        _start(ray, workers)
    try:
        yield from _run(ray, units, folder, settings, progress)
    finally:
        if started:
            ray.shutdown()


def _start(ray: Any, workers: int) -> None:
    import os

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)


def _run(ray: Any, units: Sequence[Unit], folder: Path, settings: Settings, progress: Progress) -> Iterator[Done]:
    task = ray.remote(num_cpus=1)(_task)
    waiting = deque(units)
    running: dict[Any, tuple[Unit, dict[int, str]]] = {}
    most = max(int(UNDER_WAY * ray.cluster_resources().get("CPU", 1)), 2)
    finished = 0

    def start(unit: Unit, crashed: dict[int, str], note: bool) -> None:
        options = task.options(max_retries=0 if note else RETRIES)
        running[options.remote(unit, str(folder), settings, crashed, note)] = unit, crashed

    while waiting or running:
        while waiting and len(running) < most:
            start(waiting.popleft(), {}, note=False)
        for ready in ray.wait(list(running))[0]:
            unit, crashed = running.pop(ready)
            try:
                result: Row | Exception = ray.get(ready)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError):
                start(unit, _with_noted(folder, unit, crashed), note=True)
                continue
            _note_file(folder, unit).unlink(missing_ok=True)
            finished += unit.episodes
            progress(finished)
            yield unit, result


def _task(unit: Unit, folder: str, settings: Settings, crashed: dict[int, str], note: bool) -> Row | Exception:
    import torch

    torch.set_num_threads(1)
    at: Callable[[int], None] = partial(_write_note, _note_file(Path(folder), unit)) if note else _ignore
    return attempt(unit, Path(folder), settings, crashed, at)


def _ignore(index: int) -> None:
    """Ray tells when a whole unit is done; that is progress enough."""


def _note_file(folder: Path, unit: Unit) -> Path:
    return folder / f"unit-{unit.number:06d}.at"


def _write_note(file: Path, index: int) -> None:
    file.write_text(str(index), encoding="utf-8")


def _with_noted(folder: Path, unit: Unit, crashed: dict[int, str]) -> dict[int, str]:
    try:
        return crashed | {int(_note_file(folder, unit).read_text(encoding="utf-8")): CRASHED}
    except (OSError, ValueError):  # without a note: it died before it read anything
        return crashed
