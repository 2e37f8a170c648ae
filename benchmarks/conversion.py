"""Benchmark of `ivideogpt data pack`: episodes a second on one core, and memory over many episodes.

rate     30-frame 64-px episodes of the embedded Meta-World recordings as compressed .npz, read, encoded and written
         by one process; beside it the same with noise in place of frames, which compresses to nothing
memory   peak of one process over so many made-up episodes of 2 frames of 8 px, which exist only while they are
         converted: what grows with their number is what is kept of each
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # run as a file: the folder above holds the package `benchmarks`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from ivideogpt.data.conversion.listing import Listing, Piece
from ivideogpt.data.conversion.local import run_here
from ivideogpt.data.conversion.plan import Settings, make_plan
from ivideogpt.data.conversion.staging import Staging
from ivideogpt.data.episode import Episode
from ivideogpt.data.packing import pack
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.sources.frames import Job

RESULTS = Path(__file__).parent / "results" / "conversion-cpu.json"
FRAMES, RESOLUTION, PER_PIECE = 30, 64, 512


def measure_rate(episodes: int, noise: bool) -> dict[str, Any]:
    """Packs a folder of compressed .npz; the number of episodes a second, and bytes of both."""
    rng = np.random.default_rng(0)
    shards = ShardSet("embedded:train")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "npz"
        source.mkdir()
        for number in range(episodes):
            episode = shards.episode(number % len(shards))
            assert episode is not None
            start = int(rng.integers(0, len(episode) - FRAMES + 1))
            video = episode.video[start : start + FRAMES]
            assert video.shape == (FRAMES, RESOLUTION, RESOLUTION, 3)
            if noise:
                video = rng.integers(0, 256, video.shape, dtype=np.uint8)
            np.savez_compressed(source / f"e{number:05d}.npz", video=video, action=rng.normal(size=(FRAMES, 4)))
        begin = time.perf_counter()
        pack(source, Path(folder) / "out")
        seconds = time.perf_counter() - begin
        sizes = {path: sum(file.stat().st_size for file in (Path(folder) / path).iterdir()) for path in ("npz", "out")}
    return {
        "episodes": episodes, "seconds": seconds, "episodes_a_second": episodes / seconds,
        "npz_bytes": sizes["npz"], "shard_bytes": sizes["out"],
    }  # fmt: skip


def made_up(number: int) -> Episode:
    return Episode(np.full((2, 8, 8, 3), number % 256, np.uint8), actions=np.zeros((2, 4), np.float32))


def piece(first: int, count: int) -> Iterator[Job]:
    for number in range(first, first + count):
        yield f"e{number:07d}", partial(made_up, number)


def convert_made_up(out: Path, episodes: int) -> int:
    """Converts episodes of a generator, from the plan to the set; the number that it holds."""
    starts = range(0, episodes, PER_PIECE)
    pieces = [Piece(partial(piece, start, min(PER_PIECE, episodes - start)), min(PER_PIECE, episodes - start), 0)
              for start in starts]  # fmt: skip
    plan = make_plan(Listing("made up", pieces, digest=""), Settings(), 0.0, None, {})
    staging = Staging(out, [out], plan, overwrite=False)
    with staging.running(alone=True):
        for _, result in run_here(plan.units, staging.folder, Settings(), lambda done: None):
            if isinstance(result, Exception):
                raise result
        staging.commit("", {})
    return sum(unit.episodes for unit in plan.units)


def measure_memory(episodes: int) -> dict[str, Any]:
    """Peak memory of converting, in a process of its own."""
    words = [sys.executable, __file__, "--memory-of", str(episodes)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    growth, seconds = done.stdout.split()
    return {"episodes": episodes, "peak_growth_bytes": int(growth), "seconds": float(seconds)}


def print_memory(episodes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        convert_made_up(Path(folder) / "warm", 100)  # what is imported on the way
        begin = time.perf_counter()
        with common.peak_memory(torch.device("cpu")) as result:
            convert_made_up(Path(folder) / "out", episodes)
        print(result["growth"], time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000, help="for the rate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[1_000, 10_000, 100_000], help="numbers of episodes")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of is not None:
        print_memory(args.memory_of)
        return
    machine = common.describe_machine(torch.device("cpu"))
    rates: dict[str, list[dict[str, Any]]] = {"recorded": [], "noise": []}
    for _ in range(args.repeats):
        for name, runs in rates.items():
            runs.append(measure_rate(args.episodes, name == "noise"))
    memory = [measure_memory(count) for count in args.memory]
    result = {
        "date": common.now(),
        "machine": machine,
        "versions": common.describe_versions(("torch", "numpy", "ivideogpt")),
        "settings": {"frames": FRAMES, "resolution": RESOLUTION, "processes": 1, "episodes": args.episodes},
        "rate": rates,
        "memory": memory,
        "load_average_after": list(os.getloadavg()),
    }
    common.write_json(args.out, result)
    rows = [
        [name, *(f"{common.summary([run['episodes_a_second'] for run in runs])[key]:.0f}" for key in ("median", "min")),
         f"{runs[0]['shard_bytes'] / runs[0]['npz_bytes']:.2f}"]
        for name, runs in rates.items()
    ]  # fmt: skip
    common.print_table("Episodes a second, one process", ("frames", "median", "least", "bytes of npz"), rows)
    rows = [
        [str(run["episodes"]), f"{run['peak_growth_bytes'] / 2**20:.1f}", f"{run['seconds']:.1f}"] for run in memory
    ]
    common.print_table("Memory", ("episodes", "peak growth, MiB", "seconds"), rows)


if __name__ == "__main__":
    main()
