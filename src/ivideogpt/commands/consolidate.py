"""`ivideogpt consolidate`: a model from a training checkpoint, sharded ones included."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command and its options."""
    command = commands.add_parser(
        "consolidate",
        help="make a model of a training checkpoint, sharded or not",
        description="Writes the weights of a stage's checkpoint in the published layout, which from_pretrained loads. "
        "The shards that several processes wrote are put together. Reads your own checkpoints only: a sharded one is "
        "a pickle.",
    )
    command.add_argument("stage", metavar="OUTPUT/STAGE", help="folder of a stage of a recipe that was run")
    command.add_argument("--update", type=int, metavar="N", help="which checkpoint (default: the newest)")
    command.add_argument("--out", required=True, metavar="FOLDER", help="folder of the model")
    command.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Writes the model."""
    from ivideogpt.recipes.consolidation import consolidate

    out, update = consolidate(args.stage, args.out, args.update)
    print(f"{out}: the weights after {update} updates")
    return 0
