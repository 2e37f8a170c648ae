"""Tests of LPIPS against the lpips package, with random weights (no package carries VGG's)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch

from ivideogpt.training.perceptual import LPIPS


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Sequential:
    torch.manual_seed(0)
    with torch.device("meta"):  # the classifier's 124M parameters are not needed
        features: Any = timm.create_model("vgg16", pretrained=False).features
    features = features.to_empty(device="cpu")
    for module in features:
        if isinstance(module, torch.nn.Conv2d):
            assert module.bias is not None
            torch.nn.init.kaiming_normal_(module.weight)
            torch.nn.init.normal_(module.bias, std=0.1)
    return features.eval()


def test_distance_equals_that_of_the_lpips_package(backbone: torch.nn.Sequential) -> None:
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")
        oracle = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    convolutions = [m for m in oracle.net.modules() if isinstance(m, torch.nn.Conv2d)]
    ours = [m for m in backbone if isinstance(m, torch.nn.Conv2d)]
    for theirs, own in zip(convolutions, ours, strict=True):
        theirs.load_state_dict(own.state_dict())
    first, second = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = oracle(first, second, normalize=True).flatten()
        found = LPIPS(backbone)(first, second)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradient_is_finite_where_all_activations_are_zero(backbone: torch.nn.Sequential) -> None:
    silent = torch.nn.Sequential(*backbone)
    distance = LPIPS(silent)
    frames = torch.zeros(1, 3, 32, 32, requires_grad=True)
    first: Any = next(module for module in silent if isinstance(module, torch.nn.Conv2d))
    bias = first.bias.detach().clone()
    first.bias.data.fill_(-100.0)  # the first activation is zero everywhere
    distance(frames, torch.zeros(1, 3, 32, 32)).sum().backward()
    first.bias.data.copy_(bias)
    assert frames.grad is not None
    assert torch.isfinite(frames.grad).all()


def test_unreachable_weights_give_one_error_that_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(OSError, match=r"vgg16.*offline.*perceptual_weight: 0"):
        LPIPS.pretrained()
