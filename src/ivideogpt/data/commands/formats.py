"""`ivideogpt data formats`: what can be packed, and the options of each format."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    command = commands.add_parser("formats", help="list the formats that `data pack` reads, with their options")
    command.add_argument("--format", help="show this one's options with what they mean")
    command.set_defaults(func=_formats)


def _formats(args: Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ivideogpt.data.formats import FORMATS, document_option, known_format, option_fields

    console = Console(highlight=False)
    if args.format is not None:
        form = known_format(args.format)
        table = Table("option", "meaning", title=f"{args.format}: {form.about}", title_justify="left")
        for option, names in option_fields().items():
            if args.format in names:
                table.add_row(_flag(option), document_option(args.format, option))
        console.print(table)
        return 0
    table = Table("format", "what", "options of `ivideogpt data pack`", show_lines=True)
    for name, form in FORMATS.items():
        fields = [field.name for field in dataclasses.fields(form.options_class()) if field.name in option_fields()]
        table.add_row(name, form.about, " ".join(_flag(field) for field in fields))
    console.print(table)
    return 0


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
