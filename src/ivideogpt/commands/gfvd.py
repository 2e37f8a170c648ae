"""`ivideogpt gfvd`: the FVD of class-conditional generation, of clips that lie in folders of classes."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from ivideogpt.commands.arguments import at_least, check_place

LISTED = 10
"""Classes that are printed; a result file has all."""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "gfvd",
        help="compare generated clips of classes with real ones",
        description="Frechet video distance of two folders that hold a folder of clips for each class: a clip is a"
        " video, or a folder of .png or .jpg frames. All classes go into one distance (docs/evaluation.md).",
    )
    parser.add_argument("real", metavar="REAL", help="folder of real clips: REAL/CLASS/CLIP")
    parser.add_argument("generated", metavar="GENERATED", help="folder of generated clips of the same classes")
    parser.add_argument("--frames", type=at_least(1), help="of a clip; of a longer one the first (default: 17)")
    parser.add_argument("--size", type=at_least(1), help="pixels a side that clips must have (default: 256)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--fvd-weights", metavar="FILE", help="TorchScript file of the FVD network, or `random` to try things out"
    )
    parser.add_argument("--out", metavar="FILE", help="write the distance and what it is of as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Computes, prints and writes the distance."""
    check_place("out", args.out)
    from rich.console import Console

    from ivideogpt.metrics.class_folders import CLIP_FRAMES, CLIP_SIZE, class_distance
    from ivideogpt.metrics.networks import RANDOM, Missing, find_feature_network
    from ivideogpt.metrics.results import versions, write_results
    from ivideogpt.metrics.terminal import watching

    console = Console(width=None if sys.stdout.isatty() else 160)
    frames, size = args.frames or CLIP_FRAMES, args.size or CLIP_SIZE
    name, path = (RANDOM, None) if args.fvd_weights == RANDOM else ("i3d", args.fvd_weights)
    network = find_feature_network(name, path)
    if isinstance(network, Missing):
        raise ValueError(network.reason)
    with watching(console, "clips") as watch:
        found = class_distance(args.real, args.generated, network, frames, size, args.device, watch)
    counts = [sum(clips.values()) for clips in (found.real, found.generated)]
    print(
        f"{found.label}: {found.distance:.4g}, {counts[1]} generated against {counts[0]} real clips of "
        f"{len(found.real)} classes, {frames} frames of {size} x {size}"
    )
    for entry in sorted(found.real)[:LISTED]:
        print(f"  {entry}: {found.generated[entry]} against {found.real[entry]}")
    if len(found.real) > LISTED:
        print(f"  ... and {len(found.real) - LISTED} more classes")
    for note in found.notes:
        print(f"note: {note}")
    if args.out is not None:
        result = {
            "distance": found.distance, "label": found.label, "is_reference": network.is_reference,
            "network": network.name, "sha256": network.sha256, "frames": frames, "size": size, "device": args.device,
            "real": {"folder": args.real, "clips": found.real},
            "generated": {"folder": args.generated, "clips": found.generated}, "notes": found.notes,
            "versions": versions(), "command": shlex.join(["ivideogpt", *sys.argv[1:]]),
        }  # fmt: skip
        write_results(result, args.out)
        print(f"wrote {args.out}")
