"""What all benchmarks share: the machine and its measured rates, alternate timing, peak memory, JSON and tables.

All rates are measured by the process that runs the benchmark, on the threads and the device that it runs on.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
"""Instruction sets that decide how fast low precision is."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, load and, for a CUDA device, the GPU."""
    machine: dict[str, Any] = {
        "device": device.type,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
    }
    lines = _lines("/proc/cpuinfo")
    machine["cpu"] = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), machine["cpu"])
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    machine["cpu_features"] = [name for name in CPU_FEATURES if name in flags]
    total = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), None)
    machine["memory_gib"] = round(int(total) / 2**20, 1) if total else None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        machine["cuda"] = torch.version.cuda
    return machine


def describe_versions(packages: Sequence[str] = ("torch", "transformers", "ivideogpt")) -> dict[str, Any]:
    """Versions of what was measured, and the commit of the ``ivideogpt`` that is imported."""
    import ivideogpt

    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    folder = Path(ivideogpt.__file__).parent
    versions["commit"] = _git(folder, "rev-parse", "HEAD")
    # a result of uncommitted sources must not pass for one of the commit
    versions["uncommitted_changes"] = bool(_git(folder, "status", "--porcelain", "--", "."))
    return versions


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def synchronize(device: torch.device) -> None:
    """Waits until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that ``work`` takes, all that it started on ``device`` included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def timed_in_a_row(work: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Seconds of each of ``count`` calls of ``work``.

    On a GPU what passes on it from the end of one to the end of the next, the host being free to run ahead.
    """
    if device.type != "cuda":
        return [timed(work, device) for _ in range(count)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    synchronize(device)
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def alternate(
    runs: Mapping[str, Callable[[], list[float]]],
    repeats: Mapping[str, int],
    on_run: Callable[[str, int], None] = lambda name, index: None,
) -> dict[str, list[list[float]]]:
    """Runs A, B, A, B, ... so that what the machine does meanwhile hits all sides alike.

    Args:
        runs: by name; each returns the seconds that it measured.
        repeats: by name; a side with fewer of them sits out the last rounds.
        on_run: told in front of each run, for progress.

    Returns:
        By name, the seconds of each run.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in runs}
    for index in range(max(repeats.values(), default=0)):
        for name, run in runs.items():
            if index < repeats[name]:
                on_run(name, index)
                seconds[name].append(run())
    return seconds


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and 99th percentile (the value that at most 1 % lie above) of ``values``."""
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "mean": statistics.fmean(ordered),
        "p99": ordered[math.ceil(0.99 * len(ordered)) - 1],
    }


def measure_bandwidth(device: torch.device, size: int | None = None, repeats: int = 5) -> dict[str, float]:
    """Bytes a second by each way tried, and the best of them under ``"best"``.

    On a CPU several ways to read a buffer far larger than the caches (1 GiB), on all threads; on a GPU a copy within
    the device's memory (4 GiB), of which read and write are both counted.
    """
    if device.type == "cuda":
        source = torch.ones((size or 2**32) // 4, device=device)
        target = torch.empty_like(source)
        ways: dict[str, tuple[Callable[[], Any], int]] = {"copy": (lambda: target.copy_(source), 2 * source.nbytes)}
    else:
        buffer = torch.ones((size or 2**30) // 4)
        halves, rows = buffer.chunk(2), buffer.view(-1, 4096)
        vector = torch.ones(4096)
        ways = {
            "sum": (buffer.sum, buffer.nbytes),
            "dot": (lambda: torch.dot(*halves), buffer.nbytes),
            "matrix times vector": (lambda: torch.mv(rows, vector), buffer.nbytes),
            "sum, a Python thread a core": (lambda: _sum_in_threads(buffer), buffer.nbytes),
        }
    rates = {}
    for name, (work, count) in ways.items():
        timed(work, device)
        rates[name] = count / min(timed(work, device) for _ in range(repeats))
    return {**rates, "best": max(rates.values())}


def _sum_in_threads(buffer: Tensor) -> None:
    threads = [threading.Thread(target=part.sum) for part in buffer.chunk(torch.get_num_threads())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> float:
    """Floating-point operations a second of a square linear layer in ``dtype``, the best of ``repeats``.

    Two plain matrices are another thing: on a CPU without instructions for bfloat16 they take much longer.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timed(lambda: F.linear(a, b), device)
    return 2 * size**3 / min(timed(lambda: F.linear(a, b), device) for _ in range(repeats))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int | None]]:
    """Fills ``growth`` with the bytes that the work inside needed at its peak, beyond what was held before it.

    On a GPU what torch's allocator handed out. On a CPU the process' resident memory, whose high-water mark Linux can
    reset; the C library gives freed memory back first, so that what lies around is not mistaken for the work's. None
    where that cannot be had.
    """
    result: dict[str, int | None] = {"growth": None}
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result["growth"] = torch.cuda.max_memory_allocated(device) - before
        return
    resettable = _reset_resident_peak()
    resident = _resident("VmRSS")
    yield result
    peak = _resident("VmHWM")
    if resettable and resident is not None and peak is not None:
        result["growth"] = max(0, peak - resident)


def _reset_resident_peak() -> bool:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident(field: str) -> int | None:
    line = next((line for line in _lines("/proc/self/status") if line.startswith(field + ":")), None)
    return None if line is None else int(line.split()[1]) * 1024


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` so that a killed run leaves the file as it was before or as it is after, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> None:
    """Prints a table with its first column to the left and the others to the right, and ``notes`` below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=150, highlight=False)
    console.print(table)
    for note in notes:
        console.print("  " + note, markup=False)
    console.print()
