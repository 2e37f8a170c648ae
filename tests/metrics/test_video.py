"""PSNR, SSIM and MSE against direct computations; best of several samples; bad input."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.data import ShardSet
from ivideogpt.metrics import best_of, mse, psnr, ssim
from ivideogpt.metrics import video as video_module
from ivideogpt.metrics.video import frame_metrics, windowed_ssim


def videos(seed: int = 0, size: int = 24) -> tuple[Tensor, Tensor]:
    """Two similar videos (2, 3, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(2, 3, 3, size, size, generator=generator)
    return (truth + 0.1 * torch.randn(truth.shape, generator=generator)).clamp(0, 1), truth


def direct_ssim(x: Tensor, y: Tensor) -> float:
    """SSIM of two images (C, H, W) after Wang et al. (2004), window by window, in float64."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = line[:, None] * line[None]
    window /= window.sum()
    total, count = 0.0, 0
    for channel in range(x.shape[0]):
        for top in range(x.shape[1] - 10):
            for left in range(x.shape[2] - 10):
                a, b = (image[channel, top : top + 11, left : left + 11].double() for image in (x, y))
                mean_a, mean_b = float((window * a).sum()), float((window * b).sum())
                var_a = float((window * a * a).sum()) - mean_a**2
                var_b = float((window * b * b).sum()) - mean_b**2
                cov = float((window * a * b).sum()) - mean_a * mean_b
                c1, c2 = 0.01**2, 0.03**2
                total += ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / (
                    (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
                )
                count += 1
    return total / count


def test_mse_and_psnr_are_per_frame() -> None:
    prediction, truth = videos()
    errors, ratios = mse(prediction, truth), psnr(prediction, truth)
    assert errors.shape == ratios.shape == (2, 3)
    for clip in range(2):
        for time in range(3):
            expected = float(((prediction[clip, time] - truth[clip, time]).double() ** 2).mean())
            assert float(errors[clip, time]) == pytest.approx(expected, rel=1e-5)
            assert float(ratios[clip, time]) == pytest.approx(-10 * math.log10(expected), rel=1e-5)


def test_ssim_is_wang_et_als() -> None:
    prediction, truth = videos(size=14)
    values = ssim(prediction, truth)
    assert values.shape == (2, 3)
    for clip, time in [(0, 0), (1, 2)]:
        assert float(values[clip, time]) == pytest.approx(
            direct_ssim(prediction[clip, time], truth[clip, time]), abs=1e-5
        )


def test_ssim_of_real_frames_is_piqas_in_double_precision() -> None:
    """Flat frames of a simulator, whose variances are differences of nearly equal numbers."""
    pytest.importorskip("piqa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import piqa.ssim
        from piqa.utils.functional import gaussian_kernel
    episode = ShardSet("embedded:heldout").episode(0)
    assert episode is not None
    truth = torch.from_numpy(episode.video[:4]).permute(0, 3, 1, 2)[None] / 255
    noise = 0.01 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    prediction = (truth + noise).clamp(0, 1)
    kernel: Any = gaussian_kernel(11, 1.5).repeat(3, 1, 1).double()
    theirs = piqa.ssim.ssim(prediction[0].double(), truth[0].double(), kernel)[0]
    torch.testing.assert_close(ssim(prediction, truth)[0].double(), theirs, rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", [16, 64])
def test_psnr_and_ssim_are_piqas(size: int) -> None:
    pytest.importorskip("piqa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is compiled by torch.jit, which is deprecated
        import piqa.psnr
        import piqa.ssim
        from piqa.utils.functional import gaussian_kernel
    prediction, truth = videos(seed=3, size=size)
    a, b = prediction.flatten(0, 1), truth.flatten(0, 1)
    kernel: Any = gaussian_kernel(11, 1.5).repeat(3, 1, 1)
    their_ssim = piqa.ssim.ssim(a, b, kernel)[0].unflatten(0, (2, 3))
    torch.testing.assert_close(ssim(prediction, truth), their_ssim, rtol=1e-5, atol=1e-6)
    their_psnr = piqa.psnr.psnr(a, b, epsilon=0.0).unflatten(0, (2, 3))
    torch.testing.assert_close(psnr(prediction, truth), their_psnr, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(mse(prediction, truth), piqa.psnr.mse(a, b).unflatten(0, (2, 3)))


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"border": 5}, {"sigma": 1.5}),
        ({}, {"sigma": 1.5}),
        ({"data_range": 2.0}, {"sigma": 1.5, "data_range": 2.0}),
        ({"gaussian": False, "window": 7, "border": 3}, {"gaussian_kernel": False, "kernel_size": 7}),
    ],
)
def test_windows_of_any_kind_are_torchmetrics(
    options: dict[str, Any], theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    monkeypatch.setattr(video_module, "SSIM_PIXELS", 4 * 24 * 16)  # in several parts, the last a smaller one
    prediction, truth = (video[..., :16].double() for video in videos(seed=5))
    _, full = structural_similarity_index_measure(
        prediction.flatten(0, 1), truth.flatten(0, 1), reduction="none", return_full_image=True,
        **{"data_range": 1.0, **theirs},
    )  # fmt: skip
    assert isinstance(full, Tensor)
    border = options.get("border", 0)
    inside = full[..., border : full.shape[-2] - border, border : full.shape[-1] - border]
    expected = inside.mean(dim=(1, 2, 3)).unflatten(0, (2, 3))
    torch.testing.assert_close(windowed_ssim(prediction, truth, **options), expected, rtol=1e-12, atol=1e-12)


def test_known_values() -> None:
    black, grey = torch.zeros(1, 1, 3, 16, 16), torch.full((1, 1, 3, 16, 16), 0.1)
    assert float(mse(black, grey)) == pytest.approx(0.01)
    assert float(psnr(black, grey)) == pytest.approx(20.0, abs=1e-4)
    assert float(ssim(black, grey)) == pytest.approx(1e-4 / (0.01 + 1e-4), rel=1e-3)  # contrast terms are 1


def test_identical_frames_stay_finite() -> None:
    _, truth = videos()
    assert torch.allclose(psnr(truth, truth), torch.tensor(100.0))
    assert torch.allclose(ssim(truth, truth), torch.tensor(1.0))
    assert not mse(truth, truth).any()


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_a_frame_does_not_depend_on_its_neighbours(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    prediction, truth = videos()
    alone = metric(prediction[1:, 2:], truth[1:, 2:])
    torch.testing.assert_close(metric(prediction, truth)[1:, 2:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_bfloat16_is_measured_in_float32(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    prediction, truth = (video.bfloat16() for video in videos())
    assert torch.equal(metric(prediction, truth), metric(prediction.float(), truth.float()))


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_bad_input(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    prediction, truth = videos()
    with pytest.raises(ValueError, match=r"same shape, got \(2, 2, 3, 24, 24\) and \(2, 3, 3, 24, 24\)"):
        metric(prediction[:, :2], truth)
    with pytest.raises(ValueError, match=r"\(B, T, C, H, W\)"):
        metric(prediction[0], truth[0])
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        metric((prediction * 255).byte(), truth)


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_other_ranges_are_refused_and_nan_stays_nan(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    prediction, truth = videos()
    bytes_as_floats, stray = torch.linspace(0, 255, truth.numel()).reshape(truth.shape), truth.clone()
    stray[0, 0, 0, 0, 0] = -3.0
    with pytest.raises(ValueError, match=r"predicted frames must be in \[0, 1\], got values from -1 to 1: .*add 1"):
        metric(prediction * 2 - 1, truth)
    with pytest.raises(ValueError, match="true frames must be .* from 0 to 255: divide 8-bit frames by 255"):
        metric(prediction, bytes_as_floats)
    with pytest.raises(ValueError, match="true frames must be .* from -3 to .*: clamp them"):
        metric(prediction, stray)
    prediction[1, 2, 0, 3, 3] = math.nan  # a training that diverged logs NaN; `frame_metrics` refuses it
    assert torch.isnan(metric(prediction, truth)).tolist() == [[False] * 3, [False, False, True]]
    with pytest.raises(ValueError, match="predicted frames hold values that are not finite"):
        frame_metrics(prediction, truth)


def test_constant_frames_have_their_numbers() -> None:
    still = torch.full((1, 2, 3, 16, 16), 0.5)
    assert all(torch.isfinite(value).all() for value in frame_metrics(still, still * 0).values())


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(torch.rand(1, 1, 3, 8, 16), torch.rand(1, 1, 3, 8, 16))


def test_best_of_takes_the_best_clip_mean() -> None:
    values = torch.tensor([[1.0, 5.0], [2.0, 3.0], [0.0, 0.0], [9.0, 1.0]])  # 2 clips x 2 samples, 2 frames
    assert best_of(values, 2).tolist() == [3.0, 5.0]
    assert best_of(values, 2, higher_is_better=False).tolist() == [2.5, 0.0]
    assert best_of(values, 1).tolist() == [3.0, 2.5, 0.0, 5.0]


def test_frame_metrics_gives_all() -> None:
    prediction, truth = videos()
    found = frame_metrics(prediction, truth)
    assert set(found) == {"psnr", "ssim", "mse"}
    assert all(values.shape == (2, 3) and values.dtype == torch.float64 for values in found.values())
