"""Action layers of several action spaces: one for each embodiment, by the name of the data it is trained on.

B clips, F future frames, A the widest action size, D embed_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivideogpt.models.transformer import Transformer


class ActionLayer(nn.Linear):
    """What the actions of one space add to the embedding of their slots: a linear layer of normalised actions.

    It starts at zero, so that it adds nothing until it is trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, action_dim: int, embed_dim: int) -> None:
        super().__init__(action_dim, embed_dim)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("mean", torch.zeros(action_dim))
        self.register_buffer("std", torch.ones(action_dim))

    def normalize(self, actions: Tensor) -> Tensor:
        """Actions (..., A) as the layer takes them."""
        return (actions - self.mean) / self.std

    def forward(self, actions: Tensor) -> Tensor:
        return super().forward(self.normalize(actions).to(self.weight.dtype))


class ActionLayers(nn.Module):
    """The layers of several action spaces.

    Args:
        spaces: size of an action by the name of a space, which is the name of a source of data or a pattern of names
            such as ``oxe/bridge*``; the first that fits a source is its own.
        embed_dim: of the transformer.

    Raises:
        ValueError: if there is no space, or a name or size that cannot be.
    """

    def __init__(self, spaces: Mapping[str, int], embed_dim: int) -> None:
        super().__init__()
        if not spaces:
            raise ValueError("action_spaces must name at least one space, as {NAME: SIZE}")
        for name, size in spaces.items():
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"the name of an action space must be a text without a dot, got {name!r}")
            if type(size) is not int or size < 1:
                raise ValueError(f"the action space {name!r} must have a size of at least 1, got {size!r}")
        self.layers = nn.ModuleDict({name: ActionLayer(size, embed_dim) for name, size in spaces.items()})

    @property
    def spaces(self) -> dict[str, int]:
        """Size of an action of each space."""
        return {name: self[name].in_features for name in self.layers}

    def __getitem__(self, name: str) -> ActionLayer:
        layer = self.layers[name]
        assert isinstance(layer, ActionLayer)
        return layer

    def take(self, others: ActionLayers) -> None:
        """Takes the layers of the spaces that others have too, of the same size."""
        for name, size in self.spaces.items():
            if others.spaces.get(name) == size:
                self[name].load_state_dict(others[name].state_dict())

    def space_of(self, source: str) -> str | None:
        """The space that the actions of a source are of."""
        return next((name for name in self.layers if fnmatchcase(source, name)), None)

    def forward(self, actions: Tensor, sources: Sequence[str]) -> Tensor:
        """What raw actions (B, F, A), padded to the widest, add to their slots (B, F, D); nothing where no space is.

        Every layer takes part in every batch, so that gradients exist on all processes; also that of a space of which
        the data have none and which is wider than theirs.
        """
        actions = F.pad(actions, (0, max(0, max(self.spaces.values()) - actions.shape[-1])))
        spaces = [self.space_of(source) for source in sources]
        added = None
        for name in self.layers:
            layer = self[name]
            here = torch.tensor([space == name for space in spaces], device=actions.device)
            own = layer(actions[..., : layer.in_features]) * here[:, None, None]
            added = own if added is None else added + own
        assert added is not None
        return added


def with_action_layer(transformer: Transformer, layer: ActionLayer) -> Transformer:
    """The transformer with another action layer; it shares all its other weights. The actions are to be normalised."""
    plain = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
    plain.weight, plain.bias = layer.weight, layer.bias
    other = copy.copy(transformer)
    other.__dict__.pop("action_linear", None)  # where there is none it is no submodule but an attribute
    other._modules = {**transformer._modules, "action_linear": plain}
    other.config = replace(transformer.config, action_dim=layer.in_features)
    return other
