"""What is said of some sources by name: strides, cameras. A name may be a pattern, and the first that fits counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

_Value = TypeVar("_Value")


def chosen(choice: Mapping[str, _Value], source: str, otherwise: _Value) -> _Value:
    """What is said of a source."""
    return next((value for pattern, value in choice.items() if fnmatchcase(source, pattern)), otherwise)


def check_names(choice: Iterable[str], sources: Iterable[str], what: str) -> None:
    """Raises ValueError where something is said of a source that there is not."""
    sources = sorted(set(sources))
    for pattern in choice:
        if not any(fnmatchcase(source, pattern) for source in sources):
            raise ValueError(f"{what} names {pattern!r}, and the sources are {', '.join(map(repr, sources))}")
