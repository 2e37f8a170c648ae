"""What a transformer in training gets for the actions of a batch: normalised, through one action layer or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivideogpt.models.action_layers import ActionLayers, with_action_layer
from ivideogpt.models.transformer import Transformer

if TYPE_CHECKING:
    from ivideogpt.training.transformer_module import TransformerModule


def statistics_row(values: Sequence[float] | None, default: float, width: int, name: str) -> Tensor:
    """Statistics that were given, or a default, for each of ``width`` action dimensions.

    Raises:
        ValueError: if there are not as many, or a standard deviation is not positive.
    """
    if values is None:
        return torch.full((width,), default)
    if len(values) != width:
        raise ValueError(f"{name} must have {width} values, one per action dimension, got {len(values)}")
    row = torch.tensor(list(values), dtype=torch.float32)
    if name == "action_std" and (row <= 0).any():
        raise ValueError(f"action_std must be positive, got {list(values)!r}")
    return row


def prepare_actions(
    module: TransformerModule,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    spaces: Mapping[str, int] | None,
) -> None:
    """Gives a module the statistics of its actions, and the layers of several action spaces where there are any.

    Raises:
        ValueError: if they do not go together, or with the transformer.
    """
    config = module.transformer.config
    if module.action_warmup_updates < 0:
        raise ValueError(f"action_warmup_updates must not be negative, got {module.action_warmup_updates}")
    if (mean is None) != (std is None):
        raise ValueError(f"action_mean {mean!r} and action_std {std!r} belong together")
    if spaces is not None and (config.action_dim is not None or mean is not None):
        raise ValueError(
            "with action_spaces the transformer's own action_dim must be null, and action_mean left out; got "
            f"{config.action_dim} and {mean}. Beside `from`, action_dim: null drops the action layer"
        )
    if spaces is None and config.action_dim is None and (module.normalizes or module.action_warmup_updates):
        raise ValueError("the transformer takes no actions (action_dim is null): leave out what concerns them")
    for name, values, default in (("action_mean", mean, 0.0), ("action_std", std, 1.0)):
        row = statistics_row(values, default, config.action_dim or 1, name)
        module.register_buffer(name, row, persistent=module.action_statistics_from_data and spaces is None)
    module.action_layers = None if spaces is None else ActionLayers(spaces, config.embed_dim)


def fit_statistics(module: TransformerModule, data: Any) -> None:
    """Takes mean and standard deviation of each action dimension from the training data.

    Raises:
        ValueError: if the data have none.
    """
    source = getattr(data, "action_statistics", None)
    if source is None:
        raise ValueError(
            f"action_statistics_from_data needs data that know them (VideoDataModule), got {type(data).__name__}; give "
            "action_mean and action_std"
        )
    if module.action_layers is None:
        found = source()
        for name in ("action_mean", "action_std"):
            width = module.transformer.config.action_dim or 1
            getattr(module, name).copy_(statistics_row(found[name], 0.0, width, name))
        return
    names = list(module.action_layers.spaces)
    for number, space in enumerate(names):  # what an earlier one fits is not its own
        found, layer = source(space, names[:number]), module.action_layers[space]
        layer.mean.copy_(statistics_row(found["action_mean"], 0.0, layer.in_features, "action_mean"))
        layer.std.copy_(statistics_row(found["action_std"], 1.0, layer.in_features, "action_std"))


def check_spaces(layers: ActionLayers, data: Any) -> None:
    """Refuses data whose actions do not fit the action spaces, with the two sizes.

    Raises:
        ValueError: naming the source.
    """
    dims: Mapping[str, int | None] | None = getattr(data, "action_dims", None)
    if dims is None or not getattr(data, "pad_actions", False):
        raise ValueError("several action spaces need data with pad_actions: true, which say whose actions they deliver")
    for source, width in dims.items():
        space = layers.space_of(source)
        if width is not None and space is None:
            raise ValueError(f"the actions of {source!r} belong to no action space; there are {layers.spaces}")
        if space is not None and width != layers.spaces[space]:
            raise ValueError(f"the action space {space!r} has size {layers.spaces[space]}, {source!r} has {width}")


def embed_batch_actions(module: TransformerModule, batch: Mapping[str, Any], future: int) -> Tensor | None:
    """What the actions of a batch add to the slots of its ``future`` frames (B, F, D); None without actions.

    Raises:
        ValueError: if the transformer takes actions and the batch has none, or of another width.
    """
    actions, width = batch.get("actions"), module.transformer.config.action_dim
    if module.action_layers is not None:
        if actions is None or "source" not in batch:
            raise ValueError("several action spaces need batches with actions and source: set pad_actions: true")
        return module.action_layers(module.layout.slot_actions(actions, future), batch["source"])
    if width is None:
        return None
    if actions is None or actions.shape[-1] != width:
        found = "none" if actions is None else f"actions of size {actions.shape[-1]}"
        raise ValueError(f"the transformer takes actions of size {width}, the batch has {found}")
    return module.transformer.embed_actions(module.layout.slot_actions(module.normalize_actions(actions), future))


def by_space(
    layers: ActionLayers, transformer: Transformer, batch: Mapping[str, Any]
) -> Iterator[tuple[list[int], Transformer, Tensor | None]]:
    """For each action space in a batch its rows, the transformer with its layer, and their normalised actions."""
    spaces = [layers.space_of(source) for source in batch["source"]]
    for space in dict.fromkeys(spaces):
        rows = [row for row, of_row in enumerate(spaces) if of_row == space]
        if space is None:
            yield rows, transformer, None
            continue
        layer = layers[space]
        yield (
            rows,
            with_action_layer(transformer, layer),
            layer.normalize(batch["actions"][rows][..., : layer.in_features]),
        )


def keep_action_layers_alone(module: TransformerModule) -> None:
    """Drops the gradients of everything but the action layers: what has none is passed over by the optimizer."""
    alone = [module.transformer.action_linear, module.action_layers]
    kept = {id(p) for part in alone if part is not None for p in part.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in kept:
            parameter.grad = None
