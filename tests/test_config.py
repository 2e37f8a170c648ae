"""Configurations: presets, derived numbers, and refusals that name the offending value."""

import pytest
import torch

from ivideogpt.config import RewardHeadConfig, TokenizerConfig, TransformerConfig, WorldModelConfig
from ivideogpt.models import CompressiveTokenizer, RewardHead, Transformer


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_published_presets():
    with torch.device("meta"):
        tokenizer = CompressiveTokenizer(TokenizerConfig.preset("64"))
        small = Transformer(TransformerConfig.preset("small"))
        medium = Transformer(TransformerConfig.preset("medium"))
        large = CompressiveTokenizer(TokenizerConfig.preset("256"))
    assert count(tokenizer) == 114_159_174
    assert count(tokenizer.encoder) == 21_566_912
    assert count(tokenizer.cond_encoder) == 24_525_248
    assert count(tokenizer.decoder) == 32_190_211
    assert count(tokenizer.cond_decoder) == 34_687_747
    assert count(small) == 138_434_304
    assert round(count(medium) / 1e6) == 436
    assert round(count(large) / 1e6) == 310


def test_nano_fits_into_its_place_in_the_package():
    config = WorldModelConfig.preset("nano", action_dim=4, reward=True)
    assert config.reward_head is not None
    with torch.device("meta"):
        parts = CompressiveTokenizer(config.tokenizer), Transformer(config.transformer), RewardHead(config.reward_head)
    assert 2 * sum(map(count, parts)) < 24e6  # bytes in bf16


def test_world_model_presets():
    config = WorldModelConfig.preset("64-small", action_dim=4, reward=True, context_length=1)
    assert (config.action_dim, config.context_length, config.max_horizon) == (4, 1, 45)
    assert config.reward_head == RewardHeadConfig(768)
    assert WorldModelConfig.preset("256-small").tokenizer.grid_size == 16
    with pytest.raises(ValueError, match="no world model preset 'big'.*64-small"):
        WorldModelConfig.preset("big")


def test_attention_levels_follow_the_feature_maps():
    assert TokenizerConfig.preset("64").encoder_attention_levels == [(1, 16), (2, 16)]
    assert TokenizerConfig.preset("64").decoder_attention_levels == []
    large = TokenizerConfig.preset("256")
    assert large.encoder_attention_levels == [(2, 32), (3, 16), (4, 16)]
    assert large.decoder_attention_levels == [(0, 32)]


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (TokenizerConfig, {"resolution": 0}, "resolution must be a positive integer, got 0"),
        (TokenizerConfig, {"resolution": 60}, "resolution 60 must be a multiple of 16"),
        (TokenizerConfig, {"block_channels": ()}, "at least one level"),
        (TokenizerConfig, {"block_channels": (128, 250, 512)}, "250 is no positive multiple of norm_num_groups 32"),
        (TokenizerConfig, {"resolution": 128}, "wider than max_attention_resolution 16"),
        (TokenizerConfig, {"block_channels": (8, 16, 32), "norm_num_groups": 8}, "cross-attention"),
        (TokenizerConfig, {"attention_dropout": 1.5}, "attention_dropout must be in .* got 1.5"),
        (TransformerConfig, {"num_heads": 7}, "embed_dim 768 is no multiple of num_heads 7"),
        (TransformerConfig, {"num_kv_heads": 5}, "num_heads 12 is no multiple of num_kv_heads 5"),
        (TransformerConfig, {"head_dim": 7}, "head_dim must be even"),
        (TransformerConfig, {"action_dim": 0}, "action_dim must be a positive integer, got 0"),
        (TransformerConfig, {"rope_base": 0.0}, "rope_base and norm_eps must be positive, got 0.0"),
        (TransformerConfig, {"attention_dropout": -1.0}, "attention_dropout must be in"),
        (TransformerConfig, {"max_positions": 2**18 + 1}, "max_positions must be at most 262144, got 262145"),
        (RewardHeadConfig, {"transform": "log"}, "got 'log'"),
    ],
)
def test_refusals(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_parts_that_do_not_belong_together_are_refused():
    tokenizer = TokenizerConfig.preset("64")
    with pytest.raises(ValueError, match="16386 token ids.*vocabulary of 100"):
        WorldModelConfig(tokenizer, TransformerConfig(vocab_size=100))
    with pytest.raises(ValueError, match="width 64.*768 wide"):
        WorldModelConfig(tokenizer, TransformerConfig(), RewardHeadConfig(64))
    with pytest.raises(ValueError, match="take 514 positions, the transformer has 512"):
        WorldModelConfig(tokenizer, TransformerConfig(max_positions=512))
