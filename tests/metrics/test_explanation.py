"""Each usual reason for another number, against what it must do to frames and scores that are known."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ivideogpt.metrics import alterations
from ivideogpt.metrics.clips import ClipSet
from ivideogpt.metrics.evaluation import evaluate
from ivideogpt.metrics.explanation import explain
from ivideogpt.metrics.judges import Judges, judges_for, other_networks
from ivideogpt.metrics.networks import random_network
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.video import mse, psnr, ssim
from tests.metrics.conftest import SIZE, Integrator, MemoryClips


@pytest.fixture
def video() -> Tensor:
    """Coloured noise over a gradient (4, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0.2, 0.8, 32).expand(4, 3, 32, 32)
    return (ramp + 0.1 * torch.randn(4, 3, 32, 32, generator=generator)).clamp(0, 1)


def decibel(first: Tensor, second: Tensor) -> float:
    return float(psnr(first[None], second[None]).mean())


def test_lossy_storage(video: Tensor) -> None:
    assert decibel(alterations.jpeg(video, 95, subsampling=0), video) > decibel(alterations.jpeg(video, 95), video)
    assert decibel(alterations.jpeg(video, 95), video) > decibel(alterations.jpeg(video, 50), video)
    buffer = io.BytesIO()  # as anybody else would store it
    frame = (video[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=75, subsampling="4:2:0")
    again = np.asarray(Image.open(buffer)) / 255
    np.testing.assert_allclose(alterations.jpeg(video[:1], 75)[0].permute(1, 2, 0).numpy(), again, atol=1e-6)
    film = alterations.h264(video)
    assert film is not None
    assert film.shape == video.shape
    assert 15 < decibel(film, video) < 50


def test_halved_colours_leave_grey_alone(video: Tensor) -> None:
    grey = video.mean(1, keepdim=True).expand_as(video)
    torch.testing.assert_close(alterations.chroma_420(grey), grey, atol=1e-5, rtol=0)
    assert decibel(alterations.chroma_420(video), video) < 40
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    inside = (video > 0.2) & (video < 0.8)  # what is not clamped keeps its brightness
    luma = [(one * weights).sum(1) for one in (video, alterations.chroma_420(video))]
    kept = inside.all(1)
    torch.testing.assert_close(luma[0][kept], luma[1][kept], atol=0.02, rtol=0)


def test_kernels(video: Tensor) -> None:
    found = {name: alterations.resized(video, 16, name) for name in alterations.KERNELS}
    assert all(one.shape == (4, 3, 16, 16) for one in found.values())
    torch.testing.assert_close(found["nearest pixel"], video[..., ::2, ::2])
    torch.testing.assert_close(found["mean over areas"], torch.nn.functional.avg_pool2d(video, 2))
    assert decibel(found["bilinear without antialiasing"], found["bicubic with antialiasing"]) < 60


def test_ranges_and_variants(video: Tensor) -> None:
    other = (video + 0.05 * torch.randn(video.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    a, b = other[None], video[None]
    torch.testing.assert_close(alterations.signed_mse(a, b), 4 * mse(a, b))
    torch.testing.assert_close(alterations.signed_psnr(a, b), psnr(a, b) - 10 * torch.tensor(4.0).log10())
    assert float(alterations.clip_psnr(a, b)) == pytest.approx(float(-10 * mse(a, b).mean().log10()), rel=1e-5)
    assert float(alterations.clip_psnr(a, b)) <= float(psnr(a, b).mean()) + 1e-5  # Jensen
    assert float(alterations.uniform_ssim(a, b)[0, 0]) == pytest.approx(uniform_ssim(a[0, 0], b[0, 0]), abs=1e-4)
    for variant in (alterations.whole_ssim, alterations.grey_ssim, alterations.signed_ssim(2.0)):
        assert variant(a, b).shape == (1, 4)
        assert not torch.allclose(variant(a, b), ssim(a, b), atol=1e-4)


def uniform_ssim(x: Tensor, y: Tensor) -> float:
    """SSIM of images (C, H, W) over 7 x 7 windows of equal weights, window by window, population moments."""
    total = []
    for channel in range(3):
        for top in range(x.shape[1] - 6):
            for left in range(x.shape[2] - 6):
                a, b = (image[channel, top : top + 7, left : left + 7].double() for image in (x, y))
                covariance = ((a - a.mean()) * (b - b.mean())).mean()
                c1, c2 = 0.01**2, 0.03**2
                total.append(
                    float(
                        (2 * a.mean() * b.mean() + c1)
                        * (2 * covariance + c2)
                        / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (a.var(correction=0) + b.var(correction=0) + c2))
                    )
                )
    return sum(total) / len(total)


# On a model and its recordings


def explained(model: Any, clips: Any, result: Any = None, **changes: Any) -> dict[str, Any]:
    protocol = EvaluationProtocol().changed(**{"horizon": 3, "runs": 1, **changes}).settled(model.config)
    judges = Judges({"psnr": psnr, "ssim": ssim, "mse": mse})
    return explain(model, clips, protocol, judges, result=result)


def values(found: dict[str, Any], change: str) -> dict[str, list[float]]:
    (row,) = (row for row in found["rows"] if row["change"].startswith(change))
    return row["values"]


def test_every_reason_is_measured_against_the_protocol() -> None:
    found = explained(Integrator(noise=0.05), MemoryClips(["push"] * 5))
    assert (found["videos"], found["samples"]) == (5, 10)
    reasons = list(dict.fromkeys(row["reason"] for row in found["rows"]))
    assert reasons == [
        "lossy frames", "resize kernel", "value range", "SSIM variant", "frames counted", "sampling",
        "number of samples",
    ]  # fmt: skip
    usual = {row["values"]["psnr"][0] for row in found["rows"] if "psnr" in row["values"]}
    assert len(usual) == 1
    before, after = values(found, "pixels in [-1, 1], a data range of 1")["psnr"]
    assert after == pytest.approx(before - 10 * np.log10(4))
    before, after = values(found, "best of 10 instead of 1")["mse"]
    assert after < before
    before, after = values(found, "context frames counted")["mse"]
    assert after == pytest.approx(before * 3 / 5)  # two context frames of no error


def test_argmax_has_one_future() -> None:
    found = explained(Integrator(), MemoryClips(["push"] * 2), temperature=0.0)
    assert found["samples"] == 1
    assert found["not_computed"]["number of samples"] == "argmax gives one future"
    assert not [row for row in found["rows"] if row["reason"] in ("sampling", "number of samples")]


def test_recordings_of_another_size_try_the_kernels(tiny_world_model: Callable[..., Any]) -> None:
    model = tiny_world_model(4)
    protocol = EvaluationProtocol().changed(horizon=2, videos=9, runs=2, num_samples=2).settled(model.config)
    clips = ClipSet.open("embedded:heldout", protocol)  # 64 px for a model of 32
    judges = judges_for(protocol)
    result = evaluate(model, clips, protocol, judges=judges)
    found = explain(model, clips, protocol, judges, result=result, **other_networks(protocol, judges))
    assert {row["change"] for row in found["rows"] if row["reason"] == "resize kernel"} == {
        f"scored frames resized with: {name}" for name in alterations.KERNELS
    }
    assert result is not None
    row = values(found, "8 of the 9 videos: low end")
    assert row["psnr"][0] == pytest.approx(result["overall"]["model"]["psnr"], rel=1e-5)
    assert row["psnr"][1] < row["psnr"][0] < values(found, "8 of the 9 videos: high end")["psnr"][1]
    if judges.features is None:
        assert "FVD needs the weights" in found["not_computed"]["FVD network"]


def test_another_fvd_network_is_never_tried_and_that_is_said() -> None:
    wanted, without = EvaluationProtocol(), EvaluationProtocol(metrics=("psnr",), fvd=None)
    with_fvd = Judges({"psnr": psnr}, features=random_network(4))
    assert (
        "FVD was measured with one network and never with another"
        in other_networks(wanted, with_fvd)["missing"]["FVD network"]
    )
    lacking = Judges({"psnr": psnr}, missing={"fvd": "no weights"})
    assert other_networks(wanted, lacking)["missing"]["FVD network"] == "no weights"
    assert "FVD network" not in other_networks(without, Judges({"psnr": psnr}))["missing"]


def test_the_given_frames_are_those_that_are_stored(tmp_path: Path) -> None:
    from ivideogpt.data.packing import pack

    image = np.random.default_rng(0).integers(0, 255, (6, 20, 24, 3)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", image=image)
    pack(tmp_path, tmp_path / "packed", format="npz")
    protocol = EvaluationProtocol(horizon=3).settled(Integrator(takes_actions=False).config)
    original = ClipSet.open(str(tmp_path / "packed"), protocol).original(0)
    assert original is not None
    np.testing.assert_array_equal(original.permute(0, 2, 3, 1).numpy(), image[:5])
    assert protocol.resolution == SIZE
