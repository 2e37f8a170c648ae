"""`ivideogpt data pack`: recordings into shards."""

from __future__ import annotations

import os
import re
import shlex
import sys
import warnings
from argparse import BooleanOptionalAction
from collections import Counter
from typing import TYPE_CHECKING, Any

from ivideogpt.data.blocks import DEFAULT_CODEC, NAMES
from ivideogpt.data.commands.arguments import part
from ivideogpt.data.commands.progress import episode_progress
from ivideogpt.data.formats import (
    FORMATS,
    choose_views,
    describe_option,
    guess_format,
    is_flag,
    known_format,
    make_options,
    option_fields,
)

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction

    from ivideogpt.data.packing import PackReport

SHOWN = 5
"""Reasons for quarantine that are shown; every episode is in the quarantine file."""
CAMERA = "camera"


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
    command.add_argument(
        "--codec", default=DEFAULT_CODEC, metavar="NAME",
        help=f"how frames are stored: {NAMES} (default: {DEFAULT_CODEC}); JPEG loses what the manifest says",
    )  # fmt: skip
    command.add_argument("--holdout", type=float, default=0.0, metavar="F", help="share of recordings for OUT/heldout")
    command.add_argument("--holdout-every", type=int, metavar="N", help="or every N-th recording")
    command.add_argument("--strict", action="store_true", help="stop at a bad episode instead of leaving it out")
    command.add_argument(
        "--max-bad", type=float, default=0.5, metavar="F", help="largest share of bad episodes (default: 0.5)"
    )
    command.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes (default: one for each core); 1 reads in this process, which a decoder that crashes ends",
    )  # fmt: skip
    command.add_argument(
        "--part", type=part, metavar="I/N", help="convert the I-th of N parts, from 1, as in a job array; the part "
        "that ends last makes the set, and the command without --part converts what is missing",
    )  # fmt: skip
    command.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on the cluster RAY_ADDRESS")
    command.add_argument("--allow", action="append", default=[], metavar="URL", help="allow this command-running URL")
    command.add_argument("--overwrite", action="store_true", help="replace a set that is there, and begin anew")
    reading = command.add_argument_group("how to read the recordings [formats that have the option]")
    several = ", ".join(name for name, form in FORMATS.items() if form.view)
    for option in option_fields():
        flag, about = f"--{option.replace('_', '-')}", describe_option(option)
        if option == CAMERA:
            one = ", ".join(name for name in option_fields()[option] if not FORMATS[name].view)
            about = f"Camera to read, may be repeated, or all: an episode for each [{several}]; its name [{one}]"
            reading.add_argument(flag, metavar="X", action="append", help=about)
            continue
        if is_flag(option):
            reading.add_argument(flag, action=BooleanOptionalAction, default=None, help=about)
        else:
            reading.add_argument(flag, metavar="X", help=about)
    command.set_defaults(func=_pack)


def _pack(args: Namespace) -> int:
    from ivideogpt.data.packing import is_set_or_stream, pack

    given = {option: getattr(args, option) for option in option_fields()}
    name, options = args.format, None
    cameras: list[str] = []
    if is_set_or_stream(args.folder, args.allow):
        named = [option for option, value in given.items() if value is not None]
        if named or name:
            flag = (named or ["format"])[0].replace("_", "-")
            raise ValueError(f"{args.folder} holds shards, which say how they are to be read: --{flag} is not for them")
    else:
        if name is None:
            name = guess_format(args.folder)
            print(f"{args.folder}: read as {name} ({FORMATS[name].about}); --format says otherwise", file=sys.stderr)
        if known_format(name).view is not None:
            cameras = given[CAMERA] or []
            options = make_options(name, {**given, CAMERA: None})
        else:
            labels = given[CAMERA] or [None]
            if len(labels) > 1 or labels == ["all"]:
                choose_views(args.folder, name, None, labels)  # which refuses
            options = make_options(name, {**given, CAMERA: labels[0]})
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
            cameras=cameras,
            holdout_every=args.holdout_every,
            max_bad=args.max_bad,
            part=args.part,
            engine=args.engine,
            codec=args.codec,
        )
    _tell(report)
    if given.get("fps") is None and hasattr(options, "fps") and not report.found:
        _tell_unknown_rate(report)
    return 0


def _tell(report: PackReport) -> None:
    """What was packed and what was left out, in the last line and the lines above it."""
    from ivideogpt.data.packing import QUARANTINE

    if report.quarantine:
        _tell_reasons(report)
    files = ", ".join(str(folder / QUARANTINE) for folder in report.folders if (folder / QUARANTINE).is_file())
    bad = f", {report.bad} bad ones in {files}" if files else ""
    folders = ", ".join(map(str, report.folders))
    if report.missing:
        print(
            f"this part is done; {report.missing} units of other parts are not there yet, and the part that ends last "
            f"makes the set. The same command without --part converts what is missing. ({report.episodes} episodes "
            f"so far, {report.bad} bad ones)"
        )
    elif report.found:
        print(f"nothing to do: {folders} holds these {report.episodes} episodes ({report.frames} frames) already{bad}")
    else:
        before = f" ({report.resumed} of them before)" if report.resumed else ""
        print(f"packed {report.episodes} episodes{before} ({report.frames} frames){bad}: {folders}")


def _tell_unknown_rate(report: PackReport) -> None:
    """Says so where every episode has the rate of recordings that do not tell theirs."""
    from ivideogpt.data.opening import load_index, load_manifest

    made = [folder for folder in report.folders if not report.missing]
    if made and all((load_index(folder, load_manifest(folder))["fps"] == 1.0).all() for folder in made):
        print(
            "1 frame a second is noted for all episodes, as the recordings do not say it: --fps tells the rate, by "
            "which `stride: null`, hours and the export go",
            file=sys.stderr,
        )


def _tell_reasons(report: PackReport) -> None:
    """A table of the most frequent reasons, with an episode for each."""
    from rich.console import Console
    from rich.table import Table

    counts: Counter[str] = Counter()
    examples: dict[str, dict[str, Any]] = {}
    for line in report.quarantine:
        # reasons that differ in names and numbers alone are one
        kind = re.sub(r"\d+", "N", re.sub(r"\S*/\S*", "", line["reason"]))
        counts[kind] += line.get("episodes", 1)
        examples.setdefault(kind, line)
    table = Table("bad", "kind", "such as", "reason", title=f"{report.bad} bad episodes left out")
    for kind, count in counts.most_common(SHOWN):
        line = examples[kind]
        table.add_row(str(count), line["kind"], line["key"], line["reason"])
    if len(counts) > SHOWN:
        table.caption = f"and {len(counts) - SHOWN} more reasons"
    Console(stderr=True, markup=False, highlight=False).print(table)


def _command(args: Namespace, given: dict[str, Any]) -> str:
    """The command line without what changes nothing in the set."""
    words = ["ivideogpt", "data", "pack", args.folder, "--out", args.out]
    named = {name: getattr(args, name) for name in ("format", "resize", "holdout", "holdout_every")}
    for name, value in {**named, **given}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value:
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{flag}", str(one)]
    if args.codec != DEFAULT_CODEC:
        words += ["--codec", args.codec]
    return shlex.join(words + (["--strict"] if args.strict else []))
