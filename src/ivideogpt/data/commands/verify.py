"""`ivideogpt data verify`: checks a shard set."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    command = commands.add_parser("verify", help="check hashes, tar structure and every record of a shard set")
    command.add_argument("shards", help="folder of the shard set, or embedded:train|heldout")
    command.set_defaults(func=_verify)


def _verify(args: Namespace) -> int:
    from ivideogpt.data.reader import load_manifest, resolve_source, verify_set

    faults = verify_set(args.shards)
    for fault in faults:
        print(fault, file=sys.stderr)
    counts = load_manifest(resolve_source(args.shards))["counts"]
    verdict = f"{len(faults)} fault(s)" if faults else "whole"
    print(f"{args.shards}: {counts['shards']} shard(s), {counts['episodes']} episodes: {verdict}")
    return 1 if faults else 0
