"""`ivideogpt data export`: a shard set as a data set of another format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "export",
        help="write a shard set as a LeRobotDataset",
        description="Writes a LeRobotDataset v3, which lerobot opens. Pictures are PNG in the tables, which "
        "loses nothing; --video writes H.264 files, which are smaller, and says what was lost.",
    )
    command.add_argument("shards", help="a shard set, or embedded:train|heldout")
    command.add_argument("--format", choices=("lerobot",), default="lerobot", help="what to write (lerobot)")
    command.add_argument("--out", required=True, metavar="FOLDER", help="folder to make")
    command.add_argument("--video", action="store_true", help="pictures as H.264 in place of PNG")
    command.set_defaults(func=_export)


def _export(args: Namespace) -> int:
    from ivideogpt.data.commands.progress import episode_progress
    from ivideogpt.data.lerobot_export import export_lerobot
    from ivideogpt.data.reader import ShardSet

    with episode_progress("exporting") as progress:
        found = export_lerobot(ShardSet(args.shards), Path(args.out), args.video, progress)
    lost = ""
    if args.video:
        lost = ", nothing lost" if found["psnr"] is None else f"; H.264 kept {found['psnr']:.1f} dB"
    print(f"{args.out}: {found['episodes']} episodes, {found['frames']} frames of {', '.join(found['cameras'])}{lost}")
    return 0
