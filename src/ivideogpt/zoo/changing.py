"""What may be changed of a loaded model before it is used: context length, action space, action layer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ivideogpt.zoo.action_spaces import choose_action_space

if TYPE_CHECKING:
    from ivideogpt.zoo.checkpoint import Parts


class ActionLayerWarning(UserWarning):
    """The action layer of a loaded model is fresh, because the checkpoint has none or one of another size."""


def change_parts(
    parts: Parts,
    folder: Path,
    context_length: int | None = None,
    action_dim: int | None = None,
    action_space: str | None = None,
) -> None:
    """Changes ``parts`` as :func:`ivideogpt.zoo.checkpoint.load_parts` says; what is None stays as it is.

    Args:
        parts: of the model.
        folder: that they are of, for messages.
        context_length: shortens the tokenizer's context.
        action_dim: size of the actions that will be given.
        action_space: of several, the one whose action layer the transformer gets.

    Raises:
        ValueError: if an argument does not fit.
    """
    if action_space is not None:
        parts.transformer, statistics = choose_action_space(
            parts.transformer, parts.action_layers, action_space, folder
        )
        parts.extras, parts.action_layers = parts.extras | statistics, None
    if context_length is not None and context_length != parts.tokenizer.config.context_length:
        parts.tokenizer.set_context_length(context_length)
    if action_dim is not None and action_dim != parts.transformer.config.action_dim:
        _renew_action_layer(parts, action_dim, folder)


def drop_action_layer(parts: Parts) -> None:
    """Makes ``parts`` those of a model without actions; statistics of actions go with the layer."""
    parts.transformer.action_linear = None
    parts.transformer.config = replace(parts.transformer.config, action_dim=None)
    parts.extras = _without_action_statistics(parts.extras)
    parts.action_layers = parts.adapter = None


def _renew_action_layer(parts: Parts, action_dim: int, folder: Path) -> None:
    transformer = parts.transformer
    old = transformer.config.action_dim
    transformer.config = replace(transformer.config, action_dim=action_dim)
    like = transformer.lm_head.weight
    layer = nn.Linear(action_dim, transformer.config.embed_dim, device=like.device, dtype=like.dtype)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    transformer.action_linear = layer
    parts.extras = _without_action_statistics(parts.extras)
    parts.action_layers = parts.adapter = None
    had = "no action layer" if old is None else f"an action layer for actions of size {old}"
    warnings.warn(
        f"{folder} has {had}: the model gets a fresh one for actions of size {action_dim}. It is zero, so actions "
        "change nothing until it is trained; everything else is kept",
        ActionLayerWarning,
        stacklevel=5,  # where from_pretrained is called
    )


def _without_action_statistics(extras: dict[str, Any]) -> dict[str, Any]:
    """``extras`` of a model whose action layer is another one now."""
    return {name: value for name, value in extras.items() if name not in ("action_mean", "action_std")}
