"""`ivideogpt data pack`: recordings into shards."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from ivideogpt.data.commands.progress import episode_progress

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
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
    with episode_progress("packing") as progress:
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
