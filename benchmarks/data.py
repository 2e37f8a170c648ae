"""Benchmark of training data: clips a second from shards against a Dataset over compressed .npz, on so many cores.

    python benchmarks/data.py [--repeats 5] [--frames 30 300] [--resolutions 64 256] [--workers 1 2] [--camera FILE]

ours   shards -> `VideoDataModule` -> batches ready for the model; the augmentation is part of the data module
npz    what the original does: one .npz an episode, decoded as a whole for each clip; each frame is cropped and resized
       as floats, becomes a PIL image, goes through torchvision's four functional colour operations and back

Both sides give float32 clips in [0, 1] of the same episodes, in one process, in turn. The process and its workers may
use as many cores as there are workers. One run is one pass of a loader from its first request to its last batch, with
all that its workers do, so that nothing is prefetched outside of the clock; the workers are started in a pass in front.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if str(Path(__file__).resolve().parents[1]) not in sys.path:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from ivideogpt.data import Episode, ShardSet, ShardSetWriter, VideoDataModule
from ivideogpt.data.packing import pack

CPU = torch.device("cpu")
SIDES = ("npz", "ours")
TARGETS = {"augmented at 64 px": 5.0, "augmented at 300 frames": 10.0, "bytes of npz": 1.2, "start-up, s": 1.0}


class NpzClips(Dataset[tuple[Tensor, Tensor]]):
    """Clips of a folder of compressed .npz (`video` (T, H, W, C) uint8) the way the original makes them."""

    def __init__(self, folder: Path, clips: int, segment_length: int, resolution: int, augment: bool) -> None:
        self.files = sorted(folder.glob("*.npz"))
        self.clips, self.segment_length, self.resolution, self.augment = clips, segment_length, resolution, augment

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        from torchvision.transforms import functional

        rng = np.random.default_rng(number)
        with np.load(self.files[number % len(self.files)], allow_pickle=False) as data:
            video, actions = data["video"], data["action"]
        start = int(rng.integers(len(video) - self.segment_length + 1))
        frames = torch.from_numpy(video[start : start + self.segment_length]).permute(0, 3, 1, 2).float()
        chosen = torch.from_numpy(actions[start : start + self.segment_length])
        size = [self.resolution, self.resolution]
        if not self.augment:
            return functional.resize(frames / 255, size), chosen
        side = self.resolution
        height, width = (int(side * rng.uniform(0.9, 1.0)) for _ in range(2))
        top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
        factors = {
            functional.adjust_brightness: rng.uniform(0.9, 1.1),
            functional.adjust_contrast: rng.uniform(0.9, 1.1),
            functional.adjust_saturation: rng.uniform(0.9, 1.1),
            functional.adjust_hue: rng.uniform(-0.05, 0.05),
        }
        steps = [list(factors.items())[i] for i in rng.permutation(4)]
        out = []
        for frame in frames:
            image = functional.to_pil_image(functional.resized_crop(frame, top, left, height, width, size) / 255)
            for adjust, factor in steps:
                image = adjust(image, factor)
            out.append(functional.to_tensor(image))
        return torch.stack(out), chosen


def recordings(camera: str | None, resolution: int) -> list[np.ndarray]:
    """Videos (T, resolution, resolution, 3) uint8: of a file, else the embedded Meta-World ones."""
    from ivideogpt.data.transforms import fit_uint8

    if camera is None:
        shards = ShardSet("embedded:train")
        episodes = [shards.episode(index) for index in range(len(shards))]
        videos = [episode.video for episode in episodes if episode is not None]
    else:
        file, _, key = camera.partition(":")
        with np.load(file, allow_pickle=False) as data:
            videos = [data[key or "image"]]
    tensors = [fit_uint8(torch.from_numpy(video).permute(0, 3, 1, 2), resolution) for video in videos]
    return [video.permute(0, 2, 3, 1).contiguous().numpy() for video in tensors]


def write_npz(folder: Path, videos: list[np.ndarray], episodes: int, frames: int) -> None:
    """Episodes of `frames` frames from somewhere in a recording, which is played to and fro where it is too short."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(episodes):
        video = videos[number % len(videos)]
        fro = np.concatenate([video, video[-2:0:-1]])
        first = int(rng.integers(len(fro)))
        episode = fro[(first + np.arange(frames)) % len(fro)]
        actions = rng.normal(size=(frames, 4)).astype(np.float32)
        np.savez_compressed(folder / f"e{number:05d}.npz", video=episode, action=actions)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def loaders(
    npz: Path, shards: Path, case: dict[str, Any], args: argparse.Namespace, clips: int, batch_size: int
) -> dict[str, Callable[[], int]]:
    """By side, one pass over `clips` clips, which returns how many came."""
    workers, augment, resolution = case["workers"], case["augmented"], case["resolution"]
    data = VideoDataModule(
        str(shards), segment_length=args.segment_length, context_length=2, resolution=resolution,
        batch_size=batch_size, num_workers=workers, augment=augment, epoch_batches=clips // batch_size,
    )  # fmt: skip
    ours = data.train_dataloader()
    theirs = DataLoader(
        NpzClips(npz, clips, args.segment_length, resolution, augment), batch_size, num_workers=workers,
        persistent_workers=True,
    )  # fmt: skip
    shape = (batch_size, args.segment_length, 3, resolution, resolution)

    def check(video: Tensor) -> int:
        assert video.shape == shape and video.dtype == torch.float32 and video.is_contiguous()
        return len(video)

    return {
        "npz": lambda: sum(check(video) for video, _ in theirs),
        "ours": lambda: sum(check(data.on_after_batch_transfer(batch)["video"]) for batch in ours),
    }


def measure_case(npz: Path, shards: Path, case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Clips a second of both sides, in turn, on as many cores as there are workers."""
    batch_size = max(args.batch_size // (4 if case["resolution"] > 128 else 1), 1)
    clips = max(args.clips // (4 if case["resolution"] > 128 else 1), 2 * batch_size) // batch_size * batch_size
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[: case["workers"]])  # the workers inherit it
    try:
        sides = loaders(npz, shards, case, args, clips, batch_size)
        for name, run in sides.items():  # starts the workers and fills the caches
            if run() != clips:
                raise RuntimeError(f"{name} did not give {clips} clips")
        runs = {name: lambda run=run: [common.timed(run, CPU)] for name, run in sides.items()}
        seconds = common.alternate(runs, dict.fromkeys(sides, args.repeats))
    finally:
        os.sched_setaffinity(0, allowed)
    results: dict[str, Any] = {}
    for name in SIDES:
        stats = common.summary([clips / run[0] for run in seconds[name]])
        results[name] = {"seconds": [run[0] for run in seconds[name]], "clips_per_second": stats}
    ratio = results["ours"]["clips_per_second"]["median"] / results["npz"]["clips_per_second"]["median"]
    return case | {"clips": clips, "sides": results, "ratio": ratio}


def measure_start(folder: Path, shards: int, episodes: int, repeats: int) -> dict[str, Any]:
    """Seconds until a set of so many shards is open, and until the data module's first batch is there."""
    frame = np.zeros((4, 8, 8, 3), np.uint8)
    with ShardSetWriter(folder, shard_episodes=episodes) as writer:
        for number in range(shards * episodes):
            writer.write(f"e{number:07d}", Episode(frame, actions=np.zeros((4, 2), np.float32), fps=3.0))

    def first_batch() -> None:
        data = VideoDataModule(str(folder), segment_length=4, resolution=8, batch_size=2, num_workers=0)
        data.on_after_batch_transfer(next(iter(data.train_dataloader())))

    found = len(list(folder.glob("*.tar")))
    assert found == shards, f"{found} shards"
    opening = [common.timed(lambda: ShardSet(folder), CPU) for _ in range(repeats)]
    first = [common.timed(first_batch, CPU) for _ in range(repeats)]
    return {
        "shards": shards, "episodes": shards * episodes,
        "open": {"seconds": opening, "stats": common.summary(opening)},
        "first_batch": {"seconds": first, "stats": common.summary(first)},
    }  # fmt: skip


def targets_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is asked, the worst of what was measured, and whether that is enough."""
    cases = [case for case in record["cases"] if case["augmented"]]
    found: dict[str, list[float]] = {
        "augmented at 64 px": [-case["ratio"] for case in cases if case["resolution"] == 64],
        "augmented at 300 frames": [-case["ratio"] for case in cases if case["frames"] == 300],
        "bytes of npz": [row["shards"] / row["npz"] for row in record["bytes"]],
        "start-up, s": [record["start"]["first_batch"]["stats"]["median"]],
    }
    result = {}
    for name, values in found.items():
        if values:
            worst = abs(max(values))
            reached = worst <= TARGETS[name] if values[0] > 0 else worst >= TARGETS[name]
            result[name] = {"target": TARGETS[name], "worst": worst, "reached": reached}
    return result


def main(words: list[str] | None = None) -> int:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[30, 300], help="of an episode (30 300)")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 256], help="pixels (64 256)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="and cores (1 2)")
    parser.add_argument("--camera", metavar="FILE[:KEY]", help="npz of a recording to cut the episodes from; else the "
                        "embedded ones, enlarged where they are too small")  # fmt: skip
    parser.add_argument("--clips", type=int, default=64, help="clips of a run; a quarter above 128 px (64)")
    parser.add_argument("--segment-length", type=int, default=16, help="frames of a clip (16)")
    parser.add_argument("--batch-size", type=int, default=16, help="clips of a batch; a quarter above 128 px (16)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side (5)")
    parser.add_argument("--start-shards", type=int, default=1000, help="shards of the set that is opened (1000)")
    parser.add_argument("--start-episodes", type=int, default=20, help="episodes of each of them (20)")
    parser.add_argument("--out", type=Path, help="JSON (results/data-cpu.json)")
    args = parser.parse_args(words)
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("this benchmark needs a system that can give a process its cores (Linux)")
    if max(args.workers) > len(os.sched_getaffinity(0)):
        raise SystemExit(f"--workers {max(args.workers)}: there are {len(os.sched_getaffinity(0))} cores")
    torch.set_num_threads(1)  # the cores are the workers'; the collecting process has them when they wait
    machine = common.describe_machine(CPU)
    cases, sizes = [], []
    for resolution in args.resolutions:
        videos = recordings(args.camera, resolution)
        for frames in args.frames:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_npz(folder / "npz", videos, max(2400 // frames // (4 if resolution > 128 else 1), 2), frames)
                pack(folder / "npz", folder / "shards")
                sizes.append({"resolution": resolution, "frames": frames, "npz": size_of(folder / "npz"),
                              "shards": size_of(folder / "shards")})  # fmt: skip
                for workers in args.workers:
                    for augmented in (False, True):
                        case = {"resolution": resolution, "frames": frames, "workers": workers, "augmented": augmented}
                        print(case, file=sys.stderr)
                        cases.append(measure_case(folder / "npz", folder / "shards", case, args))
    with tempfile.TemporaryDirectory() as name:
        start = measure_start(Path(name) / "set", args.start_shards, args.start_episodes, args.repeats)
    record: dict[str, Any] = {
        "benchmark": "data",
        "version": 1,
        "date": common.now(),
        "machine": machine | {"load_average_at_end": common.describe_machine(CPU)["load_average"]},
        "versions": common.describe_versions(("torch", "torchvision", "pillow", "numpy", "ivideogpt")),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "camera")}
        | {"recordings": "embedded:train" if args.camera is None else Path(args.camera).name},
        "cases": cases,
        "bytes": sizes,
        "start": start,
    }
    record["targets"] = targets_of(record)
    common.write_json(args.out or Path(__file__).parent / "results" / "data-cpu.json", record)
    report(record)
    return 0


def report(record: dict[str, Any]) -> None:
    """Prints the tables and which targets are reached."""
    rows = [
        (f"{case['resolution']} px, {case['frames']} frames{', augmented' if case['augmented'] else ''}",
         str(case["workers"]), *(f"{case['sides'][name]['clips_per_second']['median']:.1f}" for name in SIDES),
         f"{case['ratio']:.1f}x")
        for case in record["cases"]
    ]  # fmt: skip
    common.print_table("Clips a second", ("episodes", "workers and cores", *SIDES, "ratio"), rows)
    rows = [
        (f"{row['resolution']} px, {row['frames']} frames", f"{row['npz']:,}", f"{row['shards']:,}",
         f"{row['shards'] / row['npz']:.2f}")
        for row in record["bytes"]
    ]  # fmt: skip
    common.print_table("Bytes", ("episodes", *SIDES, "ratio"), rows)
    start = record["start"]
    notes = [f"a set of {start['shards']} shards, {start['episodes']} episodes: open after "
             f"{statistics.median(start['open']['seconds']):.2f} s, first batch after "
             f"{statistics.median(start['first_batch']['seconds']):.2f} s"]  # fmt: skip
    rows = [
        (name, f"{row['target']:g}", f"{row['worst']:.2f}", "reached" if row["reached"] else "not reached")
        for name, row in record["targets"].items()
    ]
    common.print_table("Targets", ("of the worst case", "target", "found", ""), rows, notes)


if __name__ == "__main__":
    sys.exit(main())
