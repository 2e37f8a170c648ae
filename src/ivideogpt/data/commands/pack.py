"""`ivideogpt data pack`: recordings into shards."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from argparse import BooleanOptionalAction
from typing import TYPE_CHECKING, Any

from ivideogpt.data.commands.progress import episode_progress
from ivideogpt.data.formats import FORMATS, describe_option, is_flag, make_options, option_fields

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction

SHOWN = 5
"""Bad episodes that are named in the output; the rest is in the quarantine file."""


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    formats = "; ".join(f"{name}: {form.about}" for name, form in FORMATS.items())
    command: ArgumentParser = commands.add_parser(
        "pack",
        help="pack recordings of any known format, or a shard set, into shards",
        description=f"Packs recordings into shards. Formats: {formats}. A conversion that was stopped goes on when the "
        "same command is given again.",
    )
    command.add_argument("folder", help="folder or file of recordings, a shard set, or embedded:train|heldout")
    command.add_argument("--out", required=True, help="folder of the shard set")
    command.add_argument("--format", choices=tuple(FORMATS), help="what the recordings are; guessed where that is safe")
    command.add_argument("--resize", type=int, metavar="N", help="centre-crop and resize to N x N pixels")
    command.add_argument("--holdout", type=float, default=0.0, metavar="F", help="share of episodes for OUT/heldout")
    command.add_argument("--strict", action="store_true", help="stop at a bad episode instead of leaving it out")
    command.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one for each core)"
    )
    command.add_argument("--allow", action="append", default=[], metavar="URL", help="allow this command-running URL")
    command.add_argument("--overwrite", action="store_true", help="replace a set that is there, and begin anew")
    reading = command.add_argument_group("how to read the recordings [formats that have the option]")
    for option in option_fields():
        flag, about = f"--{option.replace('_', '-')}", describe_option(option)
        if is_flag(option):
            reading.add_argument(flag, action=BooleanOptionalAction, default=None, help=about)
        else:
            reading.add_argument(flag, metavar="X", help=about)
    command.set_defaults(func=_pack)


def _pack(args: Namespace) -> int:
    from ivideogpt.data.formats import guess_format
    from ivideogpt.data.packing import is_set_or_stream, pack
    from ivideogpt.data.shards import QUARANTINE

    given = {option: getattr(args, option) for option in option_fields()}
    name, options = args.format, None
    if is_set_or_stream(args.folder, args.allow):
        named = [option for option, value in given.items() if value is not None]
        if named or name:
            flag = (named or ["format"])[0].replace("_", "-")
            raise ValueError(f"{args.folder} holds shards, which say how they are to be read: --{flag} is not for them")
    else:
        if name is None:
            name = guess_format(args.folder)
            print(f"{args.folder}: read as {name} ({FORMATS[name].about}); --format says otherwise", file=sys.stderr)
        options = make_options(name, given)
    with episode_progress("packing") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out is told below
        report = pack(
            args.folder,
            args.out,
            options,
            resize=args.resize,
            holdout=args.holdout,
            policy="error" if args.strict else "skip",
            allow=args.allow,
            overwrite=args.overwrite,
            command=_command(args, given),
            progress=progress,
            format=name,
            workers=args.workers,
        )
    for key, reason in report.skipped[:SHOWN]:
        print(f"bad: {key}: {reason}", file=sys.stderr)
    bad = f", {len(report.skipped)} bad ones in {report.folders[0] / QUARANTINE}" if report.skipped else ""
    before = f" ({report.resumed} of them before)" if report.resumed else ""
    folders = ", ".join(map(str, report.folders))
    print(f"packed {report.episodes} episodes{before} ({report.frames} frames){bad}: {folders}")
    return 0


def _command(args: Namespace, given: dict[str, Any]) -> str:
    """The command line without what changes nothing in the set."""
    words = ["ivideogpt", "data", "pack", args.folder, "--out", args.out]
    for name, value in {"format": args.format, "resize": args.resize, "holdout": args.holdout, **given}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value:
            words += [f"--{flag}", str(value)]
    return shlex.join(words + (["--strict"] if args.strict else []))
