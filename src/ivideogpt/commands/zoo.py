"""`ivideogpt zoo`: lists the models that go by a name, shows all that is known about one, or fetches one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "zoo",
        help="list the models that go by a name",
        description="Lists the zoo: names that `ivideogpt.from_pretrained` and `--model` understand.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="list the names (the default)")
    listing.add_argument("pattern", nargs="?", default="*", help="shell pattern, such as '*bair*'")
    show = actions.add_parser("show", help="show one entry")
    show.add_argument("name", help="zoo name or alias")
    download = actions.add_parser("download", help="fetch a model, so that it loads without a network")
    download.add_argument("name", help="zoo name, alias or Hub id")
    download.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    download.add_argument("--out", metavar="FOLDER", help="copy it there (default: it stays in the Hub's cache)")
    parser.set_defaults(func=run, pattern="*")


def run(args: argparse.Namespace) -> None:
    """Prints the list or the entry, or fetches a model and prints its folder."""
    if args.action == "show":
        _show(args.name)
    elif args.action == "download":
        from ivideogpt.zoo.hub import copy_to, resolve

        folder = resolve(args.name, args.revision)
        print(folder if args.out is None else copy_to(folder, Path(args.out)))
    else:
        _list(args.pattern)


def _list(pattern: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from ivideogpt.zoo.registry import entries, list_models

    names = list_models(pattern)
    if not names:
        raise ValueError(f"no zoo name matches {pattern!r}; `ivideogpt zoo` lists them all")
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for heading in ("px", "context", "actions", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("rewards")
    table.add_column("licence")
    table.add_column("where", overflow="fold")
    for name in names:
        entry = entries()[name]
        table.add_row(
            name,
            str(entry.resolution),
            f"{entry.context_length}{' (goal first)' if entry.goal else ''}",
            "-" if entry.action_dim is None else str(entry.action_dim),
            f"{sum(entry.parameters.values()) / 1e6:.0f}M" if entry.parameters else "-",
            "yes" if entry.rewards else "-",
            entry.licence.upper(),
            entry.hub_id or "in this package",
        )
    # A pipe has no width: nothing is cut off there.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _show(name: str) -> None:
    import yaml

    from ivideogpt.zoo.registry import cards_folder, find_entry, nearest_names

    entry = find_entry(name)
    if entry is None:
        near = nearest_names(name, 1)
        hint = f"did you mean {near[0]!r}?" if near else "`ivideogpt zoo` lists the names"
        raise ValueError(f"no zoo name {name!r}; {hint}")
    values = {key: value for key, value in vars(entry).items() if value not in (None, [], {})}
    values["card"] = str(cards_folder() / f"{entry.name}.md")
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100), end="")
