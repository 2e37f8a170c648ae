"""`ivideogpt data doctor`: what would spoil training on a shard set."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ivideogpt.data.commands.progress import episode_progress

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction

EXIT_CODES = {"note": 0, "warning": 3, "error": 4}
COLOURS = {"note": "cyan", "warning": "yellow", "error": "red"}
NAMED = 3
"""Episodes of a finding that the table names; the JSON names all."""


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "doctor",
        help="look for frozen frames, shifted actions, duplicates, leaks and the like",
        description="Looks for what spoils training: flat, frozen and repeated frames, duplicates, actions that are "
        "shifted, constant, clipped or of different scales, constant rewards, short episodes, leaks into validation. "
        "Exit code 0: notes at most; 3: warnings; 4: errors.",
    )
    command.add_argument(
        "shards", help="folder of the shard set, one with train/ and heldout/, or embedded:train|heldout"
    )
    command.add_argument("--against", metavar="SHARDS", help="validation set that must not share frames with it")
    command.add_argument("--segment-length", type=int, default=16, metavar="N", help="frames of a training clip (16)")
    command.add_argument("--stride", type=int, default=1, metavar="N", help="stride of a training clip (1)")
    command.add_argument("--max-episodes", type=int, metavar="N", help="look at so many episodes, evenly spread")
    command.add_argument("--json", metavar="FILE", help="also write the findings to FILE")
    command.add_argument("--page", metavar="FILE", help="also write an HTML page with film strips and histograms")
    command.set_defaults(func=_doctor)


def _doctor(args: Namespace) -> int:
    from ivideogpt.data.doctor import SEVERITIES, check, check_leaks, read_set
    from ivideogpt.data.reader import ShardSet

    for name in ("segment_length", "stride", "max_episodes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    train, held_out = args.shards, args.against
    for name in ("json", "page"):
        target = getattr(args, name)
        if target is not None and not Path(target).absolute().parent.is_dir():
            raise ValueError(f"--{name} {target}: there is no folder {Path(target).parent}")
    parts = [Path(args.shards) / part for part in ("train", "heldout")]
    own = (Path(args.shards) / "manifest.json").is_file()
    if held_out is None and not own and all((part / "manifest.json").is_file() for part in parts):
        train, held_out = map(str, parts)
    with warnings.catch_warnings(), episode_progress("looking") as progress:
        warnings.simplefilter("ignore")  # episodes that cannot be read are findings
        shards = ShardSet(train, policy="skip")
        others_shards = None if held_out is None else ShardSet(held_out, policy="skip")
        readings, findings = read_set(shards, args.max_episodes, progress)
        findings += check(readings, args.segment_length, args.stride)
        if others_shards is not None:
            others, bad = read_set(others_shards, None, progress)
            findings += bad + check_leaks(readings, others)
    findings.sort(key=lambda finding: -SEVERITIES.index(finding.severity))
    looked = f"{len(readings)} of {len(shards)} episodes" if args.max_episodes else f"{len(readings)} episodes"
    _print(train, looked, findings)
    if args.json:
        rows = [{**vars(finding), "keys": list(finding.keys)} for finding in findings]
        record: dict[str, Any] = {"shards": train, "against": held_out, "episodes": len(readings), "findings": rows}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.page:
        from ivideogpt.data.doctor_page import render_page

        Path(args.page).write_text(render_page(train, looked, findings, readings, shards), encoding="utf-8")
    return EXIT_CODES[findings[0].severity] if findings else 0


def _print(name: str, looked: str, findings: list[Any]) -> None:
    console = Console(emoji=False)  # "embedded:train:" is no train
    if not findings:
        print(f"{name}: {looked}, nothing found")
        return
    table = Table("", "check", "what", "episodes", title=f"{name}: {looked}", title_justify="left", show_lines=True)
    for finding in findings:
        keys = ", ".join(finding.keys[:NAMED]) + (
            f" and {len(finding.keys) - NAMED} more" if len(finding.keys) > NAMED else ""
        )
        colour = COLOURS[finding.severity]
        table.add_row(f"[{colour}]{finding.severity}[/]", finding.check, escape(finding.text), escape(keys))
    console.print(table)
