"""The `ivideogpt data` commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ivideogpt.data.reader import ShardSet


def test_pack_verify_info(
    run: Callable[..., int], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = shared / "data" / "metaworld" / "hammer", tmp_path / "out"
    assert run("pack", folder, "--out", out, "--holdout", "0.2", "--licence", "MIT", "--source", "hammer") == 0
    assert "packed 5 episodes (505 frames)" in capsys.readouterr().out
    manifest = json.loads((out / "heldout" / "manifest.json").read_text())
    assert manifest["counts"]["episodes"] == 1
    assert (
        manifest["command"] == f"ivideogpt data pack {folder} --out {out} --holdout 0.2 --source hammer --licence MIT"
    )
    assert run("verify", out / "train") == 0
    assert "4 episodes: whole" in capsys.readouterr().out
    assert run("stats", out / "train") == 0
    assert "hammer" in capsys.readouterr().out


def test_verify_finds_damage(
    run: Callable[..., int], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("pack", shared / "data" / "metaworld" / "hammer", "--out", out)
    path, offset, size = ShardSet(out).place(0)
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert run("verify", out) == 1
    captured = capsys.readouterr()
    assert "SHA-256 differs" in captured.err
    assert "2 fault(s)" in captured.out


def test_bad_files(run: Callable[..., int], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz" / "good.npz").write_bytes((shared / "data" / "bair_sample.npz").read_bytes())
    (tmp_path / "npz" / "worse.npz").write_bytes(b"")
    words: list[str | Path] = ["pack", tmp_path / "npz", "--out", tmp_path / "out", "--workers", "1"]
    with pytest.raises(ValueError, match="worse.npz"):
        run(*words, "--strict")
    assert run(*words, "--resize", "32") == 0
    captured = capsys.readouterr()
    assert "packed 1 episodes (30 frames), 1 bad ones in " in captured.out
    assert "1 bad episodes left out" in captured.err and "worse" in captured.err
    assert ShardSet(tmp_path / "out").manifest["resolutions"] == [[32, 32]]


@pytest.mark.parametrize("words", [["collect", "metaworld", "--help"], ["pack", "--help"], ["verify", "--help"]])
def test_help(run: Callable[..., int], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out
