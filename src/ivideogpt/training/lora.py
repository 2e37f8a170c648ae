"""Low-rank adaptation (LoRA, arXiv 2106.09685): a few small matrices are trained beside a transformer's frozen weights.

The layers are those of the peft library, an extra: ``pip install ivideogpt[lora]``. What is saved is an adapter
(:mod:`ivideogpt.zoo.adapter`), which needs no peft to be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivideogpt.models.transformer import Transformer
from ivideogpt.zoo.adapter import LARGEST_RANK, TARGETS, merged_weights, scale_of
from ivideogpt.zoo.tensors import build_on_meta


@dataclass(frozen=True)
class LoRA:
    """What is trained in place of the transformer's own weights W: W + alpha / rank * B A.

    Attributes:
        rank: rows of A and columns of B.
        alpha: weight of what they add, over ``rank``.
        dropout: of what goes into A, while training.
        targets: layers of each block that get such matrices, of :data:`ivideogpt.zoo.adapter.TARGETS`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Sequence[str] = TARGETS

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"lora: rank must lie in 1..{LARGEST_RANK}, got {self.rank!r}")
        if not self.alpha > 0:
            raise ValueError(f"lora: alpha must be positive, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout must lie in [0, 1), got {self.dropout!r}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"lora: targets must be some of {', '.join(TARGETS)}, got {list(self.targets)}")


def add_lora(transformer: Transformer, lora: LoRA) -> list[str]:
    """Puts fresh matrices beside the weights of ``transformer``, which changes nothing of what it computes.

    Only these and the action layer are left trainable.

    Returns:
        Names of the modules that are frozen.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if there are such matrices already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs the package peft: pip install 'ivideogpt[lora]'") from error
    if has_lora(transformer):
        raise ValueError("lora: the transformer has LoRA layers already; load it again")
    # JSON has one kind of number, peft's type says int
    alpha: Any = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets))
    inject_adapter_in_model(config, transformer)
    if transformer.action_linear is not None:
        transformer.action_linear.requires_grad_(True)
    return [
        name
        for name, module in transformer.named_modules()
        if any(not parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]


def has_lora(transformer: Transformer) -> bool:
    """Whether there are matrices beside the weights."""
    return any(".lora_" in name for name, _ in transformer.named_parameters())


def trains_lora(transformer: Transformer) -> bool:
    """Whether matrices beside the weights are trainable."""
    return any(".lora_" in name and p.requires_grad for name, p in transformer.named_parameters())


def adapter_matrices(transformer: Transformer) -> dict[str, Tensor]:
    """The trained matrices, by names such as ``layers.0.self_attn.q_proj.lora_A.weight``."""
    found = {name: p.detach() for name, p in transformer.named_parameters() if ".lora_" in name}
    return {name.replace(".default.", "."): tensor for name, tensor in found.items()}  # peft can hold several adapters


def adapter_config(transformer: Transformer) -> dict[str, Any]:
    """The object of peft's ``adapter_config.json``."""
    held: Any = transformer.peft_config
    fields = held["default"].to_dict()
    fields["peft_type"] = "LORA"  # an enumeration, as peft gives it
    return fields | {"target_modules": sorted(fields["target_modules"]), "inference_mode": True}


@torch.no_grad()
def merged(transformer: Transformer) -> Transformer:
    """A transformer of plain layers that computes the same, in eval mode; it shares what no matrix changes.

    The rollout engine reads the weights of its layers, and so needs plain ones.
    """
    # parameters, for a state dict has only a part of weights that are spread over processes
    every = transformer.named_parameters()
    held = {name.replace(".base_layer.", "."): p.detach() for name, p in every if ".lora_" not in name}
    plain = build_on_meta(lambda: Transformer(transformer.config), "the transformer")
    weights = merged_weights(held, adapter_matrices(transformer), scale_of(adapter_config(transformer)))
    plain.load_state_dict({**held, **weights}, assign=True)
    return plain.requires_grad_(False).eval()
