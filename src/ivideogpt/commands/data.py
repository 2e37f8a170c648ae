"""`ivideogpt data`: the commands of the data package, and those that need a model as well."""

from __future__ import annotations

from typing import Any

from ivideogpt.commands import tokenize
from ivideogpt.data import cli


def add_parser(subparsers: Any) -> None:
    """Adds `data` with all its commands."""
    tokenize.add(cli.add_parser(subparsers))
