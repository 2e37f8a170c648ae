"""`ivideogpt push FOLDER USER/NAME`: uploads a saved world model to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "push",
        help="upload a saved model to the Hub",
        description="Uploads safetensors, configurations, the resolved recipe and a model card as one commit. Log in"
        " first with `hf auth login`.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder that a recipe or `save_pretrained` wrote")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch, which must exist")
    parser.add_argument("--message", help="commit message")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Loads the model, which checks it, and uploads it."""
    if not Path(args.folder).is_dir():
        raise ValueError(f"{args.folder} is no folder; give one that a recipe or `save_pretrained` wrote")
    import ivideogpt

    commit = ivideogpt.from_pretrained(Path(args.folder)).push_to_hub(
        args.repo_id, private=args.private or None, revision=args.revision, commit_message=args.message
    )
    print(commit)
