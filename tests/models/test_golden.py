"""The published computation: every tensor that the original implementation recorded is reproduced."""

import pytest
import torch

from ivideogpt import from_pretrained
from ivideogpt.models import next_token_loss


def assert_frames_close(frames: torch.Tensor, recorded: torch.Tensor) -> None:
    """Frames are recorded as float16, everything else exactly."""
    torch.testing.assert_close(frames, recorded.float(), atol=4e-3, rtol=0.0)


@pytest.fixture(params=["oxe-64-act-free", "bair-64-act-cond"])
def recorded(request, golden):
    return golden(request.param)


@torch.inference_mode()
def test_tokens_labels_and_reconstruction(recorded):
    tokenizer = from_pretrained(recorded.folder).tokenizer
    tokens, labels = tokenizer.tokenize(recorded.video)
    assert torch.equal(tokens, recorded.tensors["tokens"])
    assert torch.equal(labels, recorded.tensors["labels"])
    assert_frames_close(tokenizer.detokenize(tokens), recorded.tensors["reconstruction"])


@torch.inference_mode()
def test_training_forward_and_commitment_losses(recorded):
    tokenizer, expected = from_pretrained(recorded.folder).tokenizer, recorded.tensors
    context_length = tokenizer.context_length
    out = tokenizer(recorded.video[:, :context_length], recorded.video[:, context_length:])
    future, context = out.future_reconstruction.flatten(0, 1), out.context_reconstruction.flatten(0, 1)
    assert_frames_close(future, expected["train_future_reconstruction"])
    assert_frames_close(context, expected["train_context_reconstruction"])
    assert out.commitment_loss.item() == pytest.approx(expected["commit_loss"].item(), rel=1e-5)
    assert out.dynamics_commitment_loss.item() == pytest.approx(expected["dynamics_commit_loss"].item(), rel=1e-5)


@torch.inference_mode()
def test_logits_and_loss(recorded):
    model, expected = from_pretrained(recorded.folder), recorded.tensors
    out = model(expected["tokens"], actions=expected.get("actions"), labels=expected["labels"])
    torch.testing.assert_close(out.logits[:, -64:], expected["logits_last64"], atol=1e-4, rtol=0.0)
    assert out.loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert out.rewards is None
    assert next_token_loss(out.logits, expected["labels"]).item() == out.loss.item()


@torch.inference_mode()
def test_shortened_context(golden):
    recorded = golden("oxe-64-act-free")
    tokenizer = from_pretrained(recorded.folder, context_length=1).tokenizer
    tokens, _ = tokenizer.tokenize(recorded.video)
    assert torch.equal(tokens, recorded.tensors["tokens_after_context_1"])
    expected = recorded.tensors["reconstruction_after_context_1"]
    assert_frames_close(tokenizer.detokenize(tokens), expected)
