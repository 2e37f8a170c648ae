"""gFVD: the FVD of class-conditional generation, of two folders that hold a folder of clips for each class.

    real/Archery/v_1.mp4       generated/Archery/0.gif       a clip is a video, or a folder of .png or .jpg files
    real/Bowling/v_7.mp4       generated/Bowling/0.gif

All classes go into one distance, so that a class that is generated badly, or as another, counts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ivideogpt.data.sources.video import VIDEO_SUFFIXES, find_videos, read_video
from ivideogpt.metrics.frechet import VideoFrechetDistance
from ivideogpt.metrics.measuring import full_float32
from ivideogpt.metrics.networks import FeatureNetwork

CLIP_FRAMES = 17
CLIP_SIZE = 256
BATCH_SIZE = 8
"""Clips that are in memory at once."""

LOSSLESS = (".gif",)


@dataclass(frozen=True)
class ClassDistance:
    """The distance of generated from real clips.

    Attributes:
        distance: Frechet distance over the clips of all classes.
        label: what it is called: gFVD only with the published network.
        real: clips of each class.
        generated: clips of each class.
        notes: what a reader of the distance must know, in words.
    """

    distance: float
    label: str
    real: dict[str, int]
    generated: dict[str, int]
    notes: list[str]


def class_distance(
    real: str | os.PathLike[str],
    generated: str | os.PathLike[str],
    network: FeatureNetwork,
    frames: int = CLIP_FRAMES,
    size: int = CLIP_SIZE,
    device: torch.device | str = "cpu",
    watch: Callable[[int, int], None] | None = None,
) -> ClassDistance:
    """Frechet distance of the clips in two folders of classes.

    Args:
        real: folder with a folder for each class.
        generated: folder with the same classes.
        network: turns clips into features.
        frames: of a clip; of a longer one the first count.
        size: height and width of a clip in pixels.
        device: where the network runs.
        watch: is told how many clips of how many are done.

    Raises:
        ValueError: if the classes differ, a clip is too short, of another size or does not decode, or there are too
            few.
    """
    found = {True: _clips(Path(real)), False: _clips(Path(generated))}
    counts = {whose: Counter(name for name, _ in clips) for whose, clips in found.items()}
    for whose, other in ((True, False), (False, True)):
        missing = sorted(set(counts[other]) - set(counts[whose]))
        if missing:
            raise ValueError(
                f"{real if whose else generated} has no clip of {len(missing)} of the classes of "
                f"{generated if whose else real}: {', '.join(missing[:5])}"
            )
    metric = VideoFrechetDistance(network)
    done, total = 0, sum(len(clips) for clips in found.values())
    with full_float32():
        for whose, clips in found.items():
            for batch in _batches([path for _, path in clips], frames, size):
                metric.update(batch.to(device), real=whose)
                done += len(batch)
                if watch is not None:
                    watch(done, total)
    notes = metric.notes()
    shares = {whose: {name: count / counts[whose].total() for name, count in counts[whose].items()} for whose in counts}
    uneven = [name for name in shares[True] if abs(shares[True][name] - shares[False][name]) > 0.01]
    if uneven:
        notes.append(
            f"{len(uneven)} classes have another share of the generated than of the real clips (first: {uneven[0]!r}): "
            "the distance counts that too"
        )
    lossy = [path for clips in found.values() for _, path in clips if path.suffix.lower() in VIDEO_SUFFIXES]
    lossy = [path for path in lossy if path.suffix.lower() not in LOSSLESS]
    if lossy:
        notes.append(f"{len(lossy)} clips are compressed videos, whose losses count too (first: {lossy[0].name})")
    label = "gFVD" if network.is_reference else metric.label
    return ClassDistance(float(metric.compute()), label, dict(counts[True]), dict(counts[False]), notes)


def _clips(folder: Path) -> list[tuple[str, Path]]:
    """(class, clip) of all clips in the classes of a folder."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    clips = [(path.name, clip) for path in classes for clip in find_videos(path)]
    if not clips:
        raise ValueError(
            f"{folder} holds no clips: it must hold a folder for each class, with a video or a folder of images for "
            "each clip"
        )
    return clips


def _batches(clips: list[Path], frames: int, size: int) -> Iterator[Tensor]:
    """Batches of clips (B, T, 3, H, W), uint8."""
    for first in range(0, len(clips), BATCH_SIZE):
        batch = []
        for path in clips[first : first + BATCH_SIZE]:
            video = torch.from_numpy(read_video(path).video)  # (T, H, W, C)
            if len(video) < frames or tuple(video.shape[1:]) != (size, size, 3):
                raise ValueError(
                    f"{path} has {len(video)} frames of {video.shape[1]} x {video.shape[2]} pixels; the clips must "
                    f"have {frames} frames or more of {size} x {size}: cut and resize them before"
                )
            batch.append(video[:frames].permute(0, 3, 1, 2))
        yield torch.stack(batch)
