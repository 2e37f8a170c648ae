"""Reading RoboNet's files, written with h5py, OpenCV's byte order and PyAV's encoder as its own tools do."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivideogpt.data.sources.robonet import RobonetOptions, read_robonet, robonet_jobs

h5py: Any = pytest.importorskip("h5py")
av: Any = pytest.importorskip("av")
STEPS = 9


@pytest.fixture(scope="module")
def video(shared: Path) -> np.ndarray:
    """Real camera frames, wider than high, as RoboNet's are: uint8 (10, 48, 64, 3)."""
    frames = np.load(shared / "data" / "bair_sample.npz", allow_pickle=False)["aux1_image"]
    return np.ascontiguousarray(frames[: STEPS + 1, 8:56].astype(np.uint8))


def mp4(frames: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=5, options={"crf": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return np.frombuffer(buffer.getvalue(), np.uint8)


def jpg(frame: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, format="JPEG", quality=100, subsampling=0)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.fixture
def write(tmp_path: Path, video: np.ndarray) -> Callable[..., Path]:
    """Writes one file; keyword arguments change what is in it."""

    def make(
        name: str = "robot_traj0.hdf5",
        encoding: str = "mp4",
        colours: str = "RGB",
        actions: np.ndarray | None = None,
        primitives: str = "",
        state: np.ndarray | None = None,
        bounds: bool = True,
    ) -> Path:
        with h5py.File(tmp_path / name, "w") as file:
            file["file_version"] = "0.1.0"
            env = file.create_group("env")
            env.attrs["n_cams"], env.attrs["cam_encoding"] = 1, encoding
            given = video if colours == "RGB" else video[..., ::-1]  # as the encoder was given them
            if encoding == "mp4":
                item = env.create_dataset("cam0_video/frames", data=mp4(given))
                item.attrs["T"], item.attrs["shape"], item.attrs["image_format"] = len(video), video.shape[1:], colours
            else:
                for t, frame in enumerate(given):  # cv2.imencode takes BGR: what it is given first lands in blue
                    item = env.create_dataset(f"cam0_video/frame{t}", data=jpg(frame[..., ::-1]))
                    item.attrs["shape"], item.attrs["image_format"] = video.shape[1:], colours
            env["state"] = np.zeros((STEPS + 1, 5)) if state is None else state
            file["policy/actions"] = np.ones((STEPS, 5)) if actions is None else actions
            if bounds:
                file["misc/low_bound"], file["misc/high_bound"] = (
                    np.array([0, 0, 0, 0, -1.0]),
                    np.array([1, 1, 1, 1, 3.0]),
                )
            metadata = file.create_group("metadata")
            metadata.attrs["robot"] = "sawyer"
            metadata.attrs["object_classes"] = ["cup", "box"]
            if primitives:
                metadata.attrs["primitives"] = primitives
        return tmp_path / name

    return make


@pytest.mark.parametrize("encoding", ["mp4", "jpg"])
@pytest.mark.parametrize("colours", ["RGB", "BGR"])
def test_encodings(write: Callable[..., Path], video: np.ndarray, encoding: str, colours: str) -> None:
    episode = read_robonet(write(encoding=encoding, colours=colours))
    assert episode.video.shape == (10, 48, 48, 3)
    difference = np.abs(episode.video.astype(int) - video[:, :, 8:56])
    assert difference.max() == 0 if encoding == "mp4" else difference.mean() < 1
    assert episode.actions is not None
    np.testing.assert_array_equal(episode.actions, np.vstack([np.ones((9, 5)), np.zeros((1, 5))]))
    assert (episode.camera, episode.source) == ("cam0", "robonet/sawyer")
    assert episode.metadata["object_classes"] == ["cup", "box"] and episode.metadata["file"] == "robot_traj0.hdf5"
    whole = read_robonet(write(encoding=encoding, colours=colours), RobonetOptions(crop=False))
    assert whole.resolution == (48, 64)


def test_widths_of_actions(write: Callable[..., Path]) -> None:
    def actions(width: int, **fields: Any) -> np.ndarray:
        values = np.arange(1.0, STEPS * width + 1).reshape(STEPS, width)
        episode = read_robonet(write(actions=values, **fields))
        assert episode.actions is not None and episode.actions.shape == (STEPS + 1, 5)
        kept = min(width, 5)
        np.testing.assert_array_equal(episode.actions[:-1, :kept], values[:, :kept])
        return episode.actions

    assert not actions(3)[:, 3:].any()
    assert not actions(4)[:, 4].any()  # no autograsp: filled with a zero
    actions(7)
    state = np.zeros((STEPS + 1, 5))
    state[:, -1] = [9, 0, 2, 2, 1, 0.9, 1.1, 3, -1, 2]  # the middle of the bounds is 1; row 0 follows no action
    grasp = actions(4, primitives="autograsp", state=state)
    assert grasp[:, 4].tolist() == [-1, 3, 3, -1, -1, 3, 3, -1, 3, 0]


def test_test_list(tmp_path: Path, write: Callable[..., Path]) -> None:
    for i in (10, 9, 1):
        write(f"robot_traj{i}.hdf5")
    names = tmp_path / "test.txt"
    names.write_text("some/where/robot_traj9.hdf5\n\n")
    options = RobonetOptions(test_list=names)

    def split(name: str | None) -> list[str]:
        chosen = RobonetOptions(test_list=options.test_list, split=name)
        return [job for job, _ in robonet_jobs(tmp_path, chosen)]

    assert split(None) == ["robot_traj1", "robot_traj9", "robot_traj10"]
    assert split("train") == ["robot_traj1", "robot_traj10"]
    assert split("test") == ["robot_traj9"]
    assert len(robonet_jobs(tmp_path)[0][1]()) == 10
    names.write_text("robot_traj9.hdf5\nrobot_traj77.hdf5")
    with pytest.raises(ValueError, match=r"1 of 2 test files are not there, such as robot_traj77.hdf5"):
        split("test")
    names.write_text("\n")
    with pytest.raises(ValueError, match=r"test.txt names no file"):
        split("train")
    with pytest.raises(ValueError, match="needs the list of test files"):
        robonet_jobs(tmp_path, RobonetOptions(split="test"))
    with pytest.raises(ValueError, match="split 'valid' is not one of"):
        robonet_jobs(tmp_path, RobonetOptions(split="valid"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"actions": np.ones((6, 5))}, "actions has 6 rows for 10 frames"),
        ({"actions": np.full((STEPS, 5), np.nan)}, "nan.* at frame 0"),
        ({"actions": np.ones(STEPS)}, r"policy/actions must be numbers \(T, A\), got float64 of shape \(9,\)"),
        ({"actions": np.ones((STEPS, 4)), "primitives": "autograsp", "bounds": False}, "needs low_bound"),
        (
            {"actions": np.ones((STEPS, 4)), "primitives": "autograsp", "state": np.ones((5, 5))},
            "a row after each of the 9",
        ),
        (
            {"actions": np.ones((STEPS, 4)), "primitives": "autograsp", "state": np.full((10, 5), np.nan)},
            "gripper position that is not finite",
        ),
        ({"colours": "YUV"}, "image format 'YUV'"),
    ],
)
def test_refused(write: Callable[..., Path], fields: dict[str, Any], message: str) -> None:
    file = write(**fields)
    with pytest.raises(ValueError, match=message) as caught:
        read_robonet(file)
    assert str(file) in str(caught.value)


def test_damaged_files(write: Callable[..., Path], tmp_path: Path, video: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"no env/cam3_video; cameras there: cam0_video"):
        read_robonet(write(), RobonetOptions(camera=3))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"frames": mp4(video)[:500]}, "does not decode|is cut off"),
        ({"frames": mp4(video[:4])}, "decodes to 4 frames, but says that it has 10"),
    ]
    for change, message in changes:
        file = write()
        with h5py.File(file, "a") as handle:
            del handle["env/cam0_video/frames"]
            item = handle.create_dataset("env/cam0_video/frames", data=change["frames"])
            item.attrs["T"] = 10
        with pytest.raises(ValueError, match=message):
            read_robonet(file)
    file = write(encoding="jpg")
    with h5py.File(file, "a") as handle:
        del handle["env/cam0_video/frame3"]
    with pytest.raises(ValueError, match=r"neither `frames` nor frame0..frame8"):
        read_robonet(file)
    file.write_bytes(write("other.hdf5").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"robot_traj0.hdf5: "):
        read_robonet(file)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"holds no .hdf5 or .h5 file"):
        robonet_jobs(tmp_path / "nothing")
