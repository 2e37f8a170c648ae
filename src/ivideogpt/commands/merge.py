"""`ivideogpt merge ADAPTER --out FOLDER`: a whole model of a LoRA adapter and its base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command and its options."""
    command = commands.add_parser(
        "merge",
        help="make a whole model of a LoRA adapter",
        description="Finds the base that the adapter names, merges the adapter into its weights, and writes a whole "
        "model in the published layout. Loading an adapter does the same in memory.",
    )
    command.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id of an adapter")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")
    command.add_argument("--out", required=True, metavar="FOLDER", help="folder of the model")
    command.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Writes the model."""
    from ivideogpt.zoo.adapter import is_adapter
    from ivideogpt.zoo.checkpoint import load_parts, save_parts
    from ivideogpt.zoo.hub import resolve

    folder, out = resolve(args.adapter, args.revision), Path(args.out)
    if not is_adapter(folder):
        raise ValueError(f"{args.adapter} is no adapter: {folder} has no adapter_config.json")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder")
    parts = load_parts(folder)
    assert parts.adapter is not None
    base = parts.adapter.base
    print(f"{save_parts(out, parts)}: the adapter {args.adapter}, merged into {base.get('model') or base['folder']}")
    return 0
