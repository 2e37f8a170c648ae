"""Finds, resolves and runs recipes."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivideogpt.recipes import foreign
from ivideogpt.recipes.foreign import is_hub_id
from ivideogpt.recipes.reading import Node, dump_yaml, lay_over, nearest, read_file, resolve

if TYPE_CHECKING:  # Lightning takes seconds, which a mistyped key need not wait for
    from ivideogpt.recipes.launch import Launch


def recipes_folder() -> Path:
    """Folder of the recipes that belong to the package: inside it when installed, beside it in a checkout.

    Raises:
        FileNotFoundError: if the installation is incomplete.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the package's recipes are neither in {package / '_recipes'} nor beside the sources")


def find(path_or_name: str | os.PathLike[str]) -> Path:
    """File of a recipe, given by its path or by the name of one that belongs to the package.

    Raises:
        ValueError: if there is none, naming the nearest.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    text = os.fspath(path_or_name)
    names = {recipe.stem: recipe for recipe in recipes_folder().glob("*.yaml")}
    if text in names:
        return names[text]
    if path.suffix in (".yaml", ".yml") and path.stem in names and not path.parent.exists():
        raise ValueError(f"there is no file {text}; the package has a recipe named {path.stem!r}")
    if path.is_dir():
        raise ValueError(f"{text} is a folder, a recipe is a YAML file")
    raise ValueError(f"there is no recipe {text!r}, neither as a file nor in the package; {nearest(path.stem, names)}")


def read(path_or_name: str | os.PathLike[str], trust: bool = False, revision: str | None = None) -> Node:
    """The recipe of a file, of a name, or of a Hub repository (``user/name``, at a revision), as it was written.

    Raises:
        ValueError: if there is none, or that of a repository says what only who runs it may say.
    """
    if is_hub_id(path_or_name):
        return foreign.fetch(os.fspath(path_or_name), revision, trust)
    if revision is not None:
        raise ValueError(f"revision {revision!r} was given, but {os.fspath(path_or_name)!r} is no Hub repository")
    return read_file(find(path_or_name))


def load(
    path_or_name: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    trust: bool = False,
    revision: str | None = None,
) -> Node:
    """The resolved and checked recipe; nothing is built or run.

    Raises:
        ValueError: naming what is wrong, where, and the nearest right one.
    """
    recipe = read(path_or_name, trust, revision)
    folders = [Path(), recipes_folder()]
    if not is_hub_id(path_or_name):
        folders.insert(1, find(path_or_name).parent)
    recipe = resolve(*lay_over(recipe, overrides, folders))
    from ivideogpt.recipes.checking import check_stage  # takes seconds, which a mistyped key need not wait for
    from ivideogpt.recipes.publishing import publish_settings

    names = list(recipe["stages"])
    for index, name in enumerate(names):
        stage = recipe["stages"][name]
        recipe["stages"][name] = check_stage(
            stage, f"stages.{name}", recipe["seed"], trust, earlier=names[:index], later=names[index:]
        )
    if recipe.get("publish") is not None:
        publish_settings(recipe["publish"])
    return recipe


def run(
    path_or_name: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    trust: bool = False,
    print_config: bool = False,
    revision: str | None = None,
) -> Path | None:
    """Runs a recipe's stages one after another; finished ones are skipped, an interrupted one is resumed.

    Where the recipe has a ``publish``, its model goes to the Hub at the end, with its results and its card.

    Args:
        path_or_name: a YAML file, the name of a recipe of the package, or a Hub repository that holds a recipe.
        overrides: ``key=value``, dotted; they replace any value, such as ``stages.tokenizer.trainer.max_steps=100``.
            ``stages.`` and ``init_args`` may be left out; ``trainer.devices=8`` is ``defaults.trainer.devices=8``.
            ``base=FILE`` lays an overlay over the recipe, below the other overrides.
        trust: allow classes from anywhere, which can run any code.
        print_config: print the resolved recipe and do nothing.
        revision: branch, tag or commit of the Hub repository.

    Returns:
        The output folder, None with ``print_config``.

    Raises:
        ValueError: if the recipe, an override or an earlier result does not fit.
        OSError: if something cannot be read or written.
    """
    if print_config:
        print(dump_yaml(load(path_or_name, overrides, trust, revision)), end="")
        return None
    from ivideogpt.recipes.launch import Launch

    launch = Launch.find()
    with launch.ending_together():
        return _run(load(path_or_name, overrides, trust, revision), launch)


def _run(recipe: Node, launch: Launch) -> Path:
    # where it was run and published is nobody's business who gets the weights
    text = dump_yaml({key: value for key, value in recipe.items() if key not in ("output", "on_change", "publish")})
    from rich.console import Console

    from ivideogpt.recipes.launch import leave_group
    from ivideogpt.recipes.publishing import describe, publish, publish_settings
    from ivideogpt.recipes.results import write_text
    from ivideogpt.recipes.stage import Stage, compose_model

    console, first = Console(), launch.rank == 0
    output = Path(recipe["output"])
    stages: list[Stage] = []
    for name, config in recipe["stages"].items():
        stages.append(
            Stage(
                name=name,
                config=config,
                folder=output / name,
                seed=recipe["seed"],
                earlier={stage.name: stage.folder for stage in stages},
                on_change=recipe["on_change"],
                recipe_name=recipe["name"],
                recipe_text=text,
            )
        )
    last = next((stage for stage in reversed(stages) if stage.makes_world_model), None)
    with _quiet_lightning():
        begun = [stage for stage in stages if not stage.is_done]
        launch.check({stage.name: stage.processes for stage in begun if stage.is_shared})
        with _only_run(output) if first else contextlib.nullcontext():
            drafts: dict[str, Any] = {}
            for stage in stages:
                stage.check_unchanged()
                if stage in begun:
                    stage.check(drafts)
            for stage in stages:
                if stage.is_shared or first:
                    stage.run(console if first else Console(quiet=True))
                if first and stage is last:
                    compose_model(stage.folder, output)
            if first:
                write_text(output / "recipe.yaml", text)
            leave_group(failed=False)
            if first and recipe.get("publish") is not None:
                for line in describe(publish(output, publish_settings(recipe["publish"]))):
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return output


@contextlib.contextmanager
def _only_run(output: Path) -> Iterator[None]:
    """Keeps a second run out of ``output``.

    Raises:
        ValueError: if another run is using it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # no such lock on Windows
        except OSError as error:
            raise ValueError(f"another run is using {output}; wait for it, or give another output=FOLDER") from error
        yield


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Mutes what Lightning says about each trainer and cannot be acted on: devices, processes, tips, chosen modes."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


_EXPECTED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\). is deprecated",  # inside Lightning
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the frozen tokenizer
    r"Precision .* is not supported by the model summary",
    r"The '\w+_dataloader' does not have many workers",  # a recipe's choice
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"You're using the WeightAveraging callback with a model that overrides",  # which shards only when it is asked to
    r"Checkpoint directory .* exists and is not empty",
    r"It is recommended to use .self\.log\('(test/|val/(context|dynamics)_)",  # which are of all processes
    r".*returned a view tensor",  # of weights that are spread: nobody writes to it
)
