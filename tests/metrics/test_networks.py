"""Feature networks: the call convention, the checks of files, and what is said where weights are missing."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.metrics.frechet import VideoFrechetDistance
from ivideogpt.metrics.networks import (
    WEIGHT_FILES,
    FeatureNetwork,
    Missing,
    RandomFeatures,
    Weights,
    fetch_weights,
    find_feature_network,
    find_weights,
    random_network,
)


@pytest.fixture
def script(tmp_path: Path) -> tuple[Path, str]:
    """A TorchScript file with I3D's call convention and random weights, and its SHA-256."""
    path = tmp_path / "features.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(RandomFeatures(24, seed=3)).save(str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a Hub that is not asked."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("IVIDEOGPT_NETWORKS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def clips(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_network_is_called_as_stylegan_vs_i3d() -> None:
    seen: dict[str, Any] = {}

    def spy(x: Tensor, **options: bool) -> Tensor:
        seen.update(options, shape=tuple(x.shape), low=float(x.min()), high=float(x.max()), dtype=x.dtype)
        return x.mean((2, 3, 4))

    network = FeatureNetwork(spy, "spy", "0", False, 3)
    found = network(clips())
    assert seen == {
        "rescale": True, "resize": True, "return_features": True, "shape": (3, 3, 5, 16, 16), "low": 0.0, "high": 255.0,
        "dtype": torch.float32,
    }  # fmt: skip
    torch.testing.assert_close(found, clips().float().mean((1, 3, 4)))


def test_bytes_and_floats_give_the_same_features() -> None:
    network = random_network()
    torch.testing.assert_close(network(clips()), network(clips().float() / 255), rtol=1e-5, atol=1e-6)


def test_many_videos_are_split_and_none_are_no_features() -> None:
    network = random_network(6)
    many = clips(40)
    torch.testing.assert_close(network(many)[35:], network(many[35:]))
    assert network(many[:0]).shape == (0, 6)


def test_random_networks_repeat_and_leave_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = random_network(), random_network(), random_network(seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert first.sha256 == second.sha256 != other.sha256
    assert not first.is_reference and "not FVD" in first.label
    named = find_feature_network("random")
    assert isinstance(named, FeatureNetwork) and torch.equal(named(clips()), first(clips()))


def test_a_file_of_a_given_hash_is_loaded_and_is_no_reference(script: tuple[Path, str]) -> None:
    path, sha256 = script
    network = find_feature_network("i3d", path, sha256)
    assert isinstance(network, FeatureNetwork)
    assert (network.sha256, network.num_features, network.is_reference) == (sha256, 24, False)
    assert network.label == "Frechet distance of features.pt features, not FVD"
    torch.testing.assert_close(network(clips()), random_network(24, seed=3)(clips()))


def test_a_metric_with_such_a_network_can_be_cloned_and_reset(script: tuple[Path, str]) -> None:
    network = find_feature_network("i3d", *script)
    assert isinstance(network, FeatureNetwork)
    metric = VideoFrechetDistance(network)
    copy = metric.clone()
    for one in (metric, copy):
        one.update(clips(6), real=True)
        one.update(clips(9).flip(1), real=False)
    assert float(copy.compute()) == float(metric.compute()) > 0
    copy.reset()
    assert copy.counts == (0, 0) and metric.counts == (6, 9)


def test_a_file_with_another_hash_is_refused_before_it_is_loaded(script: tuple[Path, str]) -> None:
    path, sha256 = script
    published = WEIGHT_FILES["i3d"][0].sha256
    with pytest.raises(ValueError, match=rf"features\.pt is not the 'i3d' network.*{sha256}, expected {published}"):
        find_feature_network("i3d", path)
    with pytest.raises(ValueError, match="expected 0000"):
        find_feature_network("i3d", path, "0" * 64)


def test_a_file_that_is_no_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "text.pt"
    path.write_text("no network")
    with pytest.raises(ValueError, match=r"text\.pt is no TorchScript file"):
        find_feature_network("i3d", path, hashlib.sha256(b"no network").hexdigest())


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.pt"
    with open(path, "wb") as file:
        file.truncate(10**13)  # sparse: takes no space
    with pytest.raises(ValueError, match=r"huge\.pt has 10,000,000,000,000 bytes"):
        find_feature_network("i3d", path)


def test_missing_weights_are_said_in_words(nothing_at_hand: Path) -> None:
    found = find_feature_network("i3d")
    assert isinstance(found, Missing)
    assert found.name == "i3d"
    for part in ("FVD needs", "51 MB", WEIGHT_FILES["i3d"][0].sha256, "hf download flateon/FVD-I3D-torchscript"):
        assert part in found.reason
    with pytest.raises(ValueError, match=r"no file .*absent\.pt"):
        find_feature_network("i3d", nothing_at_hand / "absent.pt")
    with pytest.raises(ValueError, match="no feature network 'c3d': choose from i3d, random"):
        find_feature_network("c3d")
    with pytest.raises(OSError, match="FVD needs .*cannot be fetched now"):
        fetch_weights("i3d")


def test_weights_are_found_in_the_hubs_cache(nothing_at_hand: Path, script: tuple[Path, str]) -> None:
    entry = WEIGHT_FILES["i3d"][0]
    assert entry.repo_id is not None and entry.revision is not None
    folder = nothing_at_hand / ("models--" + entry.repo_id.replace("/", "--")) / "snapshots" / entry.revision
    folder.mkdir(parents=True)
    (folder / entry.file).write_bytes(script[0].read_bytes())
    network = find_feature_network("i3d", sha256=script[1])
    assert isinstance(network, FeatureNetwork) and network.num_features == 24
    with pytest.raises(ValueError, match="SHA-256"):  # what lies there is not the published network
        find_feature_network("i3d")


def test_a_wrong_file_does_not_hide_the_right_one(
    nothing_at_hand: Path, script: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = WEIGHT_FILES["i3d"][0]
    folder = nothing_at_hand / "networks"
    folder.mkdir()
    monkeypatch.setenv("IVIDEOGPT_NETWORKS", str(folder))
    (folder / entry.file).write_text("something else")
    other = dataclasses.replace(entry, file="right.pt", sha256=script[1])
    (folder / other.file).write_bytes(script[0].read_bytes())
    monkeypatch.setitem(WEIGHT_FILES, "i3d", (entry, other))
    found = find_weights("i3d")
    assert isinstance(found, Weights) and found.path == folder / "right.pt" and found.is_reference


def test_bad_videos() -> None:
    network = random_network()
    video = clips().float() / 255
    with pytest.raises(ValueError, match=r"takes videos \(N, T, 3, H, W\), got \(5, 3, 16, 16\)"):
        network(video[0])
    with pytest.raises(ValueError, match=r"got \(3, 5, 1, 16, 16\)"):
        network(video[:, :, :1])
    with pytest.raises(ValueError, match=r"in \[0, 1\], got values from -1 to 1: .*add 1 and divide by 2"):
        network(video * 2 - 1)
    with pytest.raises(ValueError, match="from 0 to 255: divide 8-bit frames by 255"):
        network(video * 255)
    with pytest.raises(ValueError, match="not finite"):
        network(torch.full_like(video, math.nan))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        network(clips().long())


def test_a_network_that_cannot_take_so_few_frames_says_so() -> None:
    pooling = torch.nn.AvgPool3d((9, 16, 16))
    network = FeatureNetwork(lambda x, **_: pooling(x).flatten(1), "i3d", "0", False, 3)
    with pytest.raises(ValueError, match="'i3d' fails on videos of 5 frames of 16 x 16 pixels"):
        network(clips())
