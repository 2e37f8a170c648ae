"""`ivideogpt data verify`: checks a shard set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    command = commands.add_parser("verify", help="check hashes, structure and every record of a shard set or token set")
    command.add_argument("shards", help="folder of a shard set or token set, its URL, or embedded:train|heldout")
    command.set_defaults(func=_verify)


def _verify(args: Namespace) -> int:
    from ivideogpt.data.reader import open_source
    from ivideogpt.data.tokenized import holds_tokens, load_token_manifest, verify_token_set
    from ivideogpt.data.verification import verify_set

    if holds_tokens(args.shards):
        faults = verify_token_set(args.shards)
        counts = load_token_manifest(Path(args.shards))["counts"]
        return _report(args.shards, faults, f"{counts['shards']} shard(s), {counts['clips']} clips")
    faults = verify_set(args.shards)
    counts = open_source(args.shards).manifest["counts"]
    return _report(args.shards, faults, f"{counts['shards']} shard(s), {counts['episodes']} episodes")


def _report(name: str, faults: list[str], holds: str) -> int:
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{name}: {holds}: {f'{len(faults)} fault(s)' if faults else 'whole'}")
    return 1 if faults else 0
