"""Episodes, shards, clips and the data module. Knows `config` and `layout` and nothing above them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivideogpt.data.datamodule import VideoDataModule
    from ivideogpt.data.episode import Episode
    from ivideogpt.data.reader import ShardError, ShardSet
    from ivideogpt.data.shards import ShardSetWriter
    from ivideogpt.data.token_datamodule import TokenDataModule
    from ivideogpt.data.tokenized import TokenSet

__all__ = ["Episode", "ShardError", "ShardSet", "ShardSetWriter", "TokenDataModule", "TokenSet", "VideoDataModule"]

_HOMES = {
    "Episode": "episode",
    "ShardError": "reader",
    "ShardSet": "reader",
    "ShardSetWriter": "shards",
    "TokenDataModule": "token_datamodule",
    "TokenSet": "tokenized",
    "VideoDataModule": "datamodule",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: simulator processes and `ivideogpt data --help` shall not wait for Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
