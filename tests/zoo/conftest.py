"""Fixtures of the zoo's tests: a tiny checkpoint on disk, and ways to damage it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

TOKENIZER = Path("tokenizer/diffusion_pytorch_model.safetensors")
TRANSFORMER = Path("transformer/model.safetensors")


class Checkpoint:
    """A checkpoint folder whose files can be edited in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def edit_config(self, part: str, remove: str | None = None, **changes: Any) -> dict[str, Any]:
        """Changes fields of ``part``'s configuration; returns what is then in the file."""
        path = self.folder / part / "config.json"
        fields = json.loads(path.read_text()) | changes
        if remove is not None:
            del fields[remove]
        path.write_text(json.dumps(fields))
        return fields

    def edit_tensors(self, file: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
        """Has ``edit`` change the tensors of ``file``."""
        tensors = load_file(self.folder / file)
        edit(tensors)
        save_file(tensors, self.folder / file, metadata={"format": "pt"})

    def tensors(self, file: Path) -> dict[str, Tensor]:
        return load_file(self.folder / file)

    def config(self, part: str) -> dict[str, Any]:
        return json.loads((self.folder / part / "config.json").read_text())


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_world_model: Callable[..., Any]) -> Callable[..., Checkpoint]:
    """``checkpoint(action_dim=None, reward=False, ...)`` saves a tiny random world model."""

    def save(action_dim: int | None = None, reward: bool = False, **arguments: Any) -> Checkpoint:
        model = tiny_world_model(action_dim, reward, **{"max_attention_resolution": 8, **arguments})
        return Checkpoint(model.save_pretrained(tmp_path / "checkpoint"))

    return save
