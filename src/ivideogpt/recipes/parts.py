"""Model parts of a recipe's modules: fresh from a configuration, or from an earlier stage, the zoo, a folder.

A module's argument of type tokenizer, transformer, reward head or world model is written as one of

    {preset: nano, context_length: 2}     fresh weights: a preset, fields of its configuration changed
    {num_layers: 2, embed_dim: 64, ...}   fresh weights: fields of the configuration alone
    {preset: "256", initial_weights: amused/amused-256}   of a tokenizer: weights of an image VQGAN, the rest fresh
    {from: tokenizer}                     of an earlier stage of the recipe
    {from: ivideogpt-metaworld-nano}      of a zoo name, a Hub id or a folder

``from`` takes revision, context_length, action_dim and action_space beside it, as ``ivideogpt.from_pretrained`` does;
``action_dim: null`` drops the action layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ivideogpt.config import RewardHeadConfig, TokenizerConfig, TransformerConfig
from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.recipes.classes import arguments, leaves
from ivideogpt.recipes.reading import Node, nearest
from ivideogpt.recipes.results import load_tokenizer
from ivideogpt.world_model import WorldModel
from ivideogpt.zoo.adapter import is_adapter
from ivideogpt.zoo.changing import drop_action_layer
from ivideogpt.zoo.checkpoint import Parts, load_parts
from ivideogpt.zoo.vq_weights import find_vq_weights, start_from_vq_weights

KINDS: dict[type, str] = {
    CompressiveTokenizer: "tokenizer",
    Transformer: "transformer",
    RewardHead: "reward_head",
    WorldModel: "world_model",
}
CLASSES: dict[str, Any] = {kind: cls for cls, kind in KINDS.items()}
CHANGES = ("context_length", "action_dim", "action_space")
SOURCE_KEYS = ("from", "revision", *CHANGES)
INITIAL_WEIGHTS = "initial_weights"
_CONFIGS: dict[str, Any] = {
    "tokenizer": TokenizerConfig,
    "transformer": TransformerConfig,
    "reward_head": RewardHeadConfig,
}


def part_arguments(cls: type) -> dict[str, str]:
    """Arguments of the module class ``cls`` that are model parts, in the order of building: {argument: kind}."""
    found = {}
    for name, hint in arguments(cls)[0].items():
        kinds = [KINDS[leaf] for leaf in leaves(hint) if isinstance(leaf, type) and leaf in KINDS]
        if kinds:
            found[name] = kinds[0]
    order = list(KINDS.values())
    return dict(sorted(found.items(), key=lambda item: order.index(item[1])))


def check_part(kind: str, spec: Any, where: str, earlier: Collection[str] = (), later: Collection[str] = ()) -> None:
    """Checks the keys and values of a part's ``spec``, as far as they can be checked alone.

    Raises:
        ValueError: naming the unknown key's nearest.
    """
    if not isinstance(spec, dict):
        raise ValueError(f"{where}: a {kind} is a mapping such as {{preset: nano}} or {{from: STAGE}}, got {spec!r}")
    if "from" in spec:
        known: tuple[str, ...] = SOURCE_KEYS
        if not isinstance(spec["from"], str) or not spec["from"]:
            raise ValueError(f"{where}.from must name a stage, a zoo name or a folder, got {spec['from']!r}")
    elif kind == "world_model":
        raise ValueError(
            f"{where}: a world model comes from somewhere: {{from: STAGE, zoo name or folder}}, got {spec!r}"
        )
    else:
        known = tuple(field.name for field in dataclasses.fields(_CONFIGS[kind]))
        known = known if kind == "reward_head" else ("preset", *known)
        known = (*known, INITIAL_WEIGHTS) if kind == "tokenizer" else known
    for key in spec:
        if key not in known:
            source = " of {from: ...}" if "from" in spec else ""
            raise ValueError(f"{where}: unknown key {key!r}{source}; {nearest(str(key), known)}")
    if not isinstance(spec.get(INITIAL_WEIGHTS), str | None):
        raise ValueError(
            f"{where}.{INITIAL_WEIGHTS} must name a file, a folder or a Hub id, got {spec[INITIAL_WEIGHTS]!r}"
        )
    if "from" not in spec:
        part_config(kind, spec, where)
    elif spec["from"] in later and spec["from"] not in earlier:
        raise ValueError(
            f"{where}.from: the stage {spec['from']!r} does not come before this one"
            + (f"; earlier stages are {', '.join(earlier)}" if earlier else "")
        )


def part_config(kind: str, fields: Node, where: str) -> Any:
    """Configuration that the ``fields`` of a fresh part describe.

    Raises:
        ValueError: if a value does not fit.
    """
    fields = {name: value for name, value in fields.items() if name != INITIAL_WEIGHTS}
    preset = fields.pop("preset", None)
    config_class = _CONFIGS[kind]
    try:
        return config_class(**fields) if preset is None else config_class.preset(preset, **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


class PartBuilder:
    """Builds the parts of one stage's module.

    Args:
        folders: folders of the earlier stages by name.

    Attributes:
        loaded: the loaded world models that parts were taken from, whose side file and fields are carried on.
        notes: lines that say what was left out of them.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = folders
        self.loaded: dict[str, Parts] = {}
        self.notes: list[str] = []
        self._built: dict[str, nn.Module] = {}

    def build(self, kind: str, spec: Node, where: str) -> Any:
        """The module for a checked ``spec``; a fresh transformer or reward head takes its sizes from what was built.

        Raises:
            ValueError: if the configuration or the source does not fit.
        """
        part = self._load(kind, spec, where) if "from" in spec else self._fresh(kind, dict(spec), where)
        self._built[kind] = part
        return part

    def _fresh(self, kind: str, fields: Node, where: str) -> nn.Module:
        tokenizer, transformer = self._built.get("tokenizer"), self._built.get("transformer")
        if kind == "transformer" and isinstance(tokenizer, CompressiveTokenizer):
            fields.setdefault("vocab_size", tokenizer.config.vocab_size)
        if kind == "reward_head" and isinstance(transformer, Transformer):
            fields.setdefault("embed_dim", transformer.config.embed_dim)
        return self._make(kind, part_config(kind, fields, where), fields, where)

    def _make(self, kind: str, config: Any, fields: Node, where: str) -> nn.Module:
        """A fresh part; ``fields`` may name initial weights."""
        part = CLASSES[kind](config)
        if fields.get(INITIAL_WEIGHTS) is not None:
            try:
                start_from_vq_weights(part, fields[INITIAL_WEIGHTS])
            except ValueError as error:
                raise ValueError(f"{where}.{INITIAL_WEIGHTS}: {error}") from error
        return part

    def _load(self, kind: str, spec: Node, where: str) -> Any:
        if kind == "tokenizer":
            tokenizer = self._tokenizer(spec, where)
            if spec.get("context_length") is not None:
                tokenizer.set_context_length(spec["context_length"])
            return tokenizer
        try:
            parts = self._world_model(kind, spec, where)
        except ValueError as error:
            raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from error
        if "action_dim" in spec and spec["action_dim"] is None:
            size = parts.transformer.config.action_dim
            if size is not None or parts.action_layers is not None:
                which = "action spaces" if size is None else f"action layer (actions of size {size})"
                self.notes.append(f"the {which} of {spec['from']} left out (action_dim: null)")
            drop_action_layer(parts)
        self.loaded[kind] = parts
        if kind == "world_model":
            if parts.action_layers is not None:
                raise ValueError(several_spaces(where, spec["from"], parts))
            return WorldModel.from_parts(
                parts.tokenizer, parts.transformer, parts.reward_head, parts.extras, parts.published
            )
        if kind == "reward_head" and parts.reward_head is None:
            raise ValueError(f"{where}: {spec['from']!r} has no reward head; leave `from` out for a fresh one")
        return getattr(parts, kind)

    def _tokenizer(self, spec: Node, where: str) -> CompressiveTokenizer:
        """That of the source that ``spec`` names."""
        return load_tokenizer(source_folder(spec, self.folders, where))

    def _world_model(self, kind: str, spec: Node, where: str) -> Parts:
        """Parts of the source that ``spec`` names, changed as it says."""
        folder = source_folder(spec, self.folders, where)
        if not (folder / "transformer").is_dir() and not is_adapter(folder):
            raise ValueError(f"{where}: {spec['from']!r} ({folder}) holds a tokenizer only, not a {kind}")
        return load_parts(folder, **{key: spec.get(key) for key in CHANGES})


def several_spaces(where: str, name: str, parts: Parts) -> str:
    """What to say where a model of several action spaces stands for one."""
    assert parts.action_layers is not None
    spaces = ", ".join(map(repr, parts.action_layers.spaces))
    return f"{where}: {name!r} has several action spaces: give action_space, one of {spaces}"


def check_initial_weights(spec: Node, where: str) -> None:
    """Finds, or fetches, the initial weights that a part names.

    Raises:
        ValueError: if they are not there.
    """
    if spec.get(INITIAL_WEIGHTS) is not None:
        try:
            find_vq_weights(spec[INITIAL_WEIGHTS])
        except ValueError as error:
            raise ValueError(f"{where}.{INITIAL_WEIGHTS}: {error}") from error


def source_folder(spec: Node, folders: Mapping[str, Path], where: str) -> Path:
    """Folder that a ``from`` means: an earlier stage, else a zoo name, Hub id or folder.

    Raises:
        ValueError: if there is no such thing, naming the stages.
    """
    name = spec["from"]
    if name in folders:
        if spec.get("revision") is not None:
            raise ValueError(f"{where}: a stage has no revision, got {spec['revision']!r}")
        return folders[name]
    from ivideogpt.zoo.hub import resolve

    try:
        return Path(resolve(name, spec.get("revision")))
    except (ValueError, OSError) as error:
        stages = f"earlier stages are {', '.join(folders)}" if folders else "there is no earlier stage"
        raise ValueError(f"{where}.from: {error} ({stages})") from error
