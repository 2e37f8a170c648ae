"""Transformer: against transformers' LLaMA with the same weights, actions, compilation, precision."""

import pytest
import torch

from ivideogpt.config import RewardHeadConfig, TransformerConfig
from ivideogpt.models import RewardHead, Transformer, next_token_loss, symexp, symlog

TINY = dict(vocab_size=50, num_layers=2, num_heads=4, embed_dim=32, mlp_dim=48, max_positions=64)


def build(**fields) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**{**TINY, **fields})).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "rope_base": 500.0},
        {"head_dim": 16, "norm_eps": 1e-3},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_equals_the_reference_llama(fields):
    transformers = pytest.importorskip("transformers")
    model = build(**fields)
    config = model.config
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.embed_dim, intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            attention_bias=config.attention_bias, mlp_bias=config.mlp_bias,
            max_position_embeddings=config.max_positions, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {key if key.startswith("lm_head") else f"model.{key}": value for key, value in model.state_dict().items()}
    reference.load_state_dict(state)
    tokens = torch.randint(0, 50, (2, 40))
    with torch.inference_mode():
        ours, theirs = model(tokens), reference(tokens, labels=tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    assert next_token_loss(ours.logits, tokens).item() == pytest.approx(theirs.loss.item(), rel=1e-5)


@pytest.mark.parametrize("recomputes", [False, True])
def test_hidden_states_from_a_position_on_are_the_last_ones(recomputes):
    model = build(num_kv_heads=2, attention_bias=True).double()  # in float32 products of other shapes round otherwise
    model.recomputes = recomputes
    tokens = torch.randint(0, 50, (2, 30))
    wanted = torch.randn(2, 13, 32, dtype=torch.float64)

    def hidden_and_gradients(start):
        model.zero_grad()
        hidden = model.backbone(model.embed(tokens), start=start)[:, -13:]
        (hidden * wanted).sum().backward()
        return hidden, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    all_hidden, expected = hidden_and_gradients(0)
    hidden, found = hidden_and_gradients(17)
    torch.testing.assert_close(hidden, all_hidden)
    assert len(found) == len(expected)
    torch.testing.assert_close(found, expected)


def test_an_action_moves_its_slot_and_what_follows_only():
    model = build(action_dim=3)
    tokens, slots = torch.randint(0, 50, (1, 20)), torch.tensor([5, 10, 15])
    actions = torch.randn(1, 3, 3)
    with torch.inference_mode():
        plain = model(tokens).logits
        assert torch.equal(model(tokens, actions, slots).logits, plain), "a fresh action layer is zero"
        assert model.action_linear is not None
        torch.nn.init.normal_(model.action_linear.weight)
        moved = model(tokens, actions * torch.tensor([0.0, 1.0, 0.0])[:, None], slots).logits
    assert torch.equal(moved[:, :10], plain[:, :10])
    assert not torch.allclose(moved[:, 10], plain[:, 10])


def test_actions_without_an_action_layer_are_refused():
    with pytest.raises(ValueError, match="no action layer"):
        build().embed_actions(torch.zeros(1, 1, 4))


def test_compiles_without_graph_breaks():
    model = build(action_dim=3, num_kv_heads=2)
    tokens, slots, actions = torch.randint(0, 50, (1, 20)), torch.tensor([5, 10, 15]), torch.randn(1, 3, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, actions, slots).logits, model(tokens, actions, slots).logits)


def test_bfloat16_stays_near_float32():
    model = build()
    tokens = torch.randint(0, 50, (2, 30))
    with torch.inference_mode():
        full = model(tokens).logits
        half = model.to(torch.bfloat16)(tokens).logits
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.02, rtol=0.05)


def test_symlog_and_reward_head():
    x = torch.tensor([-300.0, -1.0, 0.0, 0.5, 12.0])
    torch.testing.assert_close(symexp(symlog(x)), x)
    head = RewardHead(RewardHeadConfig(8))
    hidden = torch.randn(2, 3, 8)
    torch.testing.assert_close(head.transform(head.predict(hidden)), head(hidden))
    raw = RewardHead(RewardHeadConfig(8, transform="identity"))
    torch.testing.assert_close(raw.predict(hidden), raw(hidden))
