"""The command line: `ivideogpt COMMAND ...`, and the `lightning` command that adds `run` for recipes.

Only the module of the command that was typed is imported, so that `--help` and a mistyped option answer at once.
A user's mistake is one line on stderr and exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

# name -> (module with add_parser(subparsers), one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("ivideogpt.commands.run", "run a recipe: RECIPE.yaml [key=value ...]"),
    "predict": ("ivideogpt.commands.predict", "roll one recording out and write truth | prediction | error"),
    "evaluate": ("ivideogpt.commands.evaluate", "measure a model on packed episodes"),
    "compare": ("ivideogpt.commands.compare", "say whether two results differ by more than chance"),
    "gfvd": ("ivideogpt.commands.gfvd", "compare generated clips of classes with real ones"),
    "data": ("ivideogpt.commands.data", "pack, collect, inspect and tokenize episodes"),
    "adapt": ("ivideogpt.commands.adapt", "adapt a model's tokenizer to new recordings"),
    "consolidate": ("ivideogpt.commands.consolidate", "make a model of a training checkpoint, sharded or not"),
    "merge": ("ivideogpt.commands.merge", "make a whole model of a LoRA adapter"),
    "zoo": ("ivideogpt.commands.zoo", "list the models that go by a name"),
    "push": ("ivideogpt.commands.push", "publish a model with its recipe, results and card on the Hub"),
    "demo": ("ivideogpt.commands.demo", "fine-tune, roll out and report on the embedded recordings"),
    "doctor": ("ivideogpt.commands.doctor", "check this machine and its packages"),
}

# Fabric's launcher takes a value after each of these; they are skipped when the script's name is looked for.
FABRIC_OPTIONS = frozenset(
    "--accelerator --strategy --devices --num-nodes --num_nodes --node-rank --node_rank --main-address --main_address"
    " --main-port --main_port --precision".split()
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and where the help is, and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")


def build_parser(command: str | None = None, prog: str = "ivideogpt") -> argparse.ArgumentParser:
    """Builds the parser; only `command`'s own options are filled in, the others are names with a help line."""
    parser = Parser(prog=prog, description="Interactive world models: train, roll out and judge them.")
    parser.add_argument("--version", action="version", version=f"ivideogpt {version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        if name == command:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=line)
    return parser


def version() -> str:
    """The installed version, or "0+unknown" in a checkout that is not installed."""
    try:
        return metadata.version("ivideogpt")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def main(argv: Sequence[str] | None = None, prog: str = "ivideogpt") -> int:
    """Runs `ivideogpt`; returns the exit code (0 done, 1 a check failed, 2 a user's mistake, 130 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _run(words, prog)
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ivideogpt zoo | head`: the reader has gone, which is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return 2


def _run(words: list[str], prog: str) -> int:
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise ValueError(f"no command {command!r}; {hint}")
    parser = build_parser(command, prog)
    if not words:
        parser.print_help()
        return 0
    args, rest = parser.parse_known_args(words)
    if rest:
        # argparse does not join the key=value words behind an option to those before it.
        if command != "run" or any(word.startswith("-") for word in rest):
            parser.error(f"unknown argument{'s' if len(rest) > 1 else ''} {' '.join(rest)} after `{command}`")
        args.overrides += rest
    return int(args.func(args) or 0)


def one_line(error: BaseException) -> str:
    """The error's message in one line; its type's name where it has no message."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def lightning_main(argv: Sequence[str] | None = None) -> int:
    """Runs `lightning`: recipes here, scripts through Fabric's launcher, everything else through lightning_sdk.

    lightning 2.6 installs no command of this name and lightning_sdk does; pip lets the last installed one win. So
    whatever is not ours is handed on, and nothing that a user had is lost.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["run"]:
        target = script_or_recipe(words[1:])
        suffix = "" if target is None else Path(target).suffix
        # USER/NAME is a model on the Hub, with its recipe; none of lightning_sdk's own words has a slash
        on_hub = target is not None and words[1] == target and target.count("/") == 1 and not Path(target).exists()
        if target is None or suffix in (".yaml", ".yml") or (on_hub and suffix != ".py"):
            return main(words, prog="lightning")
        if suffix == ".py":
            return _hand_over("lightning", "fabric", words)
    try:
        return _hand_over("lightning_sdk", "lightning", words)
    except metadata.PackageNotFoundError:
        if words[:1] == ["run"]:
            return main(words, prog="lightning")  # a recipe by its bare name, or one clear error about it
    if not words or words[0] in ("-h", "--help"):
        print(LIGHTNING_HELP)
        return 0
    print(
        f"lightning: error: {words[0]!r} belongs to lightning_sdk, which is not installed"
        " (`pip install lightning-sdk`); this package adds only `lightning run RECIPE.yaml|SCRIPT.py`",
        file=sys.stderr,
    )
    return 2


LIGHTNING_HELP = """usage: lightning run RECIPE.yaml [key=value ...]   run a recipe (the same as `ivideogpt run`)
       lightning run USER/NAME [key=value ...]     run the recipe of a model on the Hub
       lightning run SCRIPT.py [args ...]          launch a script with Fabric (the same as `fabric run`)
       lightning ...                               everything else: lightning_sdk's command, where it is installed"""


def script_or_recipe(words: Sequence[str]) -> str | None:
    """The first word that is neither an option nor the value of one of Fabric's options; None where there is none."""
    value_follows = False
    for word in words:
        if value_follows:
            value_follows = False
        elif word.startswith("-"):
            value_follows = word in FABRIC_OPTIONS
        else:
            return word
    return None


def _hand_over(distribution: str, script: str, words: list[str]) -> int:
    """Calls a console script of another installed distribution as its own launcher would.

    Raises:
        PackageNotFoundError: the distribution is not installed or has no such script.
    """
    entries = metadata.distribution(distribution).entry_points.select(group="console_scripts", name=script)
    if not entries:
        raise metadata.PackageNotFoundError(f"{distribution} has no console script {script!r}")
    sys.argv = ["lightning", *words]
    code = next(iter(entries)).load()()
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
