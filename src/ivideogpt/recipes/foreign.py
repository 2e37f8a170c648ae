"""Recipes that ride with the weights of a Hub repository: how they are named, fetched, and what they may not say.

Such a recipe was written by somebody else. Its classes are checked as those of any recipe are; beyond that it may
neither choose where on this disk something is read or written, nor publish anything in its reader's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ivideogpt.recipes.reading import Node, parse_yaml

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NOT_ITS_BUSINESS = ("base", "output", "on_change", "publish")
_DEEPEST = 50
_PATH = re.compile(r"\s*(?:[/~\\]|[A-Za-z]:[\\/]|file:)|(?:^|.*[/\\])\.\.(?:[/\\]|$)", re.DOTALL)


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether ``name`` can only mean a repository: ``user/name`` where there is neither such a file nor its folder."""
    text = os.fspath(name)
    path = Path(text)
    return bool(HUB_ID.fullmatch(text)) and path.suffix not in (".yaml", ".yml") and not path.parent.exists()


def fetch(repo_id: str, revision: str | None, trust: bool) -> Node:
    """The recipe that rides with ``repo_id``, checked, with nothing resolved yet.

    Raises:
        ValueError: if there is none that can be reached, or it says what it may not say.
    """
    from ivideogpt.zoo.hub import why_not_reached
    from ivideogpt.zoo.remote import RefusedRepositoryError, fetch_recipe

    try:
        path = fetch_recipe(repo_id, revision)
    except RefusedRepositoryError:
        raise
    except Exception as error:  # the client's errors come from several libraries
        raise ValueError(
            f"there is no recipe {repo_id!r}, neither as a file nor on the Hub: {why_not_reached(error, revision)}"
        ) from error
    return check_foreign(path.read_text(encoding="utf-8", errors="replace"), f"the recipe of {repo_id}", trust)


def check_foreign(text: str, where: str, trust: bool = False) -> Node:
    """The recipe in ``text``.

    Args:
        text: YAML.
        where: what to call it in an error.
        trust: whether it may name paths of this disk.

    Raises:
        ValueError: if it is no recipe, or says what it may not say.
    """
    _check_events(text, where)
    recipe = parse_yaml(text, where)
    if not isinstance(recipe, dict):
        raise ValueError(f"{where} must hold a mapping (name, stages, ...), got {type(recipe).__name__}")
    for key in _NOT_ITS_BUSINESS:
        if key in recipe:
            raise ValueError(f"{where} sets {key!r}, which only who runs it may do: give {key}=... yourself")
    if not trust:
        for place, value in _texts(recipe, ""):
            if _PATH.match(value):
                raise ValueError(
                    f"{where}: {place} is {value[:80]!r}, a path outside of the folder that it is run in. Read it; "
                    "--trust allows it, and everything else that it does"
                )
    return recipe


def _check_events(text: str, where: str) -> None:
    """Refuses YAML whose reading would take for ever, by what can be seen while it is scanned."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{where} has YAML aliases (*name), which can make a small file huge; it was refused")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"{where} is not valid: more than {_DEEPEST} mappings and lists inside each other")
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _texts(node: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield place, node
    elif isinstance(node, dict):
        for key, value in node.items():
            inner = f"{place}.{key}" if place else str(key)
            yield inner, str(key)
            yield from _texts(value, inner)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{place}.{index}")
