"""Embeddings seeded from the codebooks: neighbours in a codebook are neighbours in the embedding, slots untouched."""

import torch

from ivideogpt.training.embedding_seeds import seed_embeddings
from ivideogpt.training.transformer_module import TransformerModule


def test_neighbours_stay_neighbours_at_the_usual_scale(tiny_world_model):
    torch.manual_seed(0)
    model = tiny_world_model()
    sizes = model.config.tokenizer.codebook_size, model.config.tokenizer.dynamics_codebook_size
    slots = model.transformer.embed_tokens.weight[sum(sizes) :].clone()
    entries = torch.randn(sizes[1], model.config.tokenizer.codebook_dim)
    entries[1] = entries[0] + 0.01
    model.tokenizer.dynamics_quantize.embedding.weight.data.copy_(entries)
    seed_embeddings(model.transformer, model.tokenizer)
    std = model.config.transformer.initializer_range
    for weight in (model.transformer.embed_tokens.weight, model.transformer.lm_head.weight):
        dynamics = weight[sizes[0] : sum(sizes)]
        distance = torch.cdist(dynamics[:1], dynamics)[0]
        assert distance[1] < 0.5 * distance[2:].min()
        assert 0.5 * std < dynamics.std() < 2 * std
        assert not torch.equal(dynamics[0], dynamics[1])
    assert torch.equal(model.transformer.embed_tokens.weight[sum(sizes) :], slots)


def test_module_seeds_only_when_asked(tiny_world_model):
    model = tiny_world_model()
    before = model.transformer.embed_tokens.weight.clone()
    TransformerModule(model.transformer, model.tokenizer)
    assert torch.equal(model.transformer.embed_tokens.weight, before)
    TransformerModule(model.transformer, model.tokenizer, seed_embeddings=True)
    assert not torch.equal(model.transformer.embed_tokens.weight, before)
