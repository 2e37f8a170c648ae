"""Translation of the published JSON files, field by field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ivideogpt.config import TokenizerConfig, TransformerConfig
from ivideogpt.zoo.published import (
    read_json,
    tokenizer_config,
    tokenizer_fields,
    transformer_config,
    transformer_fields,
)

MEDIUM_AS_PUBLISHED = {
    "architectures": ["LlamaModel"], "bos_token_id": 50256, "eos_token_id": 50256, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 4096, "max_length": 1024,
    "max_position_embeddings": 1024, "model_type": "llama", "num_attention_heads": 16, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0", "use_cache": True, "vocab_size": 16386,
}  # fmt: skip


def large_tokenizer() -> dict[str, Any]:
    """The 256-px tokenizer as the authors' configuration has it, without the fields that it leaves at the default."""
    return {
        "_class_name": "VQModel", "_diffusers_version": "0.25.0.dev0", "act_fn": "silu",
        "block_out_channels": [128, 256, 256, 512, 768], "down_block_types": ["DownEncoderBlock2D"] * 5,
        "in_channels": 3, "latent_channels": 64, "layers_per_block": 2, "lookup_from_codebook": True,
        "mid_block_add_attention": False, "norm_num_groups": 32, "norm_type": "group", "num_vq_embeddings": 8192,
        "out_channels": 3, "sample_size": 32, "scaling_factor": 0.18215, "up_block_types": ["UpDecoderBlock2D"] * 5,
        "vq_embed_dim": None, "force_upcast": True, "dyn_dim": 256, "num_dyn_tokens": 8, "num_dyn_embeddings": 8192,
        "context_length": 2,
    }  # fmt: skip


def test_published_configurations_are_the_presets() -> None:
    assert tokenizer_config(large_tokenizer(), "t") == TokenizerConfig.preset("256")
    assert transformer_config(MEDIUM_AS_PUBLISHED, "t") == TransformerConfig.preset("medium")


@pytest.mark.parametrize("name", ["oxe-64-act-free", "bair-64-act-cond"])
def test_fields_come_back_as_they_were(golden: Callable[[str], Any], name: str) -> None:
    folder = golden(name).folder
    tokens = read_json(folder / "tokenizer" / "config.json")
    llama = read_json(folder / "transformer" / "config.json")
    assert tokenizer_fields(tokenizer_config(tokens, "t"), tokens) == tokens
    assert transformer_fields(transformer_config(llama, "t"), llama) == llama
    # a model that was never in a file gets the same fields as the published ones have
    assert set(tokenizer_fields(tokenizer_config(tokens, "t"), None)) == set(tokens)
    assert set(transformer_fields(transformer_config(llama, "t"), None)) == {*llama, "torch_dtype"}


@pytest.mark.parametrize("preset", ["64", "256", "nano"])
def test_tokenizer_presets_round_trip(preset: str) -> None:
    config = TokenizerConfig.preset(preset, codebook_dim=5)
    assert tokenizer_config(tokenizer_fields(config, None), "t", config.attention_dropout) == config
    changed = dataclasses.replace(config, context_length=1, codebook_size=11, block_channels=(32, 64), resolution=32)
    fields = tokenizer_fields(changed, large_tokenizer())
    assert tokenizer_config(fields, "t", config.attention_dropout) == changed


def test_transformer_configurations_round_trip() -> None:
    small = TransformerConfig.preset("small")
    other = TransformerConfig(
        vocab_size=99, num_layers=3, num_heads=6, num_kv_heads=2, embed_dim=48, mlp_dim=80, head_dim=10,
        max_positions=300, rope_base=5e5, norm_eps=1e-5, attention_dropout=0.1, attention_bias=True, mlp_bias=True,
        initializer_range=0.01, action_dim=4,
    )  # fmt: skip
    for config in (small, other):
        fields = transformer_fields(config, None)
        assert transformer_config(fields, "t", config.action_dim) == config
        assert ("head_dim" in fields) == (config is other)
    assert transformer_config(transformer_fields(other, MEDIUM_AS_PUBLISHED), "t", 4) == other


def test_rope_base_of_either_generation() -> None:
    old = MEDIUM_AS_PUBLISHED | {"rope_theta": 77.0, "rope_scaling": None}
    new = MEDIUM_AS_PUBLISHED | {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}}
    both = new | {"rope_theta": 77}
    assert [transformer_config(fields, "t").rope_base for fields in (old, new, both)] == [77.0] * 3
    moved = dataclasses.replace(transformer_config(new, "t"), rope_base=88.0)
    rope = {"rope_type": "default", "rope_theta": 88.0}
    assert transformer_fields(moved, new) == new | {"rope_parameters": rope}
    with pytest.raises(ValueError, match=r"rope_theta 10.0 and rope_parameters 77.0 disagree"):
        transformer_config(new | {"rope_theta": 10.0}, "t")


def test_missing_fields_have_the_originals_defaults() -> None:
    config = transformer_config({}, "t")
    assert (config.num_layers, config.num_heads, config.embed_dim, config.max_positions) == (32, 32, 4096, 2048)
    assert (config.rope_base, config.norm_eps, config.num_kv_heads) == (10000.0, 1e-6, 32)
    with pytest.raises(ValueError, match="latent grid of 256"):  # the original's default has one level, at 256 px
        tokenizer_config({}, "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, r"act_fn 'gelu' is not supported; this package computes 'silu'"),
        ({"norm_type": "spatial"}, r"norm_type 'spatial'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 5}, r"down_block_types \['AttnDownEncoderBlock2D'"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, r"up_block_types .* for 5 block_out_channels"),
        ({"layers_per_blok": 2}, r"unknown field 'layers_per_blok' \(value 2\); the nearest .* 'layers_per_block'"),
        ({"layers_per_block": "2"}, r"layers_per_block must be an integer, got '2'"),
        ({"layers_per_block": True}, r"layers_per_block must be an integer, got True"),
        ({"block_out_channels": 128}, r"block_out_channels must be a list of integers, got 128"),
        ({"mid_block_add_attention": 1}, r"mid_block_add_attention must be true or false, got 1"),
        ({"context_length": 0}, r"context_length must be a positive integer, got 0"),
        ({"latent_channels": -4}, r"latent_channels must be a positive integer, got -4"),
    ],
)
def test_refused_tokenizer_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^FILE: .*{message}"):
        tokenizer_config(large_tokenizer() | change, "FILE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings True is not supported; this package computes False"),
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling: type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"rope_parameters: rope_type 'llama3'"),
        ({"rope_parameters": {"rope_theta": 1.0, "factr": 8.0}}, r"rope_parameters: unknown field 'factr'"),
        ({"rope_parameters": {"rope_theta": "x"}}, r"rope_theta must be a number, got 'x'"),
        ({"rope_scaling": 4}, r"rope_scaling must be an object or null, got 4"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config \{'bits': 4\}"),
        ({"hiden_size": 5}, r"unknown field 'hiden_size' \(value 5\); the nearest known one is 'hidden_size'"),
        ({"hidden_size": 1e3}, r"hidden_size must be an integer, got 1000.0"),
        ({"rms_norm_eps": None}, r"rms_norm_eps must be a number, got None"),
        ({"num_key_value_heads": 3}, r"num_heads 16 is no multiple of num_kv_heads 3"),
    ],
)
def test_refused_transformer_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^FILE: ?.*{message}"):
        transformer_config(MEDIUM_AS_PUBLISHED | change, "FILE")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": NaN}', '{"a": Infinity}', "\xff", "[" * 100_000])
def test_broken_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        read_json(path)


def test_every_field_of_a_real_llama_configuration_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    fields = json.loads(json.dumps(config.to_dict()))
    assert transformer_config(fields, "t").embed_dim == 16
    assert transformer_fields(transformer_config(fields, "t"), fields) == fields
