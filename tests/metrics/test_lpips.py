"""LPIPS against the lpips package, with random backbones (no package carries VGG's or AlexNet's) and the real heads."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from ivideogpt.metrics.lpips import LPIPS
from ivideogpt.metrics.networks import find_weights
from ivideogpt.metrics.rollouts import FrameMetric

NETWORKS = ("vgg", "alex")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Network -> file with a random backbone, named as in torchvision's files, and its SHA-256."""
    found = {}
    for name, build in {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}.items():
        with torch.device("meta"):  # the classifier is not needed
            features: Any = build(weights=None).features
        features = features.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for module in features:
            if isinstance(module, torch.nn.Conv2d):
                assert module.bias is not None
                torch.nn.init.kaiming_normal_(module.weight, generator=generator)
                torch.nn.init.normal_(module.bias, std=0.1, generator=generator)
        path = tmp_path_factory.mktemp(name) / "random.pth"
        torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, path)
        found[name] = path, hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def oracle_for(network: str, ours: LPIPS) -> Any:
    """The lpips package's module with our backbone and its own heads."""
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = lpips.LPIPS(net=network, pnet_rand=True, verbose=False).eval()
    convolutions = [m for m in oracle.net.modules() if isinstance(m, torch.nn.Conv2d)]
    own = [m for m in ours.backbone if isinstance(m, torch.nn.Conv2d)]
    for theirs, mine in zip(convolutions, own, strict=True):
        theirs.load_state_dict(mine.state_dict())
    return oracle


@pytest.mark.parametrize("network", NETWORKS)
def test_distance_equals_that_of_the_lpips_package(network: str, weights: dict[str, tuple[Path, str]]) -> None:
    ours = LPIPS(network, *weights[network])
    oracle = oracle_for(network, ours)
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(2, 3, 3, 64, 48, generator=generator)
    second = (first + 0.2 * torch.randn(first.shape, generator=generator)).clamp(0, 1)
    with torch.no_grad():
        found = ours(first, second)
        a, b = first.flatten(0, 1), second.flatten(0, 1)
        zero_to_one = oracle(a, b, normalize=True).reshape(2, 3)
        minus_one_to_one = oracle(2 * a - 1, 2 * b - 1, normalize=False).reshape(2, 3)
    assert found.shape == (2, 3)
    assert bool((found > 0.01).all())
    torch.testing.assert_close(found, zero_to_one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, minus_one_to_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_many_frames_are_split_without_changing_a_value(network: str, weights: dict[str, tuple[Path, str]]) -> None:
    ours = LPIPS(network, *weights[network])
    first, second = torch.rand(2, 70, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours(first, second)[66:], ours(first[66:], second[66:]))
    assert not ours(first[:2], first[:2]).any()


def test_it_streams_as_a_frame_metric(weights: dict[str, tuple[Path, str]]) -> None:
    ours = LPIPS("alex", *weights["alex"])
    generator = torch.Generator().manual_seed(3)
    truth = torch.rand(3, 2, 3, 32, 32, generator=generator)
    samples = torch.rand(3, 4, 2, 3, 32, 32, generator=generator)
    metric = FrameMetric(ours, num_videos=3, horizon=2, higher_is_better=False).clone()
    for video in range(3):
        for some in (slice(0, 3), slice(3, 4)):
            metric.update(samples[video, some], truth[video : video + 1], torch.tensor([video]))
    found = metric.compute()
    values = torch.stack([ours(samples[:, sample], truth) for sample in range(4)], dim=1).double()  # (3, 4, 2)
    torch.testing.assert_close(found["best_per_video"], values.mean(2).amin(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["curve"], values.mean((0, 1)), rtol=1e-5, atol=1e-7)


def test_gradient_is_finite_where_all_activations_are_zero(weights: dict[str, tuple[Path, str]]) -> None:
    distance = LPIPS("vgg", *weights["vgg"])
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    first: Any = distance.backbone[0]
    first.bias.fill_(-100.0)  # the first activation is zero everywhere
    frames = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(frames, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert frames.grad is not None
    assert torch.isfinite(frames.grad).all()


def test_random_weights_are_no_reference(weights: dict[str, tuple[Path, str]]) -> None:
    ours = LPIPS("alex", *weights["alex"])
    assert ours.sha256 == weights["alex"][1]
    assert not ours.is_reference


def test_a_wrong_file_is_refused(weights: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    path, sha256 = weights["alex"]
    with pytest.raises(ValueError, match=f"random.pth is not the 'alex' network.*{sha256}, expected 7be5be79"):
        LPIPS("alex", path)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        LPIPS("alex", cut, sha256)
    with pytest.raises(ValueError, match="does not hold the weights of 'vgg'"):
        LPIPS("vgg", path, sha256)
    with pytest.raises(ValueError, match=r"no file .*absent\.pth"):
        LPIPS("vgg", tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="no network 'squeeze'"):
        LPIPS("squeeze", path)


def test_weights_are_found_in_a_folder_and_checked(
    weights: dict[str, tuple[Path, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IVIDEOGPT_NETWORKS", str(tmp_path))
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(weights["alex"][0].read_bytes())
    found = find_weights("alex", sha256=weights["alex"][1])
    assert LPIPS("alex", found).sha256 == weights["alex"][1]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SHA-256"):
        LPIPS("alex")


def test_bad_frames(weights: dict[str, tuple[Path, str]]) -> None:
    ours, frames = LPIPS("alex", *weights["alex"]), torch.rand(2, 3, 40, 40)
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3, 40, 40\) and \(1, 3, 40, 40\)"):
        ours(frames, frames[:1])
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, H, W\)"):
        ours(frames[:, :1], frames[:, :1])
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        ours((frames * 255).byte(), frames)


@pytest.mark.parametrize(("network", "smallest"), [("vgg", 16), ("alex", 31)])
def test_smallest_frames(network: str, smallest: int, weights: dict[str, tuple[Path, str]]) -> None:
    ours, frames = LPIPS(network, *weights[network]), torch.rand(2, 3, smallest, smallest)
    assert bool(torch.isfinite(ours(frames, frames.flip(0))).all())
    with pytest.raises(ValueError, match=f"at least {smallest} pixels"):
        ours(frames[..., 1:], frames[..., 1:])


def test_unreachable_weights_give_one_error_that_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "IVIDEOGPT_NETWORKS"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        OSError, match=r"hf download timm/vgg16.*vgg16-397923af.*cannot be fetched.*perceptual_weight: 0"
    ):
        LPIPS.pretrained()
    with pytest.raises(OSError, match=r"LPIPS \(AlexNet\) needs the weights alexnet-owt-7be5be79\.pth"):
        LPIPS("alex")
