"""The `ivideogpt data` commands: pack, collect, verify, info."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction


def add_parser(subparsers: _SubParsersAction) -> None:
    """Adds `data` and its commands; the chosen one is `args.func(args) -> exit code`."""
    parser = subparsers.add_parser("data", help="pack, collect and inspect episodes")
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    command = commands.add_parser("pack", help="pack .npz episodes, or a shard set, into shards")
    command.add_argument("folder", help="folder of .npz files, one .npz, a shard set, or embedded:train|heldout")
    command.add_argument("--out", required=True, help="folder of the shard set")
    command.add_argument("--resize", type=int, metavar="N", help="centre-crop and resize to N x N pixels")
    command.add_argument("--holdout", type=float, default=0.0, metavar="F", help="share of episodes for OUT/heldout")
    command.add_argument("--skip-bad", action="store_true", help="leave bad files out instead of stopping")
    command.add_argument("--video-key", metavar="K", help="array that holds the frames")
    command.add_argument("--reward-follows-action", action="store_true", help="reward[t] is for the action at frame t")
    command.add_argument("--fps", type=float, default=1.0, help="frames a second where the file has none (1)")
    command.add_argument("--camera", help="camera name to record")
    command.add_argument("--source", help="source name to record")
    command.add_argument("--licence", default="unknown", help="licence to record")
    command.add_argument("--allow", action="append", default=[], metavar="URL", help="allow this command-running URL")
    command.add_argument("--overwrite", action="store_true", help="replace a set that is there")
    command.set_defaults(func=_pack)

    sources = commands.add_parser("collect", help="record episodes in a simulator").add_subparsers(
        dest="data_source", metavar="SOURCE", required=True
    )
    command = sources.add_parser("metaworld", help="scripted experts with noise in Meta-World")
    command.add_argument("--task", action="append", required=True, help="task name, such as plate-slide; repeatable")
    command.add_argument("--episodes", type=int, required=True, help="episodes of each task")
    command.add_argument("--noise", type=float, nargs="+", default=[0.0], metavar="S", help="noise scales, in turn (0)")
    command.add_argument("--out", required=True, help="folder of the shard set")
    command.add_argument("--fidelity", choices=("paper", "fast"), default="fast", help="renderer (fast: 10 x faster)")
    command.add_argument("--workers", type=int, default=2, help="simulator processes (2)")
    command.add_argument("--seed", type=int, default=0, help="seeds goals and noise (0)")
    command.add_argument("--max-steps", type=int, default=100, help="agent steps of an episode at most (100)")
    command.add_argument("--tail", type=int, default=5, help="agent steps after the first success (5)")
    command.add_argument("--action-repeat", type=int, default=2, help="simulator steps of an agent step (2)")
    command.add_argument("--success-bonus", type=float, default=10.0, help="added to the reward at success (10)")
    command.add_argument("--resolution", type=int, default=64, help="pixels (64)")
    command.add_argument("--overwrite", action="store_true", help="replace a set that is there")
    command.set_defaults(func=_collect)

    command = commands.add_parser("verify", help="check hashes, tar structure and every record of a shard set")
    command.add_argument("shards", help="folder of the shard set, or embedded:train|heldout")
    command.set_defaults(func=_verify)

    command = commands.add_parser("info", help="show what a shard set holds")
    command.add_argument("shards", help="folder of the shard set, or embedded:train|heldout")
    command.set_defaults(func=_info)


def _pack(args: Namespace) -> int:
    from ivideogpt.data.packing import pack
    from ivideogpt.data.sources.npz import NpzOptions

    options = NpzOptions(args.video_key, args.reward_follows_action, args.fps, args.camera, args.source, args.licence)
    words = ["ivideogpt", "data", "pack", args.folder, "--out", args.out]
    for name in ("resize", "holdout", "video_key", "camera", "source", "licence"):
        value = getattr(args, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value else []
    words += [f"--fps={args.fps:g}"] if args.fps != 1 else []
    words += ["--reward-follows-action"] if args.reward_follows_action else []
    words += ["--skip-bad"] if args.skip_bad else []
    with _progress("packing") as progress:
        report = pack(
            args.folder,
            args.out,
            options,
            resize=args.resize,
            holdout=args.holdout,
            policy="skip" if args.skip_bad else "error",
            allow=args.allow,
            overwrite=args.overwrite,
            command=shlex.join(words),
            progress=progress,
        )
    skipped = f", {len(report.skipped)} bad ones skipped" if report.skipped else ""
    print(f"packed {report.episodes} episodes ({report.frames} frames){skipped}: {', '.join(map(str, report.folders))}")
    return 0


def _collect(args: Namespace) -> int:
    from ivideogpt.data.reader import load_manifest
    from ivideogpt.data.sources.metaworld import collect

    with _progress("collecting") as progress:
        folder = collect(
            args.task,
            args.episodes,
            args.noise,
            args.out,
            fidelity=args.fidelity,
            seed=args.seed,
            workers=args.workers,
            max_steps=args.max_steps,
            tail=args.tail,
            action_repeat=args.action_repeat,
            success_bonus=args.success_bonus,
            resolution=args.resolution,
            overwrite=args.overwrite,
            progress=progress,
        )
    counts = load_manifest(folder)["counts"]
    print(f"collected {counts['episodes']} episodes ({counts['frames']} frames): {folder}")
    return 0


def _verify(args: Namespace) -> int:
    from ivideogpt.data.reader import load_manifest, resolve_source, verify_set

    faults = verify_set(args.shards)
    for fault in faults:
        print(fault, file=sys.stderr)
    counts = load_manifest(resolve_source(args.shards))["counts"]
    verdict = f"{len(faults)} fault(s)" if faults else "whole"
    print(f"{args.shards}: {counts['shards']} shard(s), {counts['episodes']} episodes: {verdict}")
    return 1 if faults else 0


def _info(args: Namespace) -> int:
    from ivideogpt.data.reader import load_manifest, resolve_source

    folder = resolve_source(args.shards)
    manifest = load_manifest(folder)
    table = Table("source", "licence", "episodes", "frames", title=str(folder), title_justify="left")
    for name, entry in sorted(manifest["sources"].items()):
        table.add_row(name, entry["licence"], str(entry["episodes"]), str(entry["frames"]))
    console = Console()
    console.print(table)
    for label in ("counts", "resolutions", "action_dims", "has_rewards", "converter", "command"):
        console.print(f"{label}: {manifest[label]}", highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar with ETA on stderr; yields the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("episodes"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
