"""Models of a recipe's stages before any of them has run: their shapes and settings, without memory for weights.

A mistake in a late stage is so found before an early one takes its days.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.recipes.parts import CHANGES, CLASSES, PartBuilder, source_folder
from ivideogpt.recipes.reading import Node
from ivideogpt.recipes.results import load_tokenizer
from ivideogpt.zoo.action_spaces import ACTION_SPACES
from ivideogpt.zoo.adapter import is_adapter
from ivideogpt.zoo.changing import change_parts
from ivideogpt.zoo.checkpoint import Parts, load_parts
from ivideogpt.zoo.tensors import build_on_meta


class UnknownDraftError(Exception):
    """A stage starts from another one, of whose module nothing is known before it is built."""


class DraftBuilder(PartBuilder):
    """Builds parts on the meta device; those of stages that have not run come from the drafts of their modules.

    Args:
        folders: folders of the earlier stages by name.
        drafts: modules of those earlier stages that are to run; None where there is no draft.
    """

    def __init__(self, folders: Mapping[str, Path], drafts: Mapping[str, Any]) -> None:
        super().__init__(folders)
        self.drafts = drafts

    def _make(self, kind: str, config: Any, fields: Node, where: str) -> nn.Module:
        made: nn.Module = build_on_meta(lambda: CLASSES[kind](config), where)
        return made

    def _tokenizer(self, spec: Node, where: str) -> CompressiveTokenizer:
        if spec["from"] in self.drafts:
            tokenizer: CompressiveTokenizer = copy.deepcopy(self._draft(spec["from"]).tokenizer)
            return tokenizer
        return load_tokenizer(source_folder(spec, self.folders, where), "meta")

    def _world_model(self, kind: str, spec: Node, where: str) -> Parts:
        changes = {key: spec.get(key) for key in CHANGES}
        if spec["from"] in self.drafts:
            module = self._draft(spec["from"])
            if getattr(module, "transformer", None) is None:
                raise ValueError(f"{where}: {spec['from']!r} makes a tokenizer only, not a {kind}")
            made = (module.tokenizer, module.transformer, module.reward_head, module.action_layers)
            tokenizer, transformer, head, layers = copy.deepcopy(made)
            parts = Parts(tokenizer, transformer, head, dict(module.action_statistics), action_layers=layers)
            change_parts(parts, self.folders[spec["from"]], **changes)
            return parts
        folder = source_folder(spec, self.folders, where)
        if (folder / "transformer").is_dir() and not is_adapter(folder) and not (folder / ACTION_SPACES).is_file():
            return load_parts(folder, "meta", **changes)
        return super()._world_model(kind, spec, where)  # their values are checked, so they are read

    def _draft(self, name: str) -> Any:
        module = self.drafts[name]
        if module is None:
            raise UnknownDraftError(name)
        return module
