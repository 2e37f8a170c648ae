"""Whether a stage's module, its data and its trainer go together, and what a model that it starts from loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy

from ivideogpt.metrics.networks import fetch_weights
from ivideogpt.models.action_layers import ActionLayers
from ivideogpt.recipes.checking import trains
from ivideogpt.recipes.classes import arguments, defaults, import_class
from ivideogpt.recipes.reading import Node
from ivideogpt.training.module import NO_AVERAGES
from ivideogpt.zoo.checkpoint import Parts

PART_NAMES = ("tokenizer", "transformer")


def check_fit(module: Any, data: Any, stage: str) -> None:
    """Refuses a module and data that do not go together, before the first update.

    Raises:
        ValueError: with the two values that differ.
    """
    parts = getattr(module, "world_model", module)
    tokenizer, transformer = (getattr(getattr(parts, name, None), "config", None) for name in PART_NAMES)
    if tokenizer is None:
        return
    if transformer is None and trains(type(module)) and getattr(data, "tokenizer_hash", None) is not None:
        raise ValueError(f"stages.{stage}: a tokenizer is trained on pixels, the data are tokens; use VideoDataModule")
    pairs = [("resolution", tokenizer.resolution, "resolution"), ("context_length", tokenizer.context_length, None)]
    if transformer is not None and transformer.action_dim is not None:
        pairs.append(("action_dim", transformer.action_dim, "action_dim"))
    data.prepare_data()
    for name, wanted, attribute in pairs:
        found = getattr(data, attribute or name, wanted)
        if found != wanted:
            remedy = "change one of the two"
            if name == "action_dim" and parts is module:
                value = "null" if found is None else found
                what = "drops the action layer" if found is None else "gives it a fresh action layer"
                remedy += f": {stage}.module.transformer.action_dim={value} {what}"
            raise ValueError(f"stages.{stage}: the model's {name} is {wanted}, that of the data is {found}; {remedy}")
    if getattr(module, "needs_rewards", False) and not getattr(data, "has_rewards", True):
        optional = "reward_head" in defaults(type(module))
        remedy = f"; leave it out: {stage}.module.reward_head=null" if optional else ""
        raise ValueError(f"stages.{stage}: the model has a reward head and the data have no rewards{remedy}")
    check_data = getattr(module, "check_data", None)
    if check_data is not None:
        try:
            check_data(data)
        except ValueError as error:
            raise ValueError(f"stages.{stage}: {error}") from error


def check_training(module: Any, trainer: Node, stage: str) -> None:
    """Refuses settings of a trainer with which ``module`` cannot be trained, and fetches the weights of its losses.

    Raises:
        ValueError: naming the settings and what to set instead.
        OSError: if weights cannot be had.
    """
    where = f"stages.{stage}"
    if not module.automatic_optimization:
        _check_manual(module, trainer, stage)
    steps, epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    endless = steps == -1 and (epochs == -1 or (epochs is None and trainer.get("max_time") is not None))
    if endless and getattr(module, "schedule", None) == "cosine":
        raise ValueError(
            f"{where}: a cosine schedule needs to know the last update, and trainer.max_steps is {steps}; give "
            f"{stage}.trainer.max_steps, or {stage}.module.schedule=constant to train for a time"
        )
    if isinstance(trainer.get("strategy"), Mapping):
        strategy = import_class(trainer["strategy"]["class_path"], f"{where}.trainer.strategy", trust=True)
        if issubclass(strategy, ModelParallelStrategy):
            _check_shardable(module, trainer, where)
    if getattr(module, "uses_perceptual_network", False):
        try:
            fetch_weights("vgg")
        except OSError as error:
            raise OSError(
                f"{where}.module: {error}. Train without the perceptual loss: {stage}.module.perceptual_weight=0"
            ) from error


def _check_shardable(module: Any, trainer: Node, where: str) -> None:
    callbacks = trainer.get("callbacks") or []
    for spec in callbacks if isinstance(callbacks, list) else [callbacks]:
        if issubclass(import_class(spec["class_path"], f"{where}.trainer.callbacks", trust=True), WeightAveraging):
            raise ValueError(f"{where}: {NO_AVERAGES}")
    try:
        module.check_shardable()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_manual(module: Any, trainer: Node, stage: str) -> None:
    found: Node = {}
    if trainer.get("gradient_clip_val"):
        found["gradient_clip_val"] = trainer["gradient_clip_val"]
    if trainer.get("accumulate_grad_batches") not in (None, 1):
        found["accumulate_grad_batches"] = trainer["accumulate_grad_batches"]
    if not found:
        return
    cls: Any = type(module)
    known, name = arguments(cls)[0], cls.__name__
    remedies = []
    if "gradient_clip_val" in found:
        remedies.append(f"{stage}.module.gradient_clip={found['gradient_clip_val']}")
    if "accumulate_grad_batches" in found:
        accumulate = f"{stage}.module.accumulate={found['accumulate_grad_batches']}"
        remedies.append(accumulate if "accumulate" in known else f"a larger {stage}.data.batch_size")
    settings = ", ".join(f"{key}={value}" for key, value in found.items())
    reason = " with a discriminator" if getattr(module, "discriminator", None) is not None else ""
    raise ValueError(
        f"stages.{stage}.trainer: {name}{reason} makes its updates by itself, so the trainer can neither clip nor "
        f"accumulate for it, got {settings}; set them to null, and {' and '.join(remedies)} in their place"
    )


def describe_changes(module: Any, loaded: Parts | None, source: str | None) -> Iterator[str]:
    """Lines that say what of the model ``source`` that a stage starts from is left out, and what is new beside it.

    Args:
        module: of the stage.
        loaded: the parts of the model, changed as the recipe says; None where the transformer is fresh.
        source: its name.
    """
    if loaded is None:
        return
    if loaded.reward_head is not None and module.reward_head is None:
        yield f"the reward head of {source} is left out (reward_head: {{from: {source}}} keeps it)"
    layers = getattr(module, "action_layers", None)
    if layers is not None and loaded.action_layers is not None:
        yield f"action spaces of {source}: {_spaces(layers, loaded.action_layers)}"


def _spaces(new: ActionLayers, old: ActionLayers) -> str:
    kept = [name for name, size in new.spaces.items() if old.spaces.get(name) == size]
    fresh = [name for name in new.spaces if name not in kept]
    groups = {"kept": kept, "new, zero until trained": fresh, "dropped": [n for n in old.spaces if n not in kept]}
    return "; ".join(f"{', '.join(map(repr, names))} {what}" for what, names in groups.items() if names)
