"""The file of several action spaces beside a transformer: `NAME.weight`, `.bias`, `.mean` and `.std` of each space.

The published layout holds one action layer at most, so models of several embodiments have theirs in a file of their
own, and the other files are those of a model without actions.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ivideogpt.models.action_layers import ActionLayers, with_action_layer
from ivideogpt.models.transformer import Transformer
from ivideogpt.zoo.tensors import Shape, check_header, read_header, read_tensors, write_tensors

ACTION_SPACES = "transformer/action_spaces.safetensors"
_TENSORS = ("weight", "bias", "mean", "std")
_MOST_SPACES, _WIDEST = 1000, 4096


def write_action_layers(layers: ActionLayers, path: Path) -> None:
    """Writes the layers of all spaces.

    Raises:
        OSError: if it cannot be written.
    """
    tensors = {f"{name}.{key}": value for name in layers.spaces for key, value in layers[name].state_dict().items()}
    write_tensors(tensors, path, {}, torch.float32)


def choose_action_space(
    transformer: Transformer, layers: ActionLayers | None, name: str, folder: Path
) -> tuple[Transformer, dict[str, list[float]]]:
    """The transformer with the action layer of one space, and the statistics that its actions are normalised by.

    Raises:
        ValueError: if there is no such space; the message lists those that there are.
    """
    spaces = layers.spaces if layers is not None else {}
    if layers is None or name not in spaces:
        there = ", ".join(f"{space!r} ({size})" for space, size in spaces.items())
        raise ValueError(f"{folder} has no action space {name!r}; it has {there or 'none'}")
    layer = layers[name]
    chosen = with_action_layer(transformer, layer)
    assert chosen.action_linear is not None
    chosen.action_linear.to(transformer.lm_head.weight.dtype)
    return chosen, {"action_mean": layer.mean.tolist(), "action_std": layer.std.tolist()}


def read_action_layers(path: Path, embed_dim: int, device: torch.device) -> ActionLayers:
    """The layers that a file holds, checked before memory is spent.

    Raises:
        ValueError: if it holds something else.
    """
    header = read_header(path)
    spaces = {}
    for name, shape in header.shapes.items():
        space, _, key = name.rpartition(".")
        if key == "weight" and len(shape) == 2:
            spaces[space] = shape[1]
    if not spaces or len(spaces) > _MOST_SPACES or max(spaces.values()) > _WIDEST:
        raise ValueError(f"{path}: {len(spaces)} action spaces of at most {max(spaces.values(), default=0)} numbers")
    expected: dict[str, Shape] = {}
    for space, size in spaces.items():
        expected |= {f"{space}.{key}": (embed_dim, size) if key == "weight" else (embed_dim,) for key in _TENSORS[:2]}
        expected |= {f"{space}.{key}": (size,) for key in _TENSORS[2:]}
    check_header(header, expected, path)
    try:
        layers = ActionLayers(spaces, embed_dim)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = read_tensors(header, device, torch.float32)
    for space in spaces:
        state = {key: tensors[f"{space}.{key}"] for key in _TENSORS}
        if not all(bool(value.isfinite().all()) for value in state.values()) or not bool((state["std"] > 0).all()):
            raise ValueError(f"{path}: the action space {space!r} has values that are not finite, or a std of 0")
        layers[space].load_state_dict(state)
    return layers.to(device)
