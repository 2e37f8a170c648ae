"""Class paths of recipes: which classes a recipe may name, and whether their arguments exist.

A recipe is data that people pass around, and naming a class runs code. So, unless the recipe is trusted, only classes
of this package and the building blocks of lightning and torch below can be named, and never a function.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from ivideogpt.recipes.reading import nearest

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
ALLOWED = (
    "ivideogpt",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.plugins",
    "pytorch_lightning.profilers",
    "pytorch_lightning.strategies",
    "torch.nn",
    "torch.optim",
)
REFUSED = ("LambdaCallback",)
"""Classes under these that do nothing but call whatever function they are given."""


def import_class(path: str, where: str, trust: bool = False) -> type:
    """The class that ``path`` names.

    Raises:
        ValueError: if there is none (naming the nearest), it is no class, or an untrusted recipe may not name it.
    """
    if not isinstance(path, str) or not CLASS_PATH.fullmatch(path):
        raise ValueError(
            f"{where}: class_path must be a dotted name such as ivideogpt.training.TokenizerModule, got {path!r}"
        )
    if not trust and not _is_allowed(path):
        raise ValueError(_refusal(path, where))
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ImportError(f"{where}: {path} needs the package {error.name!r}, which is not installed") from error
        raise ValueError(f"{where}: there is no module {module_name!r}{_module_hint(module_name)}") from error
    found = getattr(module, name, None)
    if found is None:
        known = [key for key in {*vars(module), *dir(module)} if inspect.isclass(getattr(module, key, None))]
        raise ValueError(f"{where}: {module_name} has no class {name!r}; {nearest(name, known or ['(none)'])}")
    if not inspect.isclass(found):
        raise ValueError(f"{where}: {path} is no class but a {type(found).__name__}")
    # a module may carry classes of others; where a class was written decides
    if not trust and not (_is_allowed(f"{found.__module__}.x") and found.__name__ not in REFUSED):
        raise ValueError(_refusal(f"{path} ({found.__module__}.{found.__name__})", where))
    return found


def _is_allowed(path: str) -> bool:
    return any(path.startswith(f"{root}.") for root in ALLOWED)


def _refusal(path: str, where: str) -> str:
    return (
        f"{where}: a recipe may not name {path}: only classes of ivideogpt, of lightning.pytorch (callbacks, loggers, "
        f"plugins, profilers, strategies), torch.nn and torch.optim are allowed. If you trust the recipe, which can "
        f"then run any code, give --trust"
    )


def _module_hint(name: str) -> str:
    parent, _, last = name.rpartition(".")
    try:
        folder = getattr(importlib.import_module(parent), "__path__", None) if parent else None
    except ImportError:
        return ""
    known = [path.stem for entry in folder or [] for path in Path(entry).iterdir() if not path.name.startswith("_")]
    return f" in {parent}; {nearest(last, known)}" if known else ""


@functools.cache
def arguments(cls: Any) -> tuple[dict[str, Any], bool]:
    """Constructor arguments of ``cls`` with their types, and whether it takes any other name (``**kwargs``)."""
    parameters = list(inspect.signature(cls).parameters.values())
    try:
        hints = typing.get_type_hints(cls.__init__)
    except Exception:  # a name that is imported for type checkers only
        hints = {}
    named = {
        p.name: hints.get(p.name, p.annotation) for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def defaults(cls: type) -> dict[str, Any]:
    """Arguments of ``cls`` that have a default of plain data."""
    found = {}
    for parameter in inspect.signature(cls).parameters.values():
        value = parameter.default
        if isinstance(value, tuple):
            value = list(value)
        if value is None or isinstance(value, (str, int, float, bool, list)):
            found[parameter.name] = value
    return found


def leaves(hint: Any) -> Iterator[Any]:
    """The types inside a type annotation."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        yield from (type(value) for value in inner)
    elif typing.get_origin(hint) in (Callable, typing.get_origin(typing.Callable[..., Any])):
        yield Callable
    elif not inner or typing.get_origin(hint) is type:
        yield hint
    else:
        for part in inner:
            yield from leaves(part)


_WORD = re.compile(r"[A-Za-z0-9_:,+-]*")
_PLAIN = (str, int, float, bool, bytes, list, dict, tuple, set, types.NoneType, timedelta, Any, object, ..., Path)


def check_arguments(cls: type, values: Any, where: str, trust: bool, skip: tuple[str, ...] = ()) -> None:
    """Checks that ``cls`` takes the arguments ``values``, and the classes inside of them, before anything is built.

    Args:
        cls: the class.
        values: its ``init_args``.
        where: dotted place in the recipe, for errors.
        trust: whether classes from anywhere are allowed.
        skip: arguments that are checked elsewhere.

    Raises:
        ValueError: naming an unknown argument's nearest, or a class that may not be named.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: the arguments of {cls.__name__} must be a mapping, got {values!r}")
    known, open_ended = arguments(cls)
    for key, value in values.items():
        if key not in known and not open_ended:
            raise ValueError(f"{where}: {cls.__name__} has no argument {key!r}; {nearest(str(key), known)}")
        if key not in skip:
            _check_value(value, known.get(key, Any), f"{where}.{key}", trust)


def _check_value(value: Any, hint: Any, where: str, trust: bool) -> None:
    if isinstance(value, dict) and "class_path" in value:
        extra = value.keys() - {"class_path", "init_args"}
        if extra:
            raise ValueError(f"{where}: beside class_path only init_args may stand, got {sorted(extra)}")
        cls = import_class(value["class_path"], where, trust)
        check_arguments(cls, value.get("init_args") or {}, where, trust)
    elif isinstance(value, dict) and (fields := _dataclass(hint)) is not None:
        check_arguments(fields, value, where, trust)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_value(item, hint, f"{where}.{key}", trust)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(item, hint, f"{where}.{index}", trust)
    elif isinstance(value, str) and not trust:
        _check_string(value, hint, where)


def _dataclass(hint: Any) -> type | None:
    """The dataclass that a mapping is turned into, None where it stays one."""
    return next((leaf for leaf in leaves(hint) if isinstance(leaf, type) and dataclasses.is_dataclass(leaf)), None)


def _check_string(value: str, hint: Any, where: str) -> None:
    """Refuses a string where jsonargparse would take it for the name of a class or function and import it."""
    kinds = list(leaves(hint))
    plain = [kind in _PLAIN or (inspect.isclass(kind) and issubclass(kind, enum.Enum)) for kind in kinds]
    takes_text = any(kind in (str, Any, Path) for kind in kinds)
    # an argument without a known type may be one that the class hands on to a function that it calls
    unknown = hint in (Any, inspect.Parameter.empty)
    names_class = unknown or not all(plain)
    # text is parsed as YAML or JSON first, where an escape can hide a dot: only a bare word is surely no class
    if names_class and not (takes_text and _WORD.fullmatch(value)) and value not in _literals(hint):
        raise ValueError(f"{where}: write a class as class_path and init_args, got {value!r}")


def _literals(hint: Any) -> set[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    return {value for part in typing.get_args(hint) for value in _literals(part)}
