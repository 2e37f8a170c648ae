"""Reading videos that PyAV's encoders wrote and folders of images, with actions beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivideogpt.data.sources.video import VideoOptions, read_video, video_jobs

av: Any = pytest.importorskip("av")


@pytest.fixture(scope="module")
def frames(shared: Path) -> np.ndarray:
    """Thirty real camera frames (30, 64, 64, 3)."""
    return np.load(shared / "data" / "bair_sample.npz", allow_pickle=False)["aux1_image"].astype(np.uint8)


def encode(path: Path, frames: np.ndarray, codec: str, pixels: str, fps: int = 10, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format=pixels)))
        container.mux(stream.encode())
    return path


def images(folder: Path, frames: np.ndarray, pattern: str = "{}.png") -> Path:
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / pattern.format(t))
    return folder


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options", "least"),
    [
        ("x.mp4", "libx264", "yuv420p", {"crf": "18"}, 27),
        ("x.mp4", "libx264rgb", "rgb24", {"crf": "0"}, 99),
        ("x.avi", "mpeg4", "yuv420p", {"qscale": "2", "global_quality": "236", "flags": "+qscale"}, 26),
        ("x.webm", "libvpx-vp9", "yuv420p", {"crf": "10", "b": "0", "cpu-used": "8"}, 26),
        ("x.gif", "gif", "rgb8", {}, 15),
    ],
)
def test_videos(
    tmp_path: Path, frames: np.ndarray, name: str, codec: str, pixels: str, options: dict[str, str], least: float
) -> None:
    episode = read_video(encode(tmp_path / name, frames, codec, pixels, 10, **options))
    assert episode.video.shape == frames.shape
    with np.errstate(divide="ignore"):
        assert psnr(episode.video, frames) > least
    assert episode.fps == pytest.approx(10, rel=0.01)
    assert episode.actions is None and episode.metadata == {"file": name}


def test_folders_of_images(tmp_path: Path, frames: np.ndarray) -> None:
    images(tmp_path / "b", frames)  # 0.png .. 29.png: 10 comes after 9
    images(tmp_path / "a" / "deep", frames[:3], "frame_{:03d}.jpg")
    (tmp_path / "b" / "notes.txt").write_text("no frame")
    (tmp_path / ".hidden").mkdir()
    Image.fromarray(frames[0]).save(tmp_path / ".hidden" / "0.png")
    jobs = video_jobs(tmp_path, VideoOptions(fps=5, source="mine"))
    assert [name for name, _ in jobs] == ["a/deep", "b"]
    episode = jobs[1][1]()
    np.testing.assert_array_equal(episode.video, frames)
    assert (episode.fps, episode.source) == (5, "mine")
    assert jobs[0][1]().metadata == {"file": "deep", "label": "a"}


def test_labels_of_class_folders(tmp_path: Path, frames: np.ndarray) -> None:
    """UCF-101's layout."""
    for name in ("Archery/v_Archery_g02_c01.avi", "Archery/v_Archery_g01_c10.avi", "YoYo/v_YoYo_g25_c05.avi"):
        encode(tmp_path / name, frames[:4], "mpeg4", "yuv420p")
    jobs = video_jobs(tmp_path)
    assert [name for name, _ in jobs] == [
        "Archery/v_Archery_g01_c10",
        "Archery/v_Archery_g02_c01",
        "YoYo/v_YoYo_g25_c05",
    ]
    assert jobs[2][1]().metadata == {"file": "v_YoYo_g25_c05.avi", "label": "YoYo", "group": 25, "clip": 5}
    assert "label" not in video_jobs(tmp_path, VideoOptions(labels=False))[0][1]().metadata


def test_actions_beside(tmp_path: Path, frames: np.ndarray) -> None:
    actions = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)  # one row fewer than frames
    folder = images(tmp_path / "x", frames[:4])
    rows = [",".join(map(str, row)) for row in actions.tolist()]

    def written(suffix: str, content: str) -> np.ndarray:
        file = tmp_path / f"x{suffix}"
        file.write_text(content)
        found = read_video(folder)
        file.unlink()
        assert found.actions is not None
        np.testing.assert_allclose(found.actions[:3], actions, rtol=1e-6)
        assert not found.actions[3].any()
        return found  # type: ignore[return-value]

    np.save(tmp_path / "x.npy", actions)
    episode = read_video(folder)
    np.testing.assert_array_equal(np.asarray(episode.actions)[:3], actions)
    (tmp_path / "x.npy").unlink()
    written(".csv", "\n".join(rows) + "\n")
    named: Any = written(".csv", "dx,dy\n" + "\n".join(rows))
    assert named.metadata["action_names"] == ["dx", "dy"]
    rewarded: Any = written(".csv", "dx,dy,reward\n" + "\n".join(f"{row},2" for row in rows))
    assert rewarded.rewards.tolist() == [0, 2, 2, 2]
    written(".json", json.dumps(actions.tolist()))
    said = {"actions": actions.tolist(), "rewards": [0, 1, 2, 3], "fps": 7, "task": "push"}
    full: Any = written(".json", json.dumps(said))
    assert full.rewards.tolist() == [0, 1, 2, 3] and full.fps == 7 and full.metadata["task"] == "push"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "1,2\n3\n", "x.csv beside it: row 1 has 1 values for 2 columns"),
        ("x.csv", "a,b\n1,c\n", "row 0 holds 'c'; numbers are needed"),
        ("x.csv", "\n", "it has no rows"),
        ("x.csv", "1,2\n3,4\n", "actions has 2 rows for 4 frames"),
        ("x.csv", "1,2\n3,4\nnan,1\n5,6\n", "nan.* at frame 2"),
        ("x.json", "[[1, 2], [3]]", "x.json beside it: .*inhomogeneous"),
        ("x.json", "{", "x.json beside it"),
        ("x.json", '"text"', "a list of actions or an object"),
        ("x.json", '{"actions": [["a"], ["b"], ["c"], ["d"]]}', "numbers are needed"),
        ("x.npy", "hello", "x.npy beside it"),
    ],
)
def test_wrong_files_beside(tmp_path: Path, frames: np.ndarray, name: str, content: str, message: str) -> None:
    folder = images(tmp_path / "x", frames[:4])
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_video(folder)
    assert str(folder) in str(caught.value)


def test_several_files_beside(tmp_path: Path, frames: np.ndarray) -> None:
    folder = images(tmp_path / "x", frames[:4])
    (tmp_path / "x.csv").write_text("1\n2\n3\n4\n")
    (tmp_path / "x.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(ValueError, match=r"several files beside it: x.csv, x.json"):
        read_video(folder)


def test_no_pickle_is_ever_loaded(tmp_path: Path, frames: np.ndarray) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    folder = images(tmp_path / "x", frames[:4])
    np.save(tmp_path / "x.npy", np.array([Trap()] * 4, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_video(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("x.mp4", "libx264", "yuv420p"),
        ("x.avi", "mpeg4", "yuv420p"),
        ("x.webm", "libvpx", "yuv420p"),
        ("x.gif", "gif", "rgb8"),
    ],
)
def test_damaged_videos(tmp_path: Path, frames: np.ndarray, name: str, codec: str, pixels: str) -> None:
    """Cut in the middle, a video decodes to where it was cut; that is no whole recording."""
    file = encode(tmp_path / name, frames, codec, pixels)
    whole = file.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"hello" * 100):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: the video (does not decode|is cut off|holds no frame|has no)"):
            read_video(file)


def test_mixed_resolutions(tmp_path: Path, frames: np.ndarray) -> None:
    folder = images(tmp_path / "x", frames[:4])
    Image.new("RGB", (32, 48)).save(folder / "4.png")
    with pytest.raises(ValueError, match=r"mixes resolutions: frame 0 is 64 x 64 .*, frame 4 is 48 x 32"):
        read_video(folder)
    (folder / "4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"4.png is no JPEG or PNG image"):
        read_video(folder)


def test_nothing_to_read(tmp_path: Path) -> None:
    for source, message in ((tmp_path, "holds no video"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(ValueError, match=message):
            video_jobs(source)
    with pytest.raises(ValueError, match="no such file or folder"):
        read_video(tmp_path / "x.mp4")
    with pytest.raises(ValueError, match="the folder holds no frame"):
        read_video(tmp_path)


def test_the_extra_is_named(tmp_path: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    file = encode(tmp_path / "x.mp4", frames, "libx264", "yuv420p")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'ivideogpt\[video\]'"):
        read_video(file)
    read_video(images(tmp_path / "y", frames[:2]))  # images need no extra
