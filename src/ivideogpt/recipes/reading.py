"""Reads a recipe: YAML with overlays, per-stage defaults and overrides, resolved into plain dictionaries.

Resolving knows the recipe's own keys only. Class paths and their arguments are checked in ``classes``.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

Node = dict[str, Any]

RECIPE_KEYS = ("name", "description", "seed", "output", "on_change", "base", "defaults", "stages", "publish")
STAGE_KEYS = ("module", "data", "trainer")
ON_CHANGE = ("error", "rerun", "continue")
STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RESERVED_STAGE_NAMES = ("model",)
"""Folders of the output that are no stage."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with 1e-4 a number, yes and no words, and a key given twice an error."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands here twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float",
                                                                    "tag:yaml.org,2002:timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}  # fmt: skip
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
               r"|\.inf|\.nan)$"),
    list("-+0123456789."),
)  # fmt: skip


def parse_yaml(text: str, where: object) -> Any:
    """Value of the YAML ``text``.

    Raises:
        ValueError: saying where it is not valid.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader with other scalars
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(recipe: Node) -> str:
    """YAML text of a resolved recipe, which reads back as the same."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110)


def nearest(word: str, known: Iterable[str]) -> str:
    """Hint for an unknown ``word``: the nearest known one, or all of them where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> Node:
    """Recipe file ``path`` merged over the overlays that its ``base`` names (relative to it, later ones win).

    Raises:
        ValueError: on broken YAML, an overlay that is missing or names itself.
    """
    path = path.resolve()
    if path in seen:
        raise ValueError(f"{path} names itself in `base`, by way of {' -> '.join(p.name for p in seen)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}") from error
    recipe = parse_yaml(text, path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold a mapping (name, stages, ...), got {type(recipe).__name__}")
    overlays = recipe.pop("base", None) or []
    if isinstance(overlays, str):
        overlays = [overlays]
    merged: Node = {}
    for overlay in overlays:
        overlay_path = path.parent / str(overlay)
        if not overlay_path.is_file():
            raise ValueError(f"{path}: base names {overlay!r}, but there is no file {overlay_path}")
        merged = merge(merged, read_file(overlay_path, (*seen, path)))
    return merge(merged, recipe)


def lay_over(recipe: Node, overrides: Sequence[str], folders: Sequence[Path]) -> tuple[Node, list[str]]:
    """The recipe with the overlays laid over it that ``base=FILE`` names among the overrides, and the other overrides.

    Args:
        recipe: as it was read.
        overrides: ``key=value``; ``base=[A, B]``, or ``base=`` several times, names several, of which later ones win.
        folders: that a file is looked for in, one after another.

    Raises:
        ValueError: if there is no such file.
    """
    rest = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key.strip() != "base":
            rest.append(text)
            continue
        names = parse_yaml(value, f"the value of override {text!r}")
        for name in names if isinstance(names, list) else [names]:
            found = next((folder / str(name) for folder in folders if (folder / str(name)).is_file()), None)
            if name is None or found is None:
                looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
                raise ValueError(f"override {text!r}: there is no file {name!r} in {looked}")
            recipe = merge(recipe, read_file(found))
    return recipe, rest


def merge(under: Any, over: Any) -> Any:
    """``over`` laid upon ``under``: mappings key by key, everything else replaced; another class_path replaces all."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    if "class_path" in over and under.get("class_path") != over["class_path"]:
        return copy.deepcopy(over)
    merged = copy.deepcopy(under)
    for key, value in over.items():
        merged[key] = merge(under.get(key), value)
    return merged


def resolve(recipe: Node, overrides: Sequence[str] = ()) -> Node:
    """Recipe with its ``defaults`` folded into the stages and ``key=value`` overrides applied.

    Raises:
        ValueError: on an unknown key (naming the nearest), a stage or an override that cannot be.
    """
    parsed = [_parse_override(text) for text in overrides]
    recipe = copy.deepcopy(recipe)
    stages = recipe.get("stages") or {}
    parsed = [  # `trainer.devices=8` is said of every stage
        (("defaults", *path) if path[0] in STAGE_KEYS and path[0] not in stages else path, value)
        for path, value in parsed
    ]
    for path, value in parsed:
        if path[0] == "defaults":
            _assign(recipe, path, value)
    _check_keys(recipe, RECIPE_KEYS, "the recipe")
    defaults = recipe.pop("defaults", None) or {}
    _check_keys(defaults, STAGE_KEYS, "defaults")
    stages = recipe.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise ValueError(f"a recipe needs `stages`, a mapping of at least one, got {stages!r}")
    recipe["stages"] = {name: merge(defaults, stage) for name, stage in stages.items() if stage is not None}
    for path, value in parsed:
        if path[0] != "defaults":
            if path[0] not in RECIPE_KEYS and path[0] in recipe["stages"]:
                path = ("stages", *path)
            _assign(recipe, path, value)
    recipe["stages"] = {name: stage for name, stage in recipe["stages"].items() if stage is not None}
    _check_keys(recipe, RECIPE_KEYS, "the recipe")
    return _check_recipe(recipe)


def _check_recipe(recipe: Node) -> Node:
    name = recipe.get("name")
    if not isinstance(name, str) or not STAGE_NAME.fullmatch(name):
        raise ValueError(f"a recipe needs a `name` of letters, digits, '-' and '_', got {name!r}")
    seed = recipe.setdefault("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0 on, got {seed!r}")
    if not isinstance(recipe.setdefault("output", f"runs/{name}"), str) or not recipe["output"]:
        raise ValueError(f"output must name a folder, got {recipe['output']!r}")
    if recipe.setdefault("on_change", "error") not in ON_CHANGE:
        raise ValueError(f"on_change must be one of {', '.join(ON_CHANGE)}, got {recipe['on_change']!r}")
    for stage, content in recipe["stages"].items():
        if not STAGE_NAME.fullmatch(stage) or stage in RESERVED_STAGE_NAMES:
            raise ValueError(f"stage name {stage!r} must be of letters, digits, '-' and '_', and not 'model'")
        if not isinstance(content, dict):
            raise ValueError(f"stages.{stage} must be a mapping of {', '.join(STAGE_KEYS)}, got {content!r}")
        _check_keys(content, STAGE_KEYS, f"stages.{stage}")
        for key in STAGE_KEYS:
            if not isinstance(content.get(key), dict):
                raise ValueError(f"stages.{stage} needs `{key}`, a mapping, got {content.get(key)!r}")
    if not recipe["stages"]:
        raise ValueError("no stage is left: every one was set to null")
    return {key: recipe[key] for key in RECIPE_KEYS if key in recipe}


def _check_keys(node: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(node, dict):
        raise ValueError(f"{where} must be a mapping, got {node!r}")
    for key in node:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")


def _parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ValueError(f"override {text!r} must be key=value, such as stages.tokenizer.trainer.max_steps=100")
    if path[0] == "base":
        raise ValueError(f"override {text!r}: `base` takes a file, such as base=base/fsdp.yaml")
    return path, parse_yaml(value, f"the value of override {text!r}")


def _assign(recipe: Node, path: tuple[str, ...], value: Any) -> None:
    """Sets one value; ``init_args`` may be left out of ``path``."""
    node: Any = recipe
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        where = ".".join(path[:depth]) or "the recipe"
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"{'.'.join(path)}: {where} is a list of {len(node)}, it has no {part!r}")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise ValueError(f"{'.'.join(path)}: {where} is {node!r}, it has nothing inside")
        if "class_path" in node and part not in ("class_path", "init_args"):
            node = node.setdefault("init_args", {})
            if not isinstance(node, dict):
                raise ValueError(f"{where}.init_args must be a mapping, got {node!r}")
        if depth == 1 and path[0] == "stages" and part not in node:
            raise ValueError(f"{'.'.join(path)}: there is no stage {part!r}; {nearest(part, node)}")
        if depth == 0 and part not in RECIPE_KEYS:
            raise ValueError(f"unknown key {part!r}; {nearest(part, {*RECIPE_KEYS, *(recipe.get('stages') or {})})}")
        if last:
            if part == "class_path" and node.get("class_path") != value:
                node.clear()  # another class has other arguments
            node[part] = value
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
