"""The hash of a tokenizer: tells whether two tokenizers give the same tokens for every clip."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch

from ivideogpt.models.tokenizer import CompressiveTokenizer

_ONLY_TRAINING = ("attention_dropout",)
"""Fields of the configuration that change no token."""


def tokenizer_hash(tokenizer: CompressiveTokenizer) -> str:
    """SHA-256, in hexadecimal, of a tokenizer's configuration and weights, the latter taken as float32.

    Fields at their default are left out, so that a field that a later version brings does not make old tokens foreign.
    A context that was shortened changes the hash, for it changes the tokens.
    """
    config = {
        field.name: getattr(tokenizer.config, field.name)
        for field in dataclasses.fields(tokenizer.config)
        if field.name not in _ONLY_TRAINING and getattr(tokenizer.config, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
