"""Hashes of models: whether two tokenizers give the same tokens, whether an adapter belongs to a base."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from torch import nn

from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer

_NOT_COMPUTED = ("attention_dropout", "initializer_range", "action_dim")
"""Fields of the configurations that change no token, and no logits of the same weights."""


def tokenizer_hash(tokenizer: CompressiveTokenizer) -> str:
    """SHA-256, in hexadecimal, of a tokenizer's configuration and weights, the latter taken as float32.

    Fields at their default are left out, so that a field that a later version brings does not make old tokens foreign.
    A context that was shortened changes the hash, for it changes the tokens.
    """
    digest = hashlib.sha256(json.dumps(_changed(tokenizer.config), sort_keys=True).encode())
    _add_weights(digest, tokenizer)
    return digest.hexdigest()


def base_hash(tokenizer: CompressiveTokenizer, transformer: Transformer) -> str:
    """SHA-256, in hexadecimal, of what an adapter is trained on: a tokenizer, and a transformer but its action layer.

    An adapter brings an action layer and a reward head of its own, so it goes with any of the base's.
    """
    config = _changed(transformer.config)
    digest = hashlib.sha256(f"{tokenizer_hash(tokenizer)} {json.dumps(config, sort_keys=True)}\n".encode())
    _add_weights(digest, transformer, without=("action_linear.",))
    return digest.hexdigest()


def _changed(config: Any) -> dict[str, Any]:
    """Fields that are not at their default, and that change what is computed."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _NOT_COMPUTED and getattr(config, field.name) != field.default
    }


def _add_weights(digest: Any, module: nn.Module, without: tuple[str, ...] = ()) -> None:
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith(without):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
