"""gFVD of folders of classes: real files of several kinds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivideogpt import cli
from ivideogpt.metrics import networks
from ivideogpt.metrics.class_folders import class_distance
from ivideogpt.metrics.networks import FeatureNetwork, random_network

CLASSES = ("Archery", "Bowling")


def write_clip(folder: Path, seed: int, frames: int = 5, size: int = 24) -> None:
    """A clip as a folder of PNGs."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(folder / f"{number}.png")


def write_set(root: Path, seed: int, count: int = 6) -> Path:
    for index, name in enumerate(CLASSES):
        for clip in range(count):
            write_clip(root / name / str(clip), seed + 100 * index + clip)
    return root


def test_the_same_clips_have_no_distance_and_others_have_one(tmp_path: Path) -> None:
    network = random_network()
    real = write_set(tmp_path / "real", 0)
    same = class_distance(real, write_set(tmp_path / "same", 0), network, frames=5, size=24)
    other = class_distance(real, write_set(tmp_path / "other", 5000), network, frames=5, size=24)
    assert same.distance < 1e-9 < 1e-3 < other.distance
    assert same.real == same.generated == {"Archery": 6, "Bowling": 6}
    assert same.label == network.label and "not FVD" in same.label
    assert any("12 real videos are too few" in note for note in same.notes)


def test_only_the_published_network_gives_a_gfvd(tmp_path: Path) -> None:
    network = random_network()
    published = FeatureNetwork(network.module, "i3d", network.sha256, True, network.num_features)
    real = write_set(tmp_path / "real", 0, 2)
    assert class_distance(real, real, published, frames=5, size=24).label == "gFVD"


def test_longer_clips_count_with_their_first_frames_and_gifs_are_read(tmp_path: Path) -> None:
    pytest.importorskip("av")
    for name in CLASSES:
        folder = tmp_path / "gifs" / name
        folder.mkdir(parents=True)
        for clip in range(3):
            grey = np.random.default_rng(clip).integers(0, 256, (9, 24, 24), dtype=np.uint8)
            first, *rest = (Image.fromarray(frame) for frame in grey)
            first.save(folder / f"{clip}.gif", save_all=True, append_images=rest, duration=100)
            cut = tmp_path / "frames" / name / str(clip)
            cut.mkdir(parents=True)
            for number, frame in enumerate(grey[:5]):
                Image.fromarray(np.repeat(frame[..., None], 3, 2)).save(cut / f"{number}.png")
    found = class_distance(tmp_path / "frames", tmp_path / "gifs", random_network(), frames=5, size=24)
    assert found.distance == pytest.approx(0, abs=1e-6)


def test_uneven_classes_are_noted(tmp_path: Path) -> None:
    real, generated = write_set(tmp_path / "real", 0), write_set(tmp_path / "generated", 7)
    write_clip(generated / "Bowling" / "more", 1)
    assert any("2 classes have another share" in note for note in class_distance(
        real, generated, random_network(), frames=5, size=24).notes)  # fmt: skip


def test_bad_folders(tmp_path: Path) -> None:
    network = random_network()
    real = write_set(tmp_path / "real", 0, 2)
    with pytest.raises(ValueError, match="there is no folder"):
        class_distance(real, tmp_path / "absent", network)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no clips: it must hold a folder for each class"):
        class_distance(real, tmp_path / "empty", network)
    write_clip(tmp_path / "one" / "Archery" / "0", 0)
    with pytest.raises(ValueError, match="has no clip of 1 of the classes of .*: Bowling"):
        class_distance(real, tmp_path / "one", network)
    with pytest.raises(ValueError, match=r"5 frames of 24 x 24 pixels; the clips must have 17 frames or more of 256"):
        class_distance(real, real, network)
    with pytest.raises(ValueError, match="must have 6 frames or more of 24 x 24"):
        class_distance(real, real, network, frames=6, size=24)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, generated = write_set(tmp_path / "real", 0), write_set(tmp_path / "generated", 5000)
    expected = class_distance(real, generated, random_network(), frames=5, size=24)
    out = tmp_path / "gfvd.json"
    words = ["gfvd", str(real), str(generated), "--frames", "5", "--size", "24", "--fvd-weights", "random"]
    assert cli.main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{expected.label}: {expected.distance:.4g}, 12 generated against 12 real clips of 2 classes" in printed
    assert "gFVD" not in printed and "note: 12 real videos are too few" in printed
    result = json.loads(out.read_text())
    assert result["distance"] == pytest.approx(expected.distance)
    assert (result["is_reference"], result["sha256"]) == (False, random_network().sha256)
    assert result["generated"] == {"folder": str(generated), "clips": {"Archery": 6, "Bowling": 6}}


def test_mistakes_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = str(write_set(tmp_path / "real", 0, 1))
    monkeypatch.setattr(networks, "_candidates", lambda _: [])
    for words, message in (
        ([real, real], "FVD needs the weights i3d_torchscript.pt"),
        ([real, real, "--fvd-weights", "random"], "the clips must have 17 frames or more of 256 x 256"),
        ([real, real, "--fvd-weights", "random", "--out", str(tmp_path / "no" / "x.json")], "there is no folder"),
        ([real, real, "--fvd-weights", "random", "--out", str(tmp_path)], "this is a folder; name a file"),
        ([real, real, "--fvd-weights", str(tmp_path / "absent.pt")], "there is no file"),
    ):
        assert cli.main(["gfvd", *words]) == 2
        assert message in capsys.readouterr().err
