"""The side file ``ivideogpt.json`` beside the published files: what their layout has no place for.

It is a JSON object with the fields of :data:`KNOWN`, all optional but ``format``. A world model keeps the object (less
``format`` and ``package_version``, which are written anew) as its ``extras``.
"""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ivideogpt.zoo.published import check_known, read_json

SIDE_FILE = "ivideogpt.json"
FORMAT = 1
_MODEL = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)  # a zoo name or a Hub id, never a path
_REVISION = re.compile(r"[A-Za-z0-9_][\w./-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")

KNOWN = {
    "format": "version of this file's format",
    "package_version": "version of ivideogpt that wrote the file",
    "reward_transform": "what the reward head was trained on: symlog or identity",
    "action_mean": "per action dimension, subtracted from an action before the action layer",
    "action_std": "per action dimension, what the difference is divided by",
    "tokenizer_attention_dropout": "dropout of the tokenizer's cross-attention while training",
    "preprocessing": "how frames were made from recordings (object)",
    "recipe": "name of the recipe that trained the weights; its resolved text is recipe.yaml",
    "training": "how they were trained: data, updates, seed (object)",
    "base_model": "zoo name or Hub id of the model that training started from",
    "adapter_base": "of an adapter: its base as model and revision, or folder; sha256; context_length if shortened",
    "notes": "anything else (object)",
}


def read_side_file(folder: Path) -> dict[str, Any]:
    """Extras in the side file of ``folder``, empty where there is none.

    Raises:
        ValueError: if the file is no JSON object, of a later format, or holds an unknown field or a wrong value.
    """
    path = folder / SIDE_FILE
    if not path.is_file():
        return {}
    fields = read_json(path)
    written = fields.get("format", FORMAT)
    if not isinstance(written, int) or isinstance(written, bool) or not 1 <= written <= FORMAT:
        raise ValueError(
            f"{path}: format {written!r}; this version of ivideogpt reads formats 1 to {FORMAT}: a later one wrote it "
            f"(package_version {fields.get('package_version')!r})"
        )
    check_extras(fields, path)
    return {name: value for name, value in fields.items() if name not in ("format", "package_version")}


def side_file_text(extras: dict[str, Any]) -> str:
    """Text of the side file for ``extras``.

    Raises:
        ValueError: if they hold an unknown field or a wrong value.
    """
    check_extras(extras, "extras")
    fields = {"format": FORMAT, "package_version": _package_version(), **extras}
    try:
        return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"extras cannot be written as JSON: {error}") from error


def check_extras(extras: dict[str, Any], where: object, action_dim: int | None = None) -> None:
    """Checks the fields of ``extras``, and the action statistics against ``action_dim`` where that is given.

    Raises:
        ValueError: on an unknown field or a wrong value.
    """
    check_known(extras, KNOWN, where, extras)
    transform = extras.get("reward_transform", "symlog")
    if transform not in ("symlog", "identity"):
        raise ValueError(f"{where}: reward_transform must be 'symlog' or 'identity', got {transform!r}")
    for name in ("preprocessing", "training", "notes"):
        if not isinstance(extras.get(name, {}), dict):
            raise ValueError(f"{where}: {name} must be an object, got {extras[name]!r}")
    dropout = extras.get("tokenizer_attention_dropout", 0.0)
    if not _is_finite(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"{where}: tokenizer_attention_dropout must be in [0, 1), got {dropout!r}")
    if "adapter_base" in extras:
        _check_adapter_base(extras["adapter_base"], f"{where}: adapter_base")
    if ("action_mean" in extras) != ("action_std" in extras):
        raise ValueError(f"{where}: action_mean and action_std belong together, got only one of them")
    if "action_mean" not in extras:
        return
    for name in ("action_mean", "action_std"):
        values = extras[name]
        if not isinstance(values, list) or not all(_is_finite(value) for value in values):
            raise ValueError(f"{where}: {name} must be a list of finite numbers, got {values!r}")
        if action_dim is not None and len(values) != action_dim:
            raise ValueError(f"{where}: {name} has {len(values)} values for actions of size {action_dim}")
    if len(extras["action_std"]) != len(extras["action_mean"]) or min(extras["action_std"], default=1.0) <= 0:
        raise ValueError(f"{where}: action_std must be as many positive numbers, got {extras['action_std']!r}")


def _check_adapter_base(base: Any, where: str) -> None:
    if not isinstance(base, dict):
        raise ValueError(f"{where} must be an object, got {base!r}")
    check_known(base, ("model", "revision", "folder", "sha256", "context_length"), where, base)
    if ("model" in base) == ("folder" in base) or ("folder" in base and "revision" in base):
        raise ValueError(f"{where} must have a model, with a revision or without, or a folder, got {sorted(base)}")
    if not isinstance(base.get("folder", "."), str) or "\0" in base.get("folder", "."):
        raise ValueError(f"{where}: folder must be a path, got {base['folder']!r}")
    for name, pattern in (("model", _MODEL), ("revision", _REVISION), ("sha256", _SHA256)):
        value = base.get(name)
        if (value is not None or name == "sha256") and not (isinstance(value, str) and pattern.fullmatch(value)):
            raise ValueError(f"{where}: {name} {value!r} cannot be one")
    length = base.get("context_length", 1)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"{where}: context_length must be 1 or more, got {length!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _package_version() -> str:
    try:
        return version("ivideogpt")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
