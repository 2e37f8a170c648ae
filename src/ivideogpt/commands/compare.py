"""`ivideogpt compare`: whether the difference of two results of `ivideogpt evaluate` is larger than chance."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "compare",
        help="say whether two results differ by more than chance",
        description="Compares two results of `ivideogpt evaluate` video by video (paired bootstrap, 95 % interval)."
        " Results of different protocols, recordings or networks are refused, naming what differs.",
    )
    parser.add_argument("first", metavar="A.json", help="results, say before a change")
    parser.add_argument("second", metavar="B.json", help="results of the same protocol, say after it")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Compares and prints the table."""
    from rich.console import Console

    from ivideogpt.metrics.comparison import compare
    from ivideogpt.metrics.results import read_results
    from ivideogpt.metrics.terminal import comparison_table

    first, second = read_results(args.first), read_results(args.second)
    table = comparison_table(compare(first, second), first, second)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
