"""CompressiveTokenizer: consistency of its entry points, gradients, context changes."""

import pytest
import torch

from ivideogpt.models import CompressiveTokenizer
from ivideogpt.models.quantizer import VectorQuantizer


@pytest.fixture
def tokenizer(tiny_config):
    torch.manual_seed(0)
    return CompressiveTokenizer(tiny_config().tokenizer).eval()


def test_forward_equals_tokenize_and_detokenize(tokenizer):
    video = torch.rand(2, 5, 3, 32, 32)
    with torch.inference_mode():
        out = tokenizer(video[:, :2], video[:, 2:])
        tokens, _ = tokenizer.tokenize(video)
        decoded = tokenizer.detokenize(tokens)
    assert torch.equal(tokens, tokenizer.layout.assemble(out.context_indices, out.dynamics_indices))
    reconstruction = torch.cat([out.context_reconstruction, out.future_reconstruction], 1)
    torch.testing.assert_close(decoded, reconstruction, atol=1e-5, rtol=0)


def test_frames_of_a_clip_do_not_see_each_other(tokenizer):
    video = torch.rand(1, 6, 3, 32, 32)
    with torch.inference_mode():
        together = tokenizer.tokenize(video)[0]
        alone = tokenizer.tokenize(torch.cat([video[:, :2], video[:, 5:]], 1))[0]
    stride = tokenizer.layout.frame_stride
    assert torch.equal(together[:, -stride:], alone[:, -stride:])


def test_every_parameter_learns(tiny_config):
    torch.manual_seed(0)
    tokenizer = CompressiveTokenizer(tiny_config().tokenizer).train()
    video = torch.rand(2, 4, 3, 32, 32)
    out = tokenizer(video[:, :2], video[:, 2:])
    loss = out.future_reconstruction.square().mean() + out.context_reconstruction.square().mean()
    (loss + out.commitment_loss + out.dynamics_commitment_loss).backward()
    without = [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]
    assert not without


def test_bfloat16_runs(tokenizer):
    video = torch.rand(1, 3, 3, 32, 32, dtype=torch.bfloat16)
    model = tokenizer.to(torch.bfloat16)
    with torch.inference_mode():
        assert model.detokenize(model.tokenize(video)[0]).dtype == torch.bfloat16


def test_context_can_shrink_and_not_grow(tokenizer):
    tokenizer.set_context_length(1)
    assert tokenizer.context_length == tokenizer.layout.context_length == 1
    tokenizer.tokenize(torch.rand(1, 3, 3, 32, 32))
    with pytest.raises(ValueError, match="context_length 2.*key positions for 1"):
        tokenizer.set_context_length(2)


def test_quantizer_takes_the_nearest_entry_and_passes_the_gradient():
    quantizer = VectorQuantizer(7, 3)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(4, 5, 3, requires_grad=True)
    out = quantizer(z)
    brute = (z[..., None, :] - quantizer.embedding.weight).square().sum(-1).argmin(-1)
    assert torch.equal(out.indices, brute)
    torch.testing.assert_close(out.quantized, quantizer.embedding(brute))
    (gradient,) = torch.autograd.grad(out.quantized.sum(), z, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(z))
    expected = 2 * (z - quantizer.embedding(brute)).square().mean()
    torch.testing.assert_close(out.commitment_loss, expected)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.rand(3, 3, 32, 32), r"shape \(B, T, C, H, W\), got \(3, 3, 32, 32\)"),
        (torch.rand(1, 3, 3, 32, 16), r"\(3, 32, 32\) for this model, got \(3, 32, 16\)"),
        (torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8), "got torch.uint8: divide 8-bit frames by 255"),
        (torch.full((1, 3, 3, 32, 32), 255.0), "values from 255 to 255"),
        (torch.full((1, 3, 3, 32, 32), float("nan")), "values from nan"),
        (torch.rand(1, 1, 3, 32, 32), "video of 1 frames is shorter than the model's context of 2"),
        (torch.rand(0, 3, 3, 32, 32), "holds no clip"),
        ([[0.0]], "must be a tensor"),
    ],
)
def test_videos_that_do_not_fit_are_refused(tokenizer, video, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.tokenize(video)
