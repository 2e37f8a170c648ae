"""Tests of the weight-decay groups and the learning-rate schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ivideogpt.training.optim import learning_rate_factor, parameter_groups


def test_every_parameter_of_a_world_model_is_in_exactly_one_group_by_module_type(tiny_world_model) -> None:
    model = tiny_world_model(action_dim=3, reward=True)
    decay, no_decay = parameter_groups([model], weight_decay=0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decay["params"]}
    undecayed = {names[id(parameter)] for parameter in no_decay["params"]}
    assert decayed | undecayed == set(names.values())
    assert not decayed & undecayed
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.01, 0.0)
    assert {"transformer.lm_head.weight", "transformer.layers.0.self_attn.q_proj.weight"} <= decayed
    assert {"reward_head.linear.weight", "transformer.action_linear.weight"} <= decayed
    assert {"transformer.embed_tokens.weight", "transformer.norm.weight", "transformer.action_linear.bias"} <= undecayed
    assert {"tokenizer.quantize.embedding.weight", "tokenizer.encoder.conv_in.bias"} <= undecayed
    assert not any(name.endswith("bias") or "norm" in name.rsplit(".", 2)[-2] for name in decayed)


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = parameter_groups([model], 0.1)
    assert sum(len(group["params"]) for group in groups) == 2


def test_a_parameter_that_two_types_share_is_refused() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(AssertionError, match="both weight-decay groups"):
        parameter_groups([model], 0.1)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        parameter_groups([nn.Linear(2, 2).requires_grad_(False)], 0.1)


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    factors = [learning_rate_factor(update, 110, 10, "cosine") for update in range(111)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert learning_rate_factor(500, 110, 10, "cosine") == pytest.approx(0.0)
    assert learning_rate_factor(50, 110, 10, "constant") == 1.0
    assert torch.isfinite(torch.tensor(learning_rate_factor(5, 5, 5, "cosine")))
