"""`ivideogpt run RECIPE [key=value ...]`: runs a recipe's stages."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "run",
        help="run a recipe: RECIPE.yaml [key=value ...]",
        description="Runs a recipe's stages one after another. Stages that are finished are skipped; an interrupted one"
        " goes on where it stopped.",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a YAML file, the name of a recipe that the package carries, or USER/NAME on the Hub, whose recipe it is",
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="replace any value of the recipe; base=FILE lays an overlay over it, such as base/fsdp.yaml",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument(
        "--trust", action="store_true", help="allow classes from outside this package, lightning and torch"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Hands the recipe over to `ivideogpt.recipes`."""
    for word in args.overrides:
        if "=" not in word:
            raise ValueError(f"{word!r} is not KEY=VALUE; the words after the recipe replace its values")
    from ivideogpt import recipes

    recipes.run(args.recipe, args.overrides, trust=args.trust, print_config=args.print_config, revision=args.revision)
