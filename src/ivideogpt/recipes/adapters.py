"""Stages that train a LoRA adapter: what they may start from, and what they save in place of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivideogpt.recipes.parts import source_folder
from ivideogpt.recipes.reading import Node
from ivideogpt.training.lora import adapter_config, adapter_matrices
from ivideogpt.zoo.adapter import Adapter, is_adapter
from ivideogpt.zoo.checkpoint import load_parts
from ivideogpt.zoo.fingerprint import base_hash
from ivideogpt.zoo.published import reward_key
from ivideogpt.zoo.registry import find_entry


def check_lora(values: Node, where: str) -> None:
    """Refuses arguments of a module whose ``lora`` has no base that an adapter could name.

    Args:
        values: its ``init_args``.
        where: their dotted place in the recipe.

    Raises:
        ValueError: saying what must come from where.
    """
    base = values.get("transformer") or {}
    if "from" not in base:
        raise ValueError(
            f"{where}.lora: an adapter belongs to a model that is there: transformer: {{from: STAGE, zoo name or "
            f"folder}}, got {base}"
        )
    if "action_dim" in base and base["action_dim"] is None:
        raise ValueError(
            f"{where}.lora: an adapter keeps its base's action layer, which action_dim: null drops; leave it out, or "
            "train without lora"
        )
    other = values.get("tokenizer") or {}
    if any(other.get(key) != base.get(key) for key in ("from", "revision")):
        raise ValueError(
            f"{where}.lora: an adapter has one base, but the tokenizer comes from {other.get('from')!r} and the "
            f"transformer from {base['from']!r}; make them the same (adapt the tokenizer first, and start from that)"
        )


def find_whole_base(spec: Node, earlier: Mapping[str, Path], where: str) -> Path:
    """Folder of the base that the transformer's ``spec`` names.

    Raises:
        ValueError: if it is not there, or an adapter itself.
    """
    folder = source_folder(spec, earlier, where)
    if is_adapter(folder):
        raise ValueError(no_base(spec, folder, where))
    return folder


def no_base(spec: Node, folder: Path, where: str) -> str:
    """What to say where a transformer's ``spec`` names an adapter as the base of another one."""
    return (
        f"{where}.from: {spec['from']!r} ({folder}) is an adapter, and so cannot be the base of another one; merge "
        "it first: `ivideogpt merge ADAPTER --out FOLDER`"
    )


def base_reference(
    spec: Node, earlier: Mapping[str, Path], folder: Path, where: str, context_length: int
) -> dict[str, Any]:
    """What an adapter in ``folder`` says of its base, so that the base is found again and known again.

    A stage beside it is named relative to it, and so moves with it; what came from the Hub is named with its commit.

    Args:
        spec: of the transformer.
        earlier: folders of the earlier stages.
        folder: of the adapter.
        where: dotted place in the recipe.
        context_length: that the adapter was trained with.
    """
    base, name = find_whole_base(spec, earlier, where), spec["from"]
    parts = load_parts(base)
    found: dict[str, Any] = {"sha256": base_hash(parts.tokenizer, parts.transformer)}
    if context_length != parts.config.context_length:
        found["context_length"] = context_length
    if name not in earlier and (find_entry(name) is not None or not Path(name).expanduser().is_dir()):
        commit = base.name if base.parent.name == "snapshots" else None  # as huggingface_hub's cache is laid out
        return {"model": name, **({"revision": commit} if commit else {}), **found}
    base, folder = base.resolve(), folder.resolve()
    return {"folder": f"../{base.name}" if base.parent == folder.parent else str(base), **found}


def make_adapter(module: Any, extras: dict[str, Any], recipe: str) -> Adapter:
    """The adapter that a TransformerModule with ``lora`` has trained."""
    transformer, head = module.transformer, module.reward_head
    layers = {}
    if transformer.action_linear is not None:
        layers = {f"action_linear.{name}": tensor for name, tensor in transformer.action_linear.state_dict().items()}
    if head is not None:
        layers |= {reward_key(name): tensor for name, tensor in head.state_dict().items()}
        extras = {**extras, "reward_transform": head.config.transform}
    return Adapter(adapter_config(transformer), adapter_matrices(transformer), layers, extras, recipe)
