"""Cases that ``test_triton.py`` runs in a process with Triton's interpreter: kernels against torch, on a CPU."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivideogpt.config import TransformerConfig
from ivideogpt.models.autoencoder import ResidualBlock
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.fused import TorchDecoder
from ivideogpt.rollout.gpu import decoder as kernels
from ivideogpt.rollout.gpu import norm as norms
from ivideogpt.rollout.gpu.decoder import TritonDecoder
from ivideogpt.rollout.sampling import Sampling, sample_token

IDS, PREFIX = 45, 7
assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton.py"


def build(kv_heads: int, head_dim: int = 32) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        IDS, 1, 2, num_kv_heads=kv_heads, embed_dim=48, mlp_dim=40, head_dim=head_dim, max_positions=64, action_dim=3
    )
    model = Transformer(config).eval()
    for weight in model.parameters():  # fresh weights hardly look at anything
        nn.init.normal_(weight, 0.0 if weight.ndim == 2 else 1.0, 0.2)
    return model


@pytest.mark.parametrize(
    ("kv_heads", "clips", "samples", "length", "sampling", "rows"),
    [
        (2, 1, 1, 1, Sampling(1.0, 10), 4),  # products in registers
        (1, 1, 2, 2, Sampling(0.0), 4),
        (2, 2, 1, 1, Sampling(0.7, None, 5, 40), 4),
        (1, 2, 5, 1, Sampling(1.3, 10), 4),  # a library's products, samples that meet their prefix together
        (2, 3, 1, 2, Sampling(1.0, 10), 4),  # and each alone
    ],
)
@torch.inference_mode()
def test_frames_are_those_of_torch(
    kv_heads: int, clips: int, samples: int, length: int, sampling: Sampling, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "ROWS", rows)
    monkeypatch.setattr(kernels, "SPLIT", 4)  # several parts, the last of them not full
    model = build(kv_heads)
    count = clips * samples
    context = torch.randint(IDS, (clips, PREFIX))
    leads = [torch.randint(IDS, (count, length)), torch.randint(IDS, (count, 2))]
    actions, uniforms = torch.randn(2, count, 3), torch.rand(2, count, 2)
    outcomes = []
    for decoder in (TorchDecoder(model, "float32"), TritonDecoder(model, "float32")):
        branch = decoder.branch(decoder.prefill(context), samples, 11)
        outcome: list[Tensor] = []
        for frame in range(2):
            sampled = decoder.sample(branch, leads[frame], actions[frame], uniforms[frame], sampling)
            outcome += [sampled.hidden, sampled.tokens]
        outcomes.append([*outcome, decoder.feed(branch, sampled.tokens[:, -1:])])
    for expected, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@torch.inference_mode()
def test_low_precision_is_as_near_to_float32_as_torch_is(precision: str) -> None:
    model = build(2)
    context, tokens = torch.randint(IDS, (1, PREFIX)), torch.randint(IDS, (1, 3))

    def states(decoder: TorchDecoder) -> Tensor:
        return decoder.feed(decoder.branch(decoder.prefill(context), 1, 5), tokens)

    exact = states(TorchDecoder(model, "float32"))
    error = (states(TritonDecoder(model, precision)) - exact).norm()
    assert 0 < error < 1.5 * (states(TorchDecoder(model, precision)) - exact).norm()


@pytest.mark.parametrize("ids", [5, 16, 90])
@pytest.mark.parametrize("kind", ["random", "ties", "constant", "no chance"])
@torch.inference_mode()
def test_draws_are_those_of_sample_token(ids: int, kind: str) -> None:
    decoder = TritonDecoder(build(2), "float32")
    torch.manual_seed(1)
    logits = torch.randn(4, ids) * 3
    if kind == "ties":
        logits = logits.round()
    elif kind == "constant":
        logits = torch.zeros(4, ids)
    elif kind == "no chance":
        logits[:, ids // 2 :] = -torch.inf
    padded = torch.full((4, -(-ids // 16) * 16), 1e9)  # what lies behind a row is not looked at
    padded[:, :ids] = logits
    uniforms = torch.rand(4)
    uniforms[0] = 0.0
    decoder._embedding = torch.randn(ids + 8, 48)
    for sampling in (Sampling(0.0, None, 7), Sampling(0.7, 3, 7), Sampling(1.0, 20, 7), Sampling(1.3, None, 7)):
        tokens, following = torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 48)
        decoder._sample(padded[:, :ids], uniforms, tokens[:, 0], sampling, following)
        assert torch.equal(tokens[:, 0], sample_token(logits, uniforms, sampling))
        assert torch.equal(following, decoder._embedding[tokens[:, 0]])


@pytest.mark.parametrize(("channels", "groups", "width"), [(64, 8, 8), (128, 32, 16), (16, 8, 5)])
@pytest.mark.parametrize("most", [0, norms.GROUP_PROGRAMS])
@torch.no_grad()
def test_norms_are_those_of_torch(
    channels: int, groups: int, width: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one kernel, and of two."""
    monkeypatch.setattr(norms, "GROUP_PROGRAMS", most)
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, shift = torch.randn(2, channels, width, width) * 2 + 1, torch.randn(channels)
    assert norms.fits(norm)
    torch.testing.assert_close(norms.group_norm(norm, x, silu=True), F.silu(norm(x)), atol=1e-5, rtol=0)
    shifted = norm(x + shift[:, None, None])
    torch.testing.assert_close(norms.group_norm(norm, x, silu=False, shift=shift), shifted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("out_channels", [32, 64])
@torch.no_grad()
def test_a_residual_block_is_that_of_torch(out_channels: int) -> None:
    block = ResidualBlock(32, out_channels, 8)
    x = torch.randn(2, 32, 6, 6)
    expected = block(x)
    norms.use_kernels(block)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=0)
