"""What could get lost without a word: missing episodes and shards, unusual files, last rewards, words of a task."""

from __future__ import annotations

import json
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from pyarrow import parquet

from ivideogpt.data import ShardSet, VideoDataModule
from ivideogpt.data.packing import pack
from ivideogpt.data.shards import ShardSetWriter
from ivideogpt.data.sources.hdf5 import hdf5_jobs
from ivideogpt.data.verification import verify_set

Sets = Callable[..., Path]
Run = Callable[..., int]
FIXTURES = Path(__file__).parent / "fixtures"
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)


def test_a_missing_shard_is_a_finding_of_the_doctor(make_set: Sets, run: Run, capsys: Any, tmp_path: Path) -> None:
    folder = make_set("set", episodes=6, per_shard=2)
    (folder / "episodes-000001.tar").unlink()
    assert run("doctor", folder, "--json", tmp_path / "found.json", "--segment-length", "4") == 4
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert [key for finding in found if finding["check"] == "unreadable" for key in finding["keys"]] == [
        "set-002",
        "set-003",
    ]
    with pytest.raises(ValueError, match="--json .*: there is no folder"):
        run("doctor", folder, "--json", tmp_path / "none" / "found.json")


def test_the_doctor_looks_at_the_set_that_is_named(make_set: Sets, run: Run, capsys: Any) -> None:
    folder = make_set("set", episodes=3)
    for part in ("train", "heldout"):
        made = make_set(part, episodes=2)
        made.rename(folder / part)
    run("doctor", folder)
    assert f"{folder}:3episodes" in "".join(capsys.readouterr().out.split())
    for path in folder.glob("*.*"):
        path.unlink()
    run("doctor", folder)
    assert "train:2episodes" in "".join(capsys.readouterr().out.split())
    for command in ("stats", "verify"):
        with pytest.raises(ValueError, match=r"holds 2 sets and is none itself; name one: .*heldout.*train"):
            run(command, folder)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_episodes_that_are_missing_count_as_many(tmp_path: Path) -> None:
    """A data set that says how many it holds: what is missing stands against --max-bad, be it one reason or many."""
    source = tmp_path / "robot"
    for path in (FIXTURES / "rlds_robot").rglob("*"):
        if path.is_file():
            target = source / path.relative_to(FIXTURES / "rlds_robot")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    info = next(source.rglob("dataset_info.json"))
    content = json.loads(info.read_text())
    there = int(content["splits"][0]["shardLengths"][0])
    content["splits"][0]["shardLengths"][0] = str(there + 40)
    info.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"40 of \d+ episodes of .* are bad, more than --max-bad 0.5 allows"):
        pack(source, tmp_path / "out", format="rlds", policy="skip")
    report = pack(source, tmp_path / "out", format="rlds", policy="skip", max_bad=1.0)
    assert report.bad == 40 and len(report.quarantine) == 1
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["quarantine"]["episodes"] == 40


def npz(folder: Path, count: int, bad: int | None = None) -> Path:
    folder.mkdir()
    for number in range(count):
        action = np.full((6, 2), np.nan if number == bad else 0.5, np.float32)
        np.savez(folder / f"{number}.npz", video=FRAMES, action=action)
    return folder


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_no_part_of_a_split_is_published_alone(tmp_path: Path) -> None:
    pack(npz(tmp_path / "good", 4), tmp_path / "split", holdout=0.25)
    held = int(ShardSet(tmp_path / "split" / "heldout").key(0))
    source, out = npz(tmp_path / "source", 4, bad=held), tmp_path / "out"
    with pytest.raises(ValueError, match=r"no episode is left for .*heldout, as all of them are bad; no set was made"):
        pack(source, out, policy="skip", holdout=0.25)
    assert not list(out.glob("*/manifest.json"))
    np.savez(source / f"{held}.npz", video=FRAMES, action=np.zeros((6, 2), np.float32))
    pack(source, out, policy="skip", holdout=0.25, overwrite=True)
    assert verify_set(out / "train") == verify_set(out / "heldout") == []


def test_others_may_read_all_files_of_a_set(make_set: Sets) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in make_set("set").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_videos_of_any_container_and_alone(tmp_path: Path, run: Run, capsys: Any) -> None:
    av = pytest.importorskip("av")
    source = tmp_path / "videos"
    source.mkdir()
    for suffix, form in ((".mkv", "matroska"), (".mov", "mov"), (".MP4", "mp4")):
        with av.open(str(source / f"film{suffix}"), "w", format=form) as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width = stream.height = 16
            for frame in FRAMES:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    assert run("pack", source, "--out", tmp_path / "all") == 0
    assert len(ShardSet(tmp_path / "all")) == 3
    assert run("pack", source / "film.mkv", "--out", tmp_path / "one") == 0
    assert ShardSet(tmp_path / "one").key(0) == "film"


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_links_in_a_tar_are_told_and_the_rest_is_read(make_set: Sets, tmp_path: Path) -> None:
    folder = make_set("set", episodes=3)
    evil = tmp_path / "evil.tar"
    with tarfile.open(folder / "episodes-000000.tar") as tar, tarfile.open(evil, "w") as out:
        for number, member in enumerate(tar):
            if number == 1:
                link = tarfile.TarInfo("link.safetensors")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                out.addfile(link)
            out.addfile(member, tar.extractfile(member))
    report = pack(str(evil), tmp_path / "out", policy="skip")
    assert (report.episodes, report.bad) == (3, 1)
    assert "is a link or a folder" in report.quarantine[0]["reason"]


def test_a_success_after_the_last_action_stays(tmp_path: Path) -> None:
    """Robomimic without next_obs: the reward follows the action, so the last one has no frame of its own."""
    path = tmp_path / "lift.hdf5"
    with h5py.File(path, "w") as file:
        for name, rewards in (("demo_0", [0, 0, 0, 0, 0, 1]), ("demo_1", [1, 2, 3, 4, 5, 6])):
            file[f"data/{name}/obs/agentview_image"] = FRAMES
            file[f"data/{name}/actions"] = np.ones((6, 2), np.float32)
            file[f"data/{name}/rewards"] = np.array(rewards, np.float32)
    sparse, dense = (read() for _, read in hdf5_jobs(path))
    assert sparse.rewards is not None and dense.rewards is not None
    assert sparse.rewards.tolist() == [0, 0, 0, 0, 0, 1]
    assert "last frame" in sparse.metadata["reward_rule"]
    assert dense.rewards.tolist() == [0, 1, 2, 3, 4, 5]
    assert dense.metadata["reward_after_last_frame"] == 6.0


def test_an_unknown_frame_rate_is_told(tmp_path: Path, run: Run, capsys: Any) -> None:
    source = npz(tmp_path / "source", 2)
    assert run("pack", source, "--out", tmp_path / "out") == 0
    assert "1 frame a second is noted for all episodes" in capsys.readouterr().err
    assert run("pack", source, "--out", tmp_path / "known", "--fps", "12") == 0
    assert "frame a second" not in capsys.readouterr().err


def test_an_export_keeps_instruction_state_and_statistics(tmp_path: Path, run: Run, make_episode: Any) -> None:
    state = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    about = {"observation/natural_language_instruction": "pick the cup", "observation.state": state.tolist()}
    about |= {"observation.words": ["go"] * 8, "observation.ragged": [[1.0], [1.0, 2.0]] * 4}  # no feature of numbers
    with ShardSetWriter(tmp_path / "set") as writer:
        writer.write("a", make_episode(8, metadata=about))
    assert run("export", tmp_path / "set", "--out", tmp_path / "out") == 0
    tasks = parquet.read_table(tmp_path / "out/meta/tasks.parquet").to_pylist()
    assert [list(row.values()) for row in tasks] == [[0, "pick the cup"]]
    rows = parquet.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    np.testing.assert_array_equal(np.array(rows["observation.state"].to_pylist(), np.float32), state)
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())
    np.testing.assert_allclose(stats["observation.state"]["mean"], state.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["observation.state"]["std"], state.std(0), rtol=1e-5)
    episode = ShardSet(tmp_path / "set").episode(0)
    assert episode is not None
    pictures = stats["observation.images.camera0"]
    np.testing.assert_allclose(np.ravel(pictures["mean"]), episode.video.mean((0, 1, 2)) / 255, rtol=1e-6)
    assert np.shape(pictures["max"]) == (3, 1, 1) and pictures["count"] == [8]


def test_a_resumed_training_with_other_data_is_told(make_set: Sets) -> None:
    one, two = str(make_set("one", episodes=4)), str(make_set("two", episodes=4, action_dim=2))

    def module(train: str, **options: Any) -> VideoDataModule:
        made = VideoDataModule(train, segment_length=4, resolution=16, num_workers=0, **options)
        made.setup()
        return made

    state = module(one).state_dict()
    module(one, batch_size=2).load_state_dict(state)  # nothing is said
    for other in (module(two), module(one, stride=2)):
        with pytest.warns(UserWarning, match="made with other training sets or clips"):
            other.load_state_dict(state)
    module(one).load_state_dict({"position": 3, "seed": 0})  # of an older version


@pytest.mark.parametrize("stride", [1.5, "2", {"synthetic": 2.5}])
def test_a_stride_is_a_whole_number(make_set: Sets, stride: Any) -> None:
    with pytest.raises(ValueError, match="stride must be a whole number of at least 1"):
        VideoDataModule(str(make_set("set")), segment_length=4, stride=stride)
