"""Checks a stage's settings before anything runs: classes, arguments, types, model parts and where they come from."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from ivideogpt.recipes.adapters import check_lora
from ivideogpt.recipes.classes import arguments, check_arguments, defaults, import_class
from ivideogpt.recipes.parts import check_part, part_arguments
from ivideogpt.recipes.reading import Node
from ivideogpt.training.lora import LoRA

BASES: dict[str, type] = {"module": LightningModule, "data": LightningDataModule}


def check_stage(
    stage: Node, where: str, seed: int, trust: bool, earlier: Collection[str] = (), later: Collection[str] = ()
) -> Node:
    """Checks classes, arguments and their types; returns the stage with the defaults of module and data written out.

    Args:
        stage: its settings.
        where: its dotted place in the recipe.
        seed: of the recipe; module and data that take one and are not given another get it.
        trust: whether classes from anywhere are allowed.
        earlier: names of the stages before it.
        later: names of itself and of the stages behind it, which it cannot start from.

    Raises:
        ValueError: naming what is wrong, where, and the nearest right one.
    """
    checked: Node = {}
    for key, base in BASES.items():
        node, place = stage[key], f"{where}.{key}"
        if "class_path" not in node or node.keys() - {"class_path", "init_args"}:
            raise ValueError(f"{place} must be class_path and init_args, got {sorted(node)}")
        cls: Any = import_class(node["class_path"], place, trust)
        if not issubclass(cls, base):
            raise ValueError(f"{place}: {node['class_path']} is no {base.__name__}")
        values = node.get("init_args") or {}
        parts = part_arguments(cls) if key == "module" else {}
        check_arguments(cls, values, place, trust, skip=tuple(parts))
        for name, kind in parts.items():
            if values.get(name) is not None:
                check_part(kind, values[name], f"{place}.{name}", earlier, later)
        parse_arguments(cls, values, place, skip=set(parts))
        if values.get("lora") is not None:
            check_lora(values, place)
            _, lora = parse_arguments(LoRA, values["lora"], f"{place}.lora")
            try:
                LoRA(**vars(lora["value"]))
            except ValueError as error:
                raise ValueError(f"{place}.{error}") from error
        # written out, so that a later version with other defaults does not change what a recipe means
        own_seed = {"seed": seed} if "seed" in arguments(cls)[0] else {}
        checked[key] = {"class_path": node["class_path"], "init_args": {**defaults(cls), **own_seed, **values}}
    if "default_root_dir" in stage["trainer"]:
        raise ValueError(f"{where}.trainer.default_root_dir is the stage's folder; set the recipe's `output`")
    check_arguments(Trainer, stage["trainer"], f"{where}.trainer", trust)
    if trains(import_class(stage["module"]["class_path"], where, trust)) and not (
        {"max_steps", "max_epochs", "max_time"} & stage["trainer"].keys()
    ):
        raise ValueError(f"{where}.trainer does not say how long to train: give max_steps")
    parse_arguments(Trainer, stage["trainer"], f"{where}.trainer")
    checked["trainer"] = stage["trainer"]
    return checked


def trains(module: type) -> bool:
    """Whether a module class is trained; others are tested, as evaluations are."""
    return getattr(module, "training_step", None) is not LightningModule.training_step


def parse_arguments(
    cls: type, values: Node, where: str, skip: Collection[str] = ()
) -> tuple[ArgumentParser, Namespace]:
    """Checks the types of the arguments ``values`` of ``cls`` and fills in the defaults.

    Raises:
        ValueError: naming the argument and what its type is.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "value", skip=set(skip), instantiate=False)
    # a copy: jsonargparse puts its own objects into the lists that it is given
    given = copy.deepcopy({name: value for name, value in values.items() if name not in skip})
    try:
        return parser, parser.parse_object({"value": given})
    except Exception as error:  # jsonargparse raises several kinds
        message = " ".join(str(error).replace('"value.', '"').replace("'value.", "'").split())
        raise ValueError(f"{where}: {message}") from error


def build_arguments(cls: type, values: Node, where: str, skip: Collection[str] = ()) -> dict[str, Any]:
    """Arguments of ``cls`` with their types checked and the classes inside of them built.

    Raises:
        ValueError: naming the argument and what is wrong.
    """
    parser, parsed = parse_arguments(cls, values, where, skip)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    built = instantiate(parsed)["value"]
    return {name: value.as_dict() if isinstance(value, Namespace) else value for name, value in vars(built).items()}
