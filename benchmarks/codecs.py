"""Benchmark of ways to store an episode's frames: bytes against compressed npz, encoding, and reading a clip.

A candidate is a filter over the frames of a block, a compressor of its bytes and the length of a block; all of them but
JPEG are lossless. Each encodes and reads the same recordings, in turn and on one core, in memory: files, headers and
hashes, which are the same for all, are left out.

    filters       none; before: difference to the frame before; left, up: also the first frame's difference to the pixel
                  on its left or above; planes: `left`, then the colours one after another; time: `before`, then a
                  pixel's frames side by side
    dictionary    (`first`) the episode's first frame, filtered, is a zstd dictionary of all blocks
    npz           np.savez_compressed of the whole episode, which is read whole for every clip
    recordings    metaworld: embedded in the package; bair, rt1: `../shared/data` (or $IVIDEOGPT_SHARED), where there
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import sys
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from PIL import Image

if not __package__:  # run as a file: the folder above holds the package `benchmarks`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.transforms import fit_uint8

RESULTS = Path(__file__).parent / "results" / "codecs-cpu.json"
SHARED = Path(os.environ.get("IVIDEOGPT_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
CLIP = 16


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to store frames.

    Args:
        filter: Of the frames of a block.
        compressor: `zlib-6`, `zstd-3`, `lz4-0`, `jpeg-95`, `npz`.
        block: Frames of a block.
        dictionary: Whether the first frame is a dictionary.
    """

    filter: str
    compressor: str
    block: int = 8
    dictionary: bool = False

    @property
    def name(self) -> str:
        first = "+first" if self.dictionary else ""
        return self.compressor if self.compressor == "npz" else f"{self.filter}+{self.compressor}{first}/{self.block}"


def candidates() -> list[Candidate]:
    """Compressed npz and the codec that was the default before come first."""
    found = [Candidate("", "npz"), Candidate("before", "zlib-6")]
    found += [Candidate("before", "zlib-6", 16), Candidate("before", "zlib-1"), Candidate("before", "zlib-9")]
    found += [Candidate("before", f"lz4-{level}", block) for level in (0, 9) for block in (8, 16)]
    found += [Candidate("before", "zstd-3", block) for block in (1, 4, 8)]
    found += [Candidate("before", f"zstd-{level}", 16) for level in (-1, 1, 2, 3, 4, 6, 9, 12)]
    found += [Candidate(name, "zstd-3", 16) for name in ("none", "left", "up", "planes", "time")]
    found += [Candidate(name, "zstd-3", 8, dictionary=True) for name in ("none", "before", "left", "up")]
    found += [Candidate(name, "zstd-3", 16, dictionary=True) for name in ("before", "up")]
    return found + [Candidate("none", f"jpeg-{quality}", 1) for quality in (90, 95)]


# Filters: (T, H, W, C) uint8 -> an array of as many bytes, and back into `out`


def filtered(name: str, block: np.ndarray) -> np.ndarray:
    if name == "none":
        return block
    out = block.copy()
    out[1:] -= block[:-1]
    if name in ("left", "planes"):
        out[0, :, 1:] -= block[0, :, :-1]
    if name == "up":
        out[0, 1:] -= block[0, :-1]
    if name == "planes":
        return np.ascontiguousarray(out.transpose(0, 3, 1, 2))
    return np.ascontiguousarray(out.transpose(1, 2, 3, 0)) if name == "time" else out


def restored(name: str, data: Any, out: np.ndarray) -> None:
    frames, height, width, channels = out.shape
    raw = np.frombuffer(data, np.uint8)
    if name == "planes":
        out[:] = raw.reshape(frames, channels, height, width).transpose(0, 2, 3, 1)
    elif name == "time":
        out[:] = raw.reshape(height, width, channels, frames).transpose(3, 0, 1, 2)
    else:
        out[:] = raw.reshape(out.shape)
    if name == "none":
        return
    if name in ("left", "planes"):
        np.cumsum(out[0], axis=1, dtype=np.uint8, out=out[0])
    if name == "up":
        for row in range(1, height):
            np.add(out[0, row], out[0, row - 1], out=out[0, row])
    for number in range(1, frames):
        np.add(out[number], out[number - 1], out=out[number])


@cache
def compressor(name: str) -> tuple[Callable[[Any], bytes], Callable[[Any, int], Any]]:
    """(compress, decompress to so many bytes)."""
    kind, level = name.split("-", 1)
    if kind == "zlib":
        return lambda data: zlib.compress(data, int(level)), lambda data, size: zlib.decompress(data, bufsize=size)
    if kind == "lz4":
        import lz4.block

        mode = {"mode": "high_compression", "compression": int(level)} if int(level) else {}
        return (
            lambda data: lz4.block.compress(data, store_size=False, **mode),
            lambda data, size: lz4.block.decompress(data, uncompressed_size=size),
        )
    assert kind == "zstd"
    writer, reader = zstandard.ZstdCompressor(int(level), write_checksum=True), zstandard.ZstdDecompressor()
    return writer.compress, lambda data, size: reader.decompress(data)


class Encoded:
    """An episode in memory in the way of a candidate."""

    def __init__(self, candidate: Candidate, video: np.ndarray) -> None:
        self.candidate, self.shape = candidate, video.shape
        kind, _, level = candidate.compressor.partition("-")
        if kind == "npz":
            file = io.BytesIO()
            np.savez_compressed(file, video=video)
            self.blocks = [file.getvalue()]
            return
        if kind == "jpeg":
            self.blocks = [_jpeg(frame, int(level)) for frame in video]
            return
        pack, self.unpack = compressor(candidate.compressor)
        parts = [video[first : first + candidate.block] for first in range(0, len(video), candidate.block)]
        if not candidate.dictionary:
            self.blocks = [pack(filtered(candidate.filter, np.ascontiguousarray(part))) for part in parts]
            return
        first = filtered(candidate.filter, video[:1]).tobytes()
        first_frame = zstandard.ZstdCompressionDict(first, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        writer = zstandard.ZstdCompressor(int(level), write_checksum=True, dict_data=first_frame)
        self.blocks = [pack(first)]  # the dictionary, which each reading takes
        self.blocks += [writer.compress(filtered(candidate.filter, np.ascontiguousarray(part)).data) for part in parts]

    @property
    def size(self) -> int:
        return sum(map(len, self.blocks))

    def clip(self, start: int, length: int) -> np.ndarray:
        """Frames start .. start + length - 1."""
        candidate = self.candidate
        if candidate.compressor == "npz":
            return np.load(io.BytesIO(self.blocks[0]))["video"][start : start + length].copy()
        if candidate.compressor.startswith("jpeg"):
            return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in self.blocks[start : start + length]])
        unpack, blocks = self.unpack, self.blocks
        if candidate.dictionary:
            frame = self.unpack(blocks[0], 0)
            first = zstandard.ZstdCompressionDict(frame, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            reader, blocks = zstandard.ZstdDecompressor(dict_data=first), blocks[1:]

            def unpack(data: bytes, size: int) -> bytes:
                return reader.decompress(data)

        out = np.empty((length, *self.shape[1:]), np.uint8)
        for number in range(start // candidate.block, (start + length - 1) // candidate.block + 1):
            begin = number * candidate.block
            block = np.empty((min(candidate.block, self.shape[0] - begin), *self.shape[1:]), np.uint8)
            restored(candidate.filter, unpack(blocks[number], block.nbytes), block)
            low, high = max(start, begin), min(start + length, begin + len(block))
            out[low - start : high - start] = block[low - begin : high - begin]
        return out


def _jpeg(frame: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "jpeg", quality=quality, subsampling=0)
    return file.getvalue()


# Recordings


def recordings() -> dict[str, list[np.ndarray]]:
    """Videos by `source, pixels x frames`."""
    embedded, rng = ShardSet("embedded:train"), np.random.default_rng(0)
    episodes = [episode.video for i in range(len(embedded)) if (episode := embedded.episode(i)) is not None]
    short = []
    for video in episodes[:: max(len(episodes) // 12, 1)]:
        start = int(rng.integers(0, len(video) - 30 + 1))
        short.append(np.ascontiguousarray(video[start : start + 30]))
    joined = np.concatenate(episodes)  # 300 frames in a row: some episodes one after another
    found = {"metaworld, 64 px x 30": short, "metaworld, 64 px x 300": [joined[i : i + 300] for i in (0, 600, 1200)]}
    if (SHARED / "bair_sample.npz").is_file():
        with np.load(SHARED / "bair_sample.npz") as sample:
            found["bair, 64 px x 30"] = [sample[name].astype(np.uint8) for name in ("image", "aux1_image")]
    if (SHARED / "fractal_sample.npz").is_file():
        with np.load(SHARED / "fractal_sample.npz") as sample:
            frames = torch.from_numpy(sample["image"]).permute(0, 3, 1, 2)
        for pixels in (64, 256):
            video = np.ascontiguousarray(fit_uint8(frames, pixels).permute(0, 2, 3, 1).numpy())
            found[f"rt1, {pixels} px x {len(video)}"] = [video]
    return found


def psnr(video: np.ndarray, other: np.ndarray) -> float | None:
    """Decibel over all values; None where they are equal."""
    error = np.mean((video.astype(np.float64) - other) ** 2)
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def measure(candidate: Candidate, videos: list[np.ndarray], seconds: float) -> dict[str, float | None]:
    """Bytes, episodes encoded a second, clips read a second, error."""
    encoded = [Encoded(candidate, video) for video in videos]
    back = [one.clip(0, len(video)) for one, video in zip(encoded, videos, strict=True)]
    errors = [psnr(video, other) for video, other in zip(videos, back, strict=True)]
    lossy = [error for error in errors if error is not None]
    assert not lossy or candidate.compressor.startswith("jpeg")
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        Encoded(candidate, videos[count % len(videos)])
        count += 1
    encode = count / (time.perf_counter() - begin)
    rng = np.random.default_rng(0)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        one = encoded[count % len(encoded)]
        one.clip(int(rng.integers(0, one.shape[0] - CLIP + 1)), CLIP)
        count += 1
    return {
        "bytes": sum(one.size for one in encoded), "encode_episodes_a_second": encode,
        "clips_a_second": count / (time.perf_counter() - begin), "psnr": min(lossy) if lossy else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="in which all candidates take turns")
    parser.add_argument("--only", default="", help="recordings whose name begins so")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = common.describe_machine(torch.device("cpu"))
    results: dict[str, dict[str, Any]] = {}
    for source, videos in recordings().items():
        if not source.startswith(args.only):
            continue
        runs: dict[str, list[dict[str, float | None]]] = {}
        for _ in range(args.rounds):
            for candidate in candidates():
                runs.setdefault(candidate.name, []).append(measure(candidate, videos, args.seconds))
        npz = runs["npz"][0]["bytes"]
        assert npz is not None
        results[source] = {
            name: {
                "of_npz": (rows[0]["bytes"] or 0) / npz,
                "of_raw": (rows[0]["bytes"] or 0) / sum(video.nbytes for video in videos),
                "psnr": rows[0]["psnr"],
                **{rate: common.summary([row[rate] or 0 for row in rows])
                   for rate in ("encode_episodes_a_second", "clips_a_second")},
            } for name, rows in runs.items()
        }  # fmt: skip
        rows = [
            [name, f"{row['of_npz']:.3f}", f"{row['encode_episodes_a_second']['median']:.0f}",
             f"{row['clips_a_second']['median']:.0f}", "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"]
            for name, row in results[source].items()
        ]  # fmt: skip
        common.print_table(source, ("codec", "bytes of npz", "encoded/s", "clips/s", "error"), rows)
    result = {
        "date": common.now(),
        "machine": machine,
        "versions": common.describe_versions(("numpy", "zstandard", "lz4", "pillow", "ivideogpt")),
        "settings": {"clip": CLIP, "processes": 1, "seconds": args.seconds, "rounds": args.rounds},
        "results": results,
        "load_average_after": list(os.getloadavg()),
    }
    common.write_json(args.out, result)


if __name__ == "__main__":
    main()
