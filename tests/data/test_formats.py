"""Every format through the command line, from files that others' code wrote, and what is told about wrong words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivideogpt.data.formats import FORMATS, guess_format, list_jobs, make_options, option_fields
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.sources.npz import NpzOptions
from ivideogpt.data.verification import verify_set

FIXTURES = Path(__file__).parent / "fixtures"


def robot_hdf5(folder: Path, frames: np.ndarray, layout: str) -> Path:
    """Three demonstrations written with h5py, as robomimic, VP2 or RoboNet lay them out."""
    h5py: Any = pytest.importorskip("h5py")
    folder.mkdir()
    rng = np.random.default_rng(0)
    if layout != "robonet":
        with h5py.File(folder / "demos.hdf5", "w") as file:
            for number in range(3):
                demo = file.create_group(f"data/demo_{number}")
                key = "agentview_image" if layout == "hdf5" else "agentview_shift_2_image"
                demo[f"obs/{key}"] = frames[:8]
                demo["actions"] = rng.normal(size=(8, 4))
            file["mask/train"] = np.array([b"demo_0", b"demo_2"])
        return folder
    from PIL import Image

    for number in range(3):
        with h5py.File(folder / f"robot_traj{number}.hdf5", "w") as file:
            file["file_version"] = "0.1.0"
            env = file.create_group("env")
            env.attrs["n_cams"] = 1
            env.attrs["cam_encoding"] = "jpg"
            for t in range(8):
                path = folder / "frame.jpg"
                Image.fromarray(frames[t]).save(path, quality=100, subsampling=0)
                env[f"cam0_video/frame{t}"] = np.frombuffer(path.read_bytes(), np.uint8)
                path.unlink()
            file["policy/actions"] = rng.normal(size=(7, 5))
            file.create_group("metadata").attrs["robot"] = "sawyer"
    return folder


def videos(folder: Path, frames: np.ndarray, names: list[str]) -> Path:
    av: Any = pytest.importorskip("av")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libvpx-vp9" if name.endswith("webm") else "libx264", rate=5)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames[:8]:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    return folder


@pytest.fixture
def source(shared: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A source of a format."""
    frames = np.load(shared / "data" / "bair_sample.npz", allow_pickle=False)["aux1_image"].astype(np.uint8)

    def make(name: str) -> Path:
        folder = tmp_path / "source"
        if name == "npz":
            return shared / "data" / "metaworld" / "plate-slide"
        if name == "rlds":
            return FIXTURES / "rlds_robot"
        if name in ("bair", "lerobot"):
            return FIXTURES / name.replace("lerobot", "lerobot/image")
        if name in ("hdf5", "vp2", "robonet"):
            return robot_hdf5(folder, frames, name)
        if name == "video":
            return videos(folder, frames, ["walk/a.mp4", "run/b.mp4"])
        videos(folder, frames, ["7.webm", "9.webm"])
        labels = [{"id": "7", "label": "x", "template": "Pushing [x]"}, {"id": "9", "label": "y", "template": "[y]"}]
        (folder / "something-something-v2-train.json").write_text(json.dumps(labels))
        return folder

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(
    run: Callable[..., int],
    source: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    folder, out = source(name), tmp_path / "out"
    words: list[str] = [] if name != "vp2" else ["--format", "vp2"]  # which looks like any HDF5 file
    camera = ["--camera", "observation.images.top"] if name == "lerobot" else []
    assert run("pack", folder, "--out", out, "--workers", "1", "--resize", "32", *words, *camera) == 0
    captured = capsys.readouterr()
    assert ("read as" in captured.err) == (not words)
    if not words:
        assert f"read as {name} (" in captured.err
    assert verify_set(out) == []
    shards = ShardSet(out)
    jobs, total = list_jobs(folder, name, make_options(name, {"camera": camera[-1]}) if camera else None)
    listed = list(jobs)
    assert len(shards) == len(listed) and total in (None, len(listed))
    for index, (_, read) in enumerate(listed):
        found, expected = shards.episode(index), read()
        assert found is not None
        assert found.resolution == (32, 32)
        assert len(found) == len(expected)
        for field in ("actions", "rewards", "terminations", "fps", "camera", "source", "licence", "metadata"):
            np.testing.assert_equal(getattr(found, field), getattr(expected, field))


def test_options_of_a_format(run: Callable[..., int], source: Callable[[str], Path], tmp_path: Path) -> None:
    folder = source("vp2")
    words = ["--format", "vp2", "--split", "train", "--no-next-frame", "--fps", "12.5", "--licence", "MIT"]
    assert run("pack", folder, "--out", tmp_path / "out", "--workers", "1", *words) == 0
    shards = ShardSet(tmp_path / "out")
    assert len(shards) == 2
    assert shards.index["fps"][0] == 12.5
    assert shards.manifest["licences"] == ["MIT"]
    for option in ("--format vp2", "--split train", "--no-next-frame", "--fps 12.5", "--licence MIT"):
        assert option in shards.manifest["command"]


def test_every_option_is_described(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("pack", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for option, names in option_fields().items():
        assert f"--{option.replace('_', '-')}" in text
        assert names
    assert "The one split to read" in text
    fields = {field.name for form in FORMATS.values() for field in dataclasses.fields(form.options_class())}
    assert fields - set(option_fields()) == {"preferred"}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("npz", {"test_list": "x"}, "--test-list is no option of the format 'npz'; it belongs to robonet"),
        ("robonet", {"camera": "wrist"}, "--camera needs a number for the format 'robonet', got 'wrist'"),
        ("video", {"fps": "fast"}, "--fps needs a number for the format 'video', got 'fast'"),
        ("zarr", {}, "format 'zarr' is not known; there are npz, rlds"),
    ],
)
def test_wrong_options(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_options(name, given)


def test_options_are_converted() -> None:
    assert make_options("robonet", {"camera": "2", "fps": "3", "split": None}).camera == 2
    assert make_options("rlds", {"fps": "3", "reward_follows_action": False}).fps == 3.0


def test_what_cannot_be_guessed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        guess_format(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nothing that any format knows"):
        guess_format(tmp_path)
    (tmp_path / "a.npz").touch()
    assert guess_format(tmp_path) == "npz"
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(ValueError, match=r"may be npz \(a.npz\) or video \(clip.mp4\); say which with --format"):
        guess_format(tmp_path)


def test_options_of_another_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format 'video' takes VideoOptions, got NpzOptions"):
        list_jobs(tmp_path, "video", NpzOptions())


def test_shards_take_no_options(run: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--fps is not for them"):
        run("pack", "embedded:heldout", "--out", tmp_path / "out", "--fps", "3")


def test_cameras(run: Callable[..., int], source: Callable[[str], Path], tmp_path: Path) -> None:
    """Several cameras of a format are an episode each, all of one recording; names that are not there are told."""
    assert run("pack", FIXTURES / "rlds_robot", "--out", tmp_path / "rlds", "--camera", "all", "--workers", "1") == 0
    shards = ShardSet(tmp_path / "rlds")
    one, total = list_jobs(FIXTURES / "rlds_robot", "rlds")
    seen: dict[str, set[str]] = {}
    for index in range(len(shards)):
        episode = shards.episode(index)
        assert episode is not None
        seen.setdefault(episode.metadata["recording"], set()).add(episode.camera)
    assert len(seen) == total == len(list(one))
    assert all(cameras == {"cameras/wrist", "image", "raw"} for cameras in seen.values())

    words = ["--camera", "image_main", "--camera", "image_aux1", "--workers", "1"]
    assert run("pack", FIXTURES / "bair", "--out", tmp_path / "bair", *words) == 0
    assert "--camera image_main --camera image_aux1" in ShardSet(tmp_path / "bair").manifest["command"]
    folder = source("robonet")
    assert run("pack", folder, "--out", tmp_path / "net", "--camera", "0", "--resize", "32", "--workers", "1") == 0
    with pytest.raises(ValueError, match="--camera needs a number for the format 'robonet', got 'wrist'"):
        run("pack", folder, "--out", tmp_path / "x", "--camera", "wrist")
    with pytest.raises(ValueError, match=r"'npz' has one camera; formats with several are rlds, bair"):
        run("pack", source("npz"), "--out", tmp_path / "x", "--camera", "a", "--camera", "b")
    with pytest.raises(ValueError, match="each may be named once"):
        run("pack", FIXTURES / "bair", "--out", tmp_path / "x", "--camera", "image_main", "--camera", "image_main")


def test_formats_are_listed(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("formats") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in FORMATS)
    assert run("formats", "--format", "robonet") == 0
    assert "--test-list" in capsys.readouterr().out


def test_lerobot_is_recognised(tmp_path: Path) -> None:
    """By its meta/info.json, before the videos in it are taken for recordings of their own."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0"}))
    (tmp_path / "file-000.mp4").touch()
    if "lerobot" in FORMATS:
        assert guess_format(tmp_path) == "lerobot"
    else:
        with pytest.raises(ValueError, match="format 'lerobot' is not known"):
            guess_format(tmp_path)
