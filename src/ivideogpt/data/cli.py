"""The `ivideogpt data` commands that need no model; each is a file in `data/commands/`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

COMMANDS = ("pack", "formats", "collect", "verify", "stats", "show", "export", "doctor")


def add_parser(subparsers: _SubParsersAction) -> _SubParsersAction:
    """Adds `data` and its commands; the chosen one is `args.func(args) -> exit code`. Returns where more can go."""
    parser = subparsers.add_parser("data", help="pack, collect and inspect episodes")
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"ivideogpt.data.commands.{name}").add(commands)
    return commands
