"""Packing: files, sets and streams in, shards out, with both policies about bad input."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ivideogpt.data.codec import encode_episode
from ivideogpt.data.episode import Episode
from ivideogpt.data.packing import pack, unique_keys
from ivideogpt.data.reader import ShardError, ShardSet
from ivideogpt.data.shards import ShardSetWriter, encoded
from ivideogpt.data.sources.npz import NpzOptions
from ivideogpt.data.verification import verify_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten .npz episodes in two subfolders."""
    rng = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "npz" / f"run.{i % 2}" / f"e{i}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, video=rng.integers(0, 256, (6, 12, 16, 3), dtype=np.uint8), action=rng.normal(size=(6, 2)))
    return tmp_path / "npz"


def keys(shards: ShardSet) -> list[str]:
    return [shards.key(i) for i in range(len(shards))]


def test_real_recordings(shared: Path, tmp_path: Path) -> None:
    report = pack(shared / "data", tmp_path / "all")
    assert report.episodes == 22
    assert verify_set(tmp_path / "all") == []
    assert report.frames == 30 + 22 + 20 * 101
    manifest = ShardSet(tmp_path / "all").manifest
    assert manifest["resolutions"] == [[64, 64], [256, 320]]
    assert manifest["action_dims"] == [0, 4]


def test_order_content_and_resize(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    report = pack(folder, tmp_path / "out", NpzOptions(licence="CC0-1.0"), resize=8, progress=lambda *x: seen.append(x))
    assert (report.episodes, report.frames, report.skipped) == (10, 60, [])
    assert seen == [(i + 1, 10) for i in range(10)]
    shards = ShardSet(tmp_path / "out")
    assert keys(shards) == [f"run_{i % 2}_e{i}" for i in (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)]
    episode = shards.episode(0)
    assert episode is not None
    assert episode.video.shape == (6, 8, 8, 3)
    original = np.load(folder / "run.0" / "e0.npz")["video"][:, :, 2:14]  # the centred square
    assert abs(episode.video.mean() - original.mean()) < 5
    np.testing.assert_allclose(episode.actions, np.load(folder / "run.0" / "e0.npz")["action"], rtol=1e-6)  # type: ignore[arg-type]


def test_one_file(folder: Path, tmp_path: Path) -> None:
    assert pack(folder / "run.0" / "e0.npz", tmp_path / "out").episodes == 1


@pytest.mark.parametrize(("share", "count"), [(0.2, 2), (0.5, 5), (0.01, 1), (0.99, 9)])
def test_holdout(folder: Path, tmp_path: Path, share: float, count: int) -> None:
    report = pack(folder, tmp_path / "out", holdout=share)
    assert report.folders == [tmp_path / "out" / "train", tmp_path / "out" / "heldout"]
    train, heldout = (keys(ShardSet(path)) for path in report.folders)
    assert len(heldout) == count
    assert len(set(train) | set(heldout)) == 10
    assert not set(train) & set(heldout)


def test_bad_files(folder: Path, tmp_path: Path) -> None:
    (folder / "run.0" / "e4.npz").write_bytes(b"not a zip")
    np.savez(folder / "run.1" / "e3.npz", video=np.zeros((2, 4, 4, 3), np.uint8), action=np.full((2, 1), np.nan))
    with pytest.raises(ValueError, match=r"run.0/e4.npz"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=r"run_0_e4 skipped \(1 so far\)|run_1_e3 skipped \(2 so far\)"):
        report = pack(folder, tmp_path / "out", policy="skip")
    assert report.episodes == 8
    assert [name for name, _ in report.skipped] == ["run_0_e4", "run_1_e3"]
    assert "nan" in report.skipped[1][1]


def test_a_set_can_be_packed_again(make_set: Callable[..., Path], tmp_path: Path) -> None:
    source = make_set(episodes=6, per_shard=4)
    report = pack(source, tmp_path / "copy", holdout=0.34)
    assert report.episodes == 6
    assert ShardSet(tmp_path / "copy" / "train").manifest["licences"] == ["CC0-1.0"]
    assert pack("embedded:heldout", tmp_path / "embedded").episodes == len(ShardSet("embedded:heldout"))
    assert verify_set(tmp_path / "embedded") == []


def test_damaged_sets(make_set: Callable[..., Path], tmp_path: Path) -> None:
    source = make_set(episodes=6)
    path, offset, size = ShardSet(source).place(4)
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="set-004"):
        pack(source, tmp_path / "copy")
    with pytest.warns(UserWarning, match="set-004"):
        report = pack(source, tmp_path / "copy", policy="skip")
    assert report.episodes == 5
    assert verify_set(tmp_path / "copy") == []


def test_a_tar_as_a_stream(make_set: Callable[..., Path], tmp_path: Path) -> None:
    tar = make_set(episodes=3, per_shard=3) / "episodes-000000.tar"
    assert pack(tar, tmp_path / "path").episodes == 3
    assert pack(f"file:{tar}", tmp_path / "file").episodes == 3
    command = f"pipe:cat {tar}"
    with pytest.raises(ShardError, match="runs a command"):
        pack(command, tmp_path / "pipe")
    assert pack(command, tmp_path / "pipe", allow=[command]).episodes == 3
    assert keys(ShardSet(tmp_path / "pipe")) == ["set-000", "set-001", "set-002"]


def test_a_stream_has_no_holdout(make_set: Callable[..., Path], tmp_path: Path) -> None:
    tar = make_set(episodes=3, per_shard=3) / "episodes-000000.tar"
    with pytest.raises(ValueError, match="not a stream"):
        pack(tar, tmp_path / "out", holdout=0.5)


def test_a_truncated_stream(make_set: Callable[..., Path], tmp_path: Path) -> None:
    tar, offset, _ = ShardSet(make_set(episodes=3, per_shard=3)).place(1)
    tar.write_bytes(tar.read_bytes()[: offset + 10])
    with pytest.raises(ValueError, match="not a whole tar"):
        pack(tar, tmp_path / "out")
    with pytest.warns(UserWarning, match="the rest after member 1 skipped"):
        assert pack(tar, tmp_path / "out", policy="skip").episodes == 1


def test_member_names_that_leave_the_folder(tmp_path: Path, make_episode: Callable[..., Episode]) -> None:
    data = encode_episode(make_episode())
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("../../evil.safetensors", "good.safetensors"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"member name '../../evil' is not allowed"):
        pack(tmp_path / "x.tar", tmp_path / "out")
    with pytest.warns(UserWarning, match="not allowed"):
        assert pack(tmp_path / "x.tar", tmp_path / "out", policy="skip").episodes == 1
    assert keys(ShardSet(tmp_path / "out")) == ["good"]


def test_keys() -> None:
    names = ["a/b.npz", "a_b.npz", "a b.npz", "-x.npz", "ä.npz", "x" * 200 + ".npz", "y" + "x" * 200 + ".npz"]
    found = unique_keys(names)
    assert found[:4] == ["a_b", "a_b-1", "a_b-2", "x"]
    assert len(set(found)) == len(names)
    assert all(len(key) <= 81 for key in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "none"}, "none does not exist"),
        ({"source": "."}, "holds nothing that any format knows"),
        ({"policy": "x"}, "policy 'x' is not one of"),
        ({"holdout": 1.0}, "holdout must be in"),
        ({"resize": 2}, "resize must be at least 8"),
    ],
)
def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        pack(**({"source": "embedded", "out": tmp_path / "out"} | arguments))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_manifest_names_the_command(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out", command="ivideogpt data pack here --out there")
    assert (
        json.loads((tmp_path / "out" / "manifest.json").read_text())["command"]
        == "ivideogpt data pack here --out there"
    )


def test_codecs(shared: Path, tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """Lossless unless another codec is named, which then says what it loses."""
    source = shared / "data" / "fractal_sample.npz"
    video = np.load(source)["image"]
    sizes = {}
    for codec in ("delta-zstd", "delta-zlib", "jpeg-90", "jpeg-98"):
        out = tmp_path / codec
        assert run("pack", source, "--out", out, "--codec", codec, "--workers", "1") == 0
        assert run("pack", source, "--out", out, "--codec", codec, "--workers", "1") == 0
        assert "nothing to do" in capsys.readouterr().out
        assert verify_set(out) == []
        shards = ShardSet(out)
        episode = shards.episode(0)
        assert episode is not None
        says, sizes[codec] = shards.manifest["codec"], shards.manifest["shards"][0]["size"]
        assert says["name"] == codec and says["lossless"] is (codec.startswith("delta"))
        assert ("--codec" in shards.manifest["command"]) is (codec != "delta-zstd")
        error = float(((episode.video.astype(int) - video) ** 2).mean())
        if says["lossless"]:
            assert error == 0 and "psnr" not in says
        else:
            assert says["psnr"]["all"] == pytest.approx(10 * np.log10(255**2 / error))
            assert says["psnr"]["worst"] == pytest.approx(says["psnr"]["all"])
            assert says["psnr"]["all"] > 40
    assert sizes["jpeg-90"] < sizes["jpeg-98"] < min(sizes["delta-zstd"], sizes["delta-zlib"])
    with pytest.raises(ValueError, match=r"holds .*; choose another folder or overwrite it"):
        run("pack", source, "--out", tmp_path / "jpeg-90")
    with pytest.raises(ValueError, match="codec 'h265' is not known; there are delta-zstd, delta-zlib, jpeg-50"):
        run("pack", source, "--out", tmp_path / "none", "--codec", "h265")
    assert not (tmp_path / "none").exists()


def write_two_codecs(writer: ShardSetWriter, episode: Episode) -> None:
    with writer:
        writer.write("a", episode)
        writer.write_encoded("b", *encoded(episode, "jpeg-90"))


@pytest.mark.parametrize("per_shard", [1, 10])
def test_one_set_has_one_codec(tmp_path: Path, make_episode: Callable[..., Episode], per_shard: int) -> None:
    with pytest.raises(ValueError, match="not 'delta-zstd' and 'jpeg-90'"):
        write_two_codecs(ShardSetWriter(tmp_path / "set", shard_episodes=per_shard), make_episode())
    assert not (tmp_path / "set").exists()
