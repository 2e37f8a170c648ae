"""`data stats` and `data show`: the numbers are those of the episodes, the pictures show their frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivideogpt.data.reader import ShardSet
from ivideogpt.data.shards import ShardSetWriter

Run = Callable[..., int]


@pytest.fixture
def mixed(make_episode, tmp_path: Path) -> Path:
    """Two sources that differ in size, rate, actions and camera."""
    with ShardSetWriter(tmp_path / "mixed") as writer:
        for number in range(3):
            writer.write(f"a-{number}", make_episode(10 + number, size=16, seed=number, source="lab/a", camera="top"))
        for number in range(2):
            other = make_episode(30, size=24, seed=9, action_dim=None, source="lab/b", fps=5.0, camera="side")
            writer.write(f"b-{number}", other)
    return tmp_path / "mixed"


def test_stats_are_those_of_the_episodes(run: Run, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", mixed, "embedded:heldout", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [str(mixed), "embedded:heldout"]
    shards, summary = ShardSet(mixed), found[str(mixed)]
    first, second = summary["sources"]["lab/a"], summary["sources"]["lab/b"]
    assert (first["episodes"], first["frames"], first["resolutions"]) == (3, 33, [[16, 16]])
    assert first["hours"] == pytest.approx(3.3 / 3600) and second["hours"] == pytest.approx(12 / 3600)
    assert (first["cameras"], second["cameras"], second["fps"]) == (["top"], ["side"], [5.0])
    assert (first["action_dims"], second["action_dims"]) == ([4], [None])
    assert (first["lengths"]["min"], first["lengths"]["median"], first["lengths"]["max"]) == (10, 11, 12)
    assert sum(first["lengths"]["histogram"]) == 3
    actions = np.concatenate([episode.actions[:-1] for i in range(3) if (episode := shards.episode(i))])  # type: ignore[index]
    np.testing.assert_allclose(first["statistics"]["actions"]["mean"], actions.mean(0), rtol=1e-4)
    assert second["statistics"]["actions"] is None


def test_stats_as_tables(run: Run, mixed: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run("stats", mixed) == 0
    text = capsys.readouterr().out
    for word in ("lab/a", "lab/b", "16 x 16", "24 x 24", "top", "side", "actions", "rewards", "93 frames", "█"):
        assert word in text
    assert run("stats", "embedded:train") == 0  # of version 1, without statistics of a source


def test_a_sheet_shows_the_frames(run: Run, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet.png"
    assert run("show", mixed, "--out", out, "--episode", "b-1", "--episode", "0", "--frames", "4") == 0
    assert "b-1, a-0" in capsys.readouterr().out
    sheet = np.asarray(Image.open(out).convert("RGB"))
    episode = ShardSet(mixed).episode(4)
    assert episode is not None
    frame = episode.video[0].repeat(6, 0).repeat(6, 1)  # enlarged
    places = [top for top in range(40) if np.array_equal(sheet[top : top + 144, :144], frame)]
    assert len(places) == 1


def test_an_animation_has_all_frames(run: Run, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.gif"
    assert run("show", mixed, "--out", out, "--episodes", "3") == 0
    with Image.open(out) as gif:
        assert gif.size == (16 + 16 + 24 + 6, 24)
        assert gif.n_frames == 30
        assert gif.info["duration"] == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.txt"], r"--out x.txt must end in one of .png, .gif, .mp4"),
        (["--out", "x.png", "--episode", "c-1"], "no episode 'c-1' in .*: keys are a-0 to b-1, numbers 0 to 4"),
        (["--out", "x.png", "--episode", "5"], "no episode '5'"),
        (["--out", "x.png", "--frames", "0"], "--frames 0 must be at least 1"),
    ],
)
def test_mistakes(run: Run, mixed: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("show", mixed, *words)
