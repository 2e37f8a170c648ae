"""Triton's kernels against torch operations; run by test_kernels.py, in a process of its own where there is no GPU.

    python kernel_checks.py [CHECK ...]

On a CPU ``TRITON_INTERPRET=1`` must stand in the environment before Triton is imported: kernels then run in its
interpreter, which is slow, so models here are tiny.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ivideogpt.config import TransformerConfig
from ivideogpt.models.autoencoder import ResidualBlock
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.gpu import decoder as kernels
from ivideogpt.rollout.gpu.decoder import TritonDecoder
from ivideogpt.rollout.gpu.norm import fits, group_norm, use_kernels
from ivideogpt.rollout.graphs import GraphDecoder
from ivideogpt.rollout.sampling import Sampling, sample_token

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 45


CONFIG: dict[str, Any] = dict(
    vocab_size=VOCAB, num_layers=1, num_heads=2, embed_dim=36, mlp_dim=40, head_dim=32, max_positions=300, action_dim=3
)


def build(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**CONFIG, **changes}))
    for parameter in model.parameters():
        spread = 0.15 if parameter.ndim == 2 else 0.2
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=spread)
    return model.to(DEVICE).eval()


def compare(
    sampling: Sampling, clips: int = 1, samples: int = 1, length: int = 1, draws: int = 2, prefix: int = 20,
    capacity: int = 30, precision: str = "float32", tolerance: float = 2e-5, **model: Any,
) -> None:  # fmt: skip
    """Two frames behind each other and a token that is fed, by both decoders: the same ids, close hidden states."""
    transformer, rows = build(**model), clips * samples
    torch.manual_seed(1)
    context = torch.randint(VOCAB, (clips, prefix)).to(DEVICE)
    lead = torch.randint(VOCAB, (rows, length)).to(DEVICE)
    actions = torch.randn(3, rows).to(DEVICE).T  # not contiguous
    chance = torch.rand(2, rows, draws).to(DEVICE)
    seen = []
    for kind in (GraphDecoder, TritonDecoder):
        decoder = kind(transformer, precision)
        if isinstance(decoder, TritonDecoder):
            decoder._processors = 132  # of a large GPU, for which positions are split into more parts
        branch = decoder.branch(decoder.prefill(context), samples, capacity)
        first = decoder.sample(branch, lead, actions, chance[0], sampling)
        following = torch.cat([first.tokens[:, -1:], lead[:, :1]], dim=1)
        second = decoder.sample(branch, following, actions, chance[1], sampling)
        last = decoder.feed(branch, second.tokens[:, -1:])
        seen.append((first.tokens, second.tokens, first.hidden, second.hidden, last))
    for index, (wanted, found) in enumerate(zip(*seen, strict=True)):
        if index >= 2:
            torch.testing.assert_close(found, wanted, atol=tolerance, rtol=1e-4)
        elif precision == "float32":
            assert torch.equal(found, wanted), (index, found, wanted)


def check_few_rows() -> None:
    compare(Sampling(1.0, 20))
    compare(Sampling(0.0), length=2, prefix=1)  # a prefix of one position
    compare(Sampling(0.7, None, 10, 40), samples=3, capacity=70, draws=1)  # more than one part of the own positions


def check_grouped_heads() -> None:
    compare(Sampling(1.0, 9), clips=2, length=2, num_heads=4, num_kv_heads=2, draws=1)
    compare(Sampling(1.0, 100), samples=2, length=3, num_heads=3, num_kv_heads=1, draws=1)  # ids in all: 45


def check_many_rows() -> None:
    compare(Sampling(1.0, 20), clips=2, samples=5, prefix=70)
    compare(Sampling(1.0, 20), samples=9, length=2, draws=1)


def check_rows_of_several_tokens() -> None:
    compare(Sampling(1.0, 20), length=6, prefix=130, draws=1)
    compare(Sampling(1.0, 20), clips=6, draws=1, num_heads=4, num_kv_heads=2)
    compare(Sampling(1.0, 20, 3, 44), samples=20, draws=1, num_heads=4, num_kv_heads=2)


def check_other_widths() -> None:
    compare(Sampling(1.0, 20), draws=1, head_dim=64, embed_dim=33, mlp_dim=65, num_heads=1)
    compare(Sampling(1.0, 20), draws=1, head_dim=128, samples=9, num_heads=1)
    compare(Sampling(1.0, 5, 7, 12), draws=1, vocab_size=VOCAB + 1, action_dim=3)  # less than 16 ids, an odd slice


def check_other_precisions() -> None:
    compare(Sampling(0.0), precision="bfloat16", tolerance=0.2, draws=1)
    compare(Sampling(0.0), precision="float16", tolerance=0.03, draws=1, samples=9)


def check_draws() -> None:
    """Ties, a constant, what is impossible, more likeliest ids than ids, both ends of the random numbers."""
    decoder = TritonDecoder(build(), "float32")
    for count in (1, 5, 16, 90, 700, 1026):
        decoder._embedding = torch.randn(count + 8, 36).to(DEVICE)
        for kind in ("random", "ties", "constant", "impossible"):
            torch.manual_seed(count)
            logits = torch.randn(6, count) * 3
            if kind == "ties":
                logits = logits.round()
            elif kind == "constant":
                logits = torch.zeros(6, count)
            elif kind == "impossible":
                logits[:, max(1, count // 3) :] = -torch.inf
            chance = torch.rand(6)
            chance[:2] = torch.tensor([0.0, 1 - 2**-24])
            logits, chance = logits.to(DEVICE), chance.to(DEVICE)
            padded = torch.full((6, -(-count // 16) * 16), 9e9, device=DEVICE)
            padded[:, :count] = logits
            for sampling in (Sampling(1.0, 3, 7), Sampling(0.7, 20, 7), Sampling(1.3, None, 7), Sampling(0.0, 100, 7)):
                tokens = torch.zeros(6, 2, dtype=torch.int64, device=DEVICE)
                following = torch.zeros(6, 36, device=DEVICE)
                decoder._sample(padded[:, :count], chance, tokens[:, 1], sampling, following)
                wanted = sample_token(logits, chance, sampling)
                assert torch.equal(tokens[:, 1], wanted), (count, kind, sampling, tokens[:, 1], wanted)
                assert torch.equal(following, decoder._embedding[wanted])


def check_draws_of_what_is_no_number() -> None:
    """They give an id of the range, so that nothing behind them reads outside of the embedding."""
    decoder = TritonDecoder(build(), "float32")
    for bad in (float("nan"), float("inf"), -float("inf")):
        for where in (slice(None), slice(3, 4)):
            if DEVICE.type == "cpu" and bad != bad and where == slice(None):
                continue  # numpy, by which the interpreter finds the highest, refuses it
            logits = torch.zeros(2, 16)
            logits[:, where] = bad
            for sampling in (Sampling(0.0, None, 7), Sampling(1.0, 3, 7), Sampling(1.0, None, 7)):
                tokens = torch.full((2, 1), -1, device=DEVICE)
                decoder._sample(logits.to(DEVICE), torch.full((2,), 0.5, device=DEVICE), tokens[:, 0], sampling, None)
                assert bool(((tokens >= 7) & (tokens < 23)).all()), (bad, where, sampling, tokens)


def check_norms() -> None:
    for channels, groups, size, images in ((64, 8, 8, 2), (16, 16, 5, 33), (16, 8, 5, 2), (32, 1, 24, 1)):
        norm = nn.GroupNorm(groups, channels, eps=1e-6).to(DEVICE)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        assert fits(norm)
        x, shift = torch.randn(images, channels, size, size).to(DEVICE) * 2 + 1, torch.randn(channels).to(DEVICE)
        torch.testing.assert_close(group_norm(norm, x, silu=True), F.silu(norm(x)), atol=2e-5, rtol=1e-4)
        shifted = norm(x + shift[:, None, None])
        torch.testing.assert_close(group_norm(norm, x, silu=False, shift=shift), shifted, atol=2e-5, rtol=1e-4)


def check_residual_blocks() -> None:
    for inputs, outputs in ((32, 32), (32, 64)):
        block = ResidualBlock(inputs, outputs, 8).to(DEVICE).eval()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.1)
        x = torch.randn(2, inputs, 8, 8).to(DEVICE)
        wanted = block(x)
        use_kernels(block)
        torch.testing.assert_close(block(x), wanted, atol=1e-4, rtol=1e-4)


def check_a_kernel_that_fails() -> None:
    """Frames are then drawn by torch operations, which is said once."""
    transformer = build()
    context, lead = (torch.ones(1, count, dtype=torch.int64, device=DEVICE) for count in (20, 1))
    chance = torch.full((1, 3), 0.5, device=DEVICE)
    wanted, decoder = GraphDecoder(transformer, "float32"), TritonDecoder(transformer, "float32")
    if DEVICE.type == "cpu":
        decoder._captures = True
        GraphDecoder._capture = run_and_refuse  # type: ignore[assignment]
    decoder._embed_into = refuse  # type: ignore[method-assign, assignment]
    branches = [one.branch(one.prefill(context), 1, 30) for one in (wanted, decoder)]
    said: list[list[str]] = []
    for _ in range(2):
        tokens = wanted.sample(branches[0], lead, None, chance, Sampling()).tokens
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(decoder.sample(branches[1], lead, None, chance, Sampling()).tokens, tokens)
        said.append([str(one.message) for one in caught])
    assert any("Triton's kernels failed: too much" in message for message in said[0]), said
    assert not any("Triton" in message for message in said[1]), said


def refuse(*_: object) -> None:
    class OutOfResourcesError(Exception):
        pass

    raise OutOfResourcesError("too much shared memory")


def run_and_refuse(decoder: GraphDecoder, draw: Any, counts: list[int]) -> None:
    """What capturing comes to where there is no GPU."""
    for _ in draw():
        pass
    raise RuntimeError("no GPU")


def check_shapes_of_wide_models() -> None:
    """Programs of wide models, and of float32 weights, have more warps, so that weights stay in registers."""
    rounded, exact = (TritonDecoder(build(), precision) for precision in ("bfloat16", "float32"))
    small = {"qkv": (768, 2), "out": (768, 1), "gate_up": (768, 2), "down": (3072, 1), "head": (768, 1)}
    for product, (width, outs_of) in small.items():
        assert rounded._shape(product, width, outs_of) == kernels.SHAPES[product], product
    assert exact._shape("qkv", 768, 2)[1] == 2 * kernels.SHAPES["qkv"][1]
    assert rounded._shape("qkv", 8192, 2)[1] == 8
    assert exact._shape("head", 8192) == (8, 16)


def check_what_is_refused() -> None:
    """Models that the kernels do not know, with the reason; torch operations serve them."""
    for words, changes in (
        ("biases", {"attention_bias": True}), ("heads are 16 wide", {"head_dim": 16}), ("wider", {"mlp_dim": 8200}),
        ("wider", {"num_heads": 65, "head_dim": 128}), ("vocabulary", {"vocab_size": 2**17}),
    ):  # fmt: skip
        config = TransformerConfig(**{**CONFIG, **changes})
        reason = kernels.unsupported(config, "bfloat16")
        assert reason is not None and words in reason, (changes, reason)
    assert kernels.unsupported(TransformerConfig(**CONFIG), "bfloat16") is None
    assert "float64" in str(kernels.unsupported(TransformerConfig(**CONFIG), "float64"))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    with torch.inference_mode():
        for chosen in sys.argv[1:] or CHECKS:
            CHECKS[chosen]()
