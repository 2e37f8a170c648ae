"""What docs/data.md shows runs, and its table has every format and only options that there are."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from ivideogpt import cli
from ivideogpt.commands.data import add_parser
from ivideogpt.data.formats import FORMATS
from ivideogpt.data.reader import ShardSet

DATA = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", DATA, flags=re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "bash"]
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "docs/data.md", "exec"), {})
            continue
        for line in block.splitlines():
            assert cli.main(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
    assert len(ShardSet("my_set")) == len(ShardSet("embedded:heldout"))
    assert [len(ShardSet(f"my_data/{part}")) for part in ("train", "heldout")] == [3, 1]


def test_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*`(ivideogpt data pack [^`]+)` \|$", DATA, flags=re.MULTILINE)
    assert {name for name, _ in rows} == set(FORMATS)
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    for name, line in rows:
        args = parser.parse_args(shlex.split(line)[1:])
        assert args.format in (None, name)
    for flag in set(re.findall(r"`(--[a-z-]+)", DATA)):
        assert f"{flag} " in usage() or f"{flag}," in usage(), flag


def usage() -> str:
    """All options of the data commands."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    lines = []
    for word in ("pack", "doctor", "tokenize", "stats", "show", "export", "collect metaworld"):
        chosen = _parser_of(parser, ["data", *word.split()])
        lines += [", ".join(action.option_strings) + " " for action in chosen._actions]
    return "\n".join(lines)


def _parser_of(parser: argparse.ArgumentParser, words: list[str]) -> argparse.ArgumentParser:
    for word in words:
        (choice,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = choice.choices[word]
    return parser
