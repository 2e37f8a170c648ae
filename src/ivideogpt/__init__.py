"""iVideoGPT: video world models that robots and agents can roll out, train and share."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivideogpt.rollout.speculation import Speculation
    from ivideogpt.world_model import WorldModel, WorldModelOutput, from_pretrained
    from ivideogpt.zoo.registry import list_models

# Name -> home; imported on first use, so that `import ivideogpt` and the command line's help stay quick.
_EXPORTS = {
    "Speculation": "ivideogpt.rollout.speculation",
    "WorldModel": "ivideogpt.world_model",
    "WorldModelOutput": "ivideogpt.world_model",
    "from_pretrained": "ivideogpt.world_model",
    "list_models": "ivideogpt.zoo.registry",
}

__all__ = ["Speculation", "WorldModel", "WorldModelOutput", "__version__", "from_pretrained", "list_models"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ivideogpt")
        except PackageNotFoundError:  # imported from a checkout that is not installed
            return "0+unknown"
    raise AttributeError(f"module 'ivideogpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
