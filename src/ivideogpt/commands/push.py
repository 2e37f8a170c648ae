"""`ivideogpt push RUN_OR_FOLDER USER/NAME`: publishes a model with its recipe, results and card on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "push",
        help="publish a model with its recipe, results and card on the Hub",
        description="Uploads safetensors, configurations, the resolved recipe, results, an animation and a model card"
        " as one commit. Training checkpoints, logs and paths of this machine stay here; a secret in a file stops it."
        " The same push again does nothing; an interrupted one goes on. Log in first with `hf auth login`.",
    )
    parser.add_argument(
        "folder", metavar="RUN_OR_FOLDER", help="output of a recipe, what `save_pretrained` wrote, or a zoo name"
    )
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="show what would go there, and upload nothing")
    parser.add_argument("--revision", help="branch (default: main); made if it does not exist")
    parser.add_argument("--tag", help="name for the commit, such as v1.0")
    parser.add_argument("--message", help="commit message")
    parser.add_argument(
        "--licence", metavar="SPDX", help="of the weights, such as mit (default: that of the base model)"
    )
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="ID", help="a data set on the Hub, to be linked"
    )
    parser.add_argument(
        "--results", action="append", default=[], metavar="FILE", help="results beside those of the recipe"
    )
    parser.add_argument(
        "--gif", metavar="FILE", help="animation for the card (default: that of the recipe's evaluation)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Loads the model, which checks it, and uploads it; of an adapter, the adapter alone."""
    from ivideogpt.recipes.publishing import PublishSettings, describe, publish

    settings = PublishSettings(args.repo_id, args.private, args.revision, args.tag, args.licence, args.dataset)
    publication = publish(
        args.folder,
        settings,
        results=[Path(path) for path in args.results],
        rollout=Path(args.gif) if args.gif else None,
        message=args.message,
        dry_run=args.dry_run,
    )
    for line in describe(publication):
        print(line)
