"""`ivideogpt data info`: what a shard set holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    command = commands.add_parser("info", help="show what a shard set holds")
    command.add_argument("shards", help="folder of the shard set, or embedded:train|heldout")
    command.set_defaults(func=_info)


def _info(args: Namespace) -> int:
    from ivideogpt.data.reader import load_manifest, resolve_source

    folder = resolve_source(args.shards)
    manifest = load_manifest(folder)
    table = Table("source", "licence", "episodes", "frames", title=str(folder), title_justify="left")
    for name, entry in sorted(manifest["sources"].items()):
        table.add_row(name, entry["licence"], str(entry["episodes"]), str(entry["frames"]))
    console = Console()
    console.print(table)
    for label in ("counts", "codec", "resolutions", "action_dims", "has_rewards", "converter", "command"):
        console.print(f"{label}: {manifest[label]}", highlight=False, soft_wrap=True)
    return 0
