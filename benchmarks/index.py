"""Benchmark of opening a shard set: seconds and memory of a large set, by its index and as version 1 had it.

A set of 1,000 shards of 256 episodes each, 256,000 in all, is laid out with manifest and index (the shards are empty
files of the right size: opening reads none of them). It is opened in processes of their own, in turn:

    index       version 2: the columns are mapped
    members     version 1: a list of episodes in the manifest; as this package reads it today
    workers     memory of a loading process that is sent the set and reads every column: what is its own, with Python's
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the folder above holds the package `benchmarks`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from ivideogpt.data.manifest import MANIFEST, PixelError, ShardRow, commit_set
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.statistics import KINDS, RunningStats

RESULTS = Path(__file__).parent / "results" / "index-cpu.json"
SIZE, FRAMES = 40_000, 30
OPEN = """
import sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from benchmarks import common
from ivideogpt.data.reader import ShardSet
with common.peak_memory(torch.device("cpu")) as result:
    begin = time.perf_counter()
    shards = ShardSet(sys.argv[1])
    seconds = time.perf_counter() - begin
print(seconds, result["growth"], len(shards))
"""
WORKER = """
import pickle, sys
from pathlib import Path
shards = pickle.load(sys.stdin.buffer)
for name in ("shard", "offset", "size", "crc32", "frames", "fps", "source", "camera", "keys", "key_ends"):
    shards.index[name].sum()
rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
sizes = {row.split(":")[0]: int(row.split()[1]) * 1024 for row in rows[1:]}
mapped = Path("/proc/self/maps").read_text().count("index-")
print(sizes["Private_Dirty"], sizes["Rss"], mapped)
"""


def members(shard: int, episodes: int) -> list[dict[str, Any]]:
    return [
        {
            "key": f"robot-{shard:04d}-{number:06d}", "offset": 512 + number * (SIZE + 512), "size": SIZE,
            "crc32": number, "frames": FRAMES, "resolution": [64, 64], "action_dim": 7, "has_rewards": True,
            "fps": 10.0, "source": "robot", "camera": "front", "licence": "MIT",
        } for number in range(episodes)
    ]  # fmt: skip


def lay_out(folder: Path, shards: int, episodes: int) -> None:
    """Version 2 in `folder/index`, version 1 in `folder/members`."""
    for name in ("index", "members"):
        (folder / name).mkdir()
    staged = []
    for number in range(shards):
        path, size = folder / f"{number}.tar", 512 + episodes * (SIZE + 512)
        with open(path, "wb") as file:
            file.truncate(size)

        def row(number: int = number, size: int = size) -> ShardRow:
            blank = {"robot": {kind: RunningStats() for kind in KINDS}}
            return ShardRow(size, f"{number:064x}", members(number, episodes), blank, "delta-zstd", PixelError())

        staged.append((path, row))
    commit_set(folder / "index", staged)
    manifest = json.loads((folder / "index" / MANIFEST).read_text())
    manifest["schema_version"] = 1
    for number, shard in enumerate(manifest["shards"]):
        (folder / "members" / shard["name"]).hardlink_to(folder / "index" / shard["name"])
        shard["members"] = members(number, episodes)
        del shard["episodes"]
    (folder / "members" / MANIFEST).write_text(json.dumps(manifest))


def opened(folder: Path) -> dict[str, Any]:
    words = [sys.executable, "-c", OPEN, str(folder), str(Path(__file__).resolve().parents[1])]
    seconds, growth, episodes = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    return {"seconds": float(seconds), "peak_growth_bytes": int(growth), "episodes": int(episodes)}


def worker(sent: bytes) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", WORKER], input=sent, capture_output=True, check=True)
    own, resident, mapped = map(int, done.stdout.split())
    return {"own_bytes": own, "resident_bytes": resident, "maps_the_index": mapped}


def main() -> None:
    import pickle

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=256, help="of a shard")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = common.describe_machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        lay_out(folder, args.shards, args.episodes)
        laid_out = time.perf_counter() - begin
        runs: dict[str, list[dict[str, Any]]] = {"index": [], "members": []}
        for _ in range(args.repeats):
            for side, rows in runs.items():
                rows.append(opened(folder / side))
        sent = {side: pickle.dumps(ShardSet(folder / side)) for side in runs}
        workers = {side: [worker(data) for _ in range(2)] for side, data in sent.items()}
        index = next((folder / "index").glob("index-*"))
        sizes = {
            "index": index.stat().st_size + (folder / "index" / MANIFEST).stat().st_size,
            "members": (folder / "members" / MANIFEST).stat().st_size,
        }
    result = {
        "date": common.now(),
        "machine": machine,
        "versions": common.describe_versions(("numpy", "ivideogpt")),
        "settings": {"shards": args.shards, "episodes_of_a_shard": args.episodes},
        "files_bytes": sizes,
        "sent_bytes": {side: len(data) for side, data in sent.items()},
        "laid_out_seconds": laid_out,
        "opened": runs,
        "workers": workers,
        "load_average_after": list(os.getloadavg()),
    }
    common.write_json(args.out, result)
    table = [
        [side, f"{common.summary([run['seconds'] for run in found])['median']:.2f}",
         f"{max(run['peak_growth_bytes'] for run in found) / 2**20:.0f}", f"{sizes[side] / 2**20:.1f}",
         f"{len(sent[side]) / 2**20:.2f}", f"{workers[side][0]['own_bytes'] / 2**20:.0f}"]
        for side, found in runs.items()
    ]  # fmt: skip
    common.print_table(
        f"Opening {args.shards} shards of {args.episodes} episodes",
        ("as", "seconds", "peak growth, MiB", "files, MiB", "sent to a worker, MiB", "its own memory, MiB"), table,
    )  # fmt: skip


if __name__ == "__main__":
    main()
