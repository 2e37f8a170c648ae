"""Collecting in the real simulator, and the errors of those who do not have it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ivideogpt.data.reader import ShardSet
from ivideogpt.data.sources import rendering
from ivideogpt.data.sources.metaworld import collect, rollout_expert
from ivideogpt.data.verification import verify_set


@pytest.mark.simulator
def test_expert_episode() -> None:
    episode = rollout_expert("plate-slide", rng=np.random.default_rng(0))
    assert episode.metadata["success"]
    steps = episode.metadata["success_step"]
    assert len(episode) == steps + 5 + 1  # a few steps after the success, and the first frame
    assert episode.terminations is not None
    assert episode.terminations.tolist() == [False] * (len(episode) - 1) + [True]
    assert episode.actions is not None
    assert np.abs(episode.actions).max() <= 1
    assert (episode.actions[-1] == 0).all()
    assert episode.rewards is not None
    assert 1 < episode.rewards[1] < 3  # the scale of the recorded episodes: two steps of 0.8 at the start ...
    assert episode.rewards[steps] > 20  # ... and 10 more at success
    assert episode.rewards[steps - 1] < 20
    assert (episode.source, episode.licence, episode.camera, episode.fps) == (
        "metaworld/plate-slide-v3", "MIT", "corner", 40.0,
    )  # fmt: skip


@pytest.mark.simulator
def test_frames_look_like_the_recorded_ones(shared: Path) -> None:
    """Upright and from the same camera: nearer to the recording than to its flipped or mirrored images."""
    from ivideogpt.data.sources.npz import read_npz

    files = sorted((shared / "data" / "metaworld" / "plate-slide").glob("*.npz"))
    truth = read_npz(files[0]).video[0].astype(float)
    frame = rollout_expert("plate-slide", rng=np.random.default_rng(0), max_steps=1).video[0]
    distances = [np.abs(other - truth).mean() for other in (frame, frame[::-1], frame[:, ::-1], frame[::-1, ::-1])]
    assert distances[0] < 0.7 * min(distances[1:])


@pytest.mark.simulator
def test_noise_wanders() -> None:
    """The noise is correlated in time, and as large as asked for where it is not clipped."""
    kept: dict = {"max_steps": 30, "resolution": 8}
    calm = rollout_expert("handle-pull-side", 0.0, np.random.default_rng(1), **kept)
    noisy = rollout_expert("handle-pull-side", 1.0, np.random.default_rng(1), **kept)
    again = rollout_expert("handle-pull-side", 1.0, np.random.default_rng(1), **kept)
    np.testing.assert_array_equal(noisy.actions, again.actions)
    assert calm.metadata["layout"] == noisy.metadata["layout"]
    assert noisy.actions is not None
    assert calm.actions is not None
    gripper = noisy.actions[:-1, 3] - calm.actions[:-1, 3]  # the expert's own grip is constant at first
    assert np.abs(gripper).max() > 0.3
    assert np.corrcoef(gripper[:-1], gripper[1:])[0, 1] > 0.5


@pytest.mark.simulator
def test_collect(tmp_path: Path) -> None:
    out = tmp_path / "set"
    seen: list[tuple[int, int]] = []
    tasks = ["plate-slide", "button-press-topdown-wall-v3"]
    collect(tasks, 2, [0.0, 0.5], out, workers=0, max_steps=3, seed=7, progress=lambda *x: seen.append(x))
    assert verify_set(out) == []
    assert seen == [(i, 4) for i in range(5)]
    shards = ShardSet(out)
    assert [shards.key(i) for i in range(len(shards))] == [
        "plate-slide-s7-n000-00000",
        "button-press-topdown-wall-s7-n000-00000",
        "plate-slide-s7-n050-00001",
        "button-press-topdown-wall-s7-n050-00001",
    ]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["extra"]["fidelity"] == "fast"
    assert manifest["extra"]["renderer"] in ("egl", "osmesa")
    assert manifest["resolutions"] == [[64, 64]]
    assert manifest["action_dims"] == [4]
    assert manifest["has_rewards"]
    words = shlex.split(manifest["command"])
    assert words[:6] == ["ivideogpt", "data", "collect", "metaworld", "--task", "plate-slide-v3"]
    episodes = [shards.episode(i) for i in range(4)]
    layouts = {tuple(episode.metadata["layout"]) for episode in episodes if episode is not None}
    assert len(layouts) == 4


@pytest.mark.simulator
def test_the_recorded_command_makes_the_same_set(tmp_path: Path) -> None:
    """Run as written in the manifest, in other processes; pixels may differ by the renderer's rounding."""
    collect("plate-slide", 2, [0.0, 0.5], tmp_path / "one", workers=0, max_steps=2, seed=3)
    words = shlex.split(json.loads((tmp_path / "one" / "manifest.json").read_text())["command"])
    words[words.index("--out") + 1] = str(tmp_path / "two")
    subprocess.run([sys.executable, "-m", "ivideogpt.cli", *words[1:], "--workers", "1"], check=True, timeout=280)
    one, two = ShardSet(tmp_path / "one"), ShardSet(tmp_path / "two")
    for i in range(2):
        first, second = one.episode(i), two.episode(i)
        assert first is not None
        assert second is not None
        np.testing.assert_array_equal(first.actions, second.actions)
        np.testing.assert_array_equal(first.rewards, second.rewards)
        assert np.abs(first.video.astype(int) - second.video).mean() < 1


@pytest.mark.simulator
def test_paper_fidelity() -> None:
    frames = [
        rollout_expert("plate-slide", rng=np.random.default_rng(0), fidelity=fidelity, max_steps=1).video[0]
        for fidelity in ("paper", "fast")
    ]
    difference = np.abs(frames[0].astype(int) - frames[1]).mean()
    assert 0 < difference < 15  # shadows and smooth edges, the same scene


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"noise": [-1.0]}, r"not negative, got \[-1.0\]"),
        ({"noise": float("nan")}, "finite"),
        ({"fidelity": "best"}, "fidelity 'best' is not one of"),
        ({"tasks": ["plate-slide", "plate-slide-v3"]}, "different names"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"action_repeat": 0}, "action_repeat must be at least 1"),
    ],
)
def test_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(**({"tasks": "plate-slide", "episodes": 1, "out": tmp_path / "out"} | arguments))
    assert not (tmp_path / "out").exists()


def test_unknown_task(tmp_path: Path) -> None:
    pytest.importorskip("metaworld")
    with pytest.raises(ValueError, match="Meta-World has no task 'fly-v3'; it has assembly-v3"):
        collect("fly", 1, out=tmp_path / "out")


@pytest.mark.simulator
def test_mujoco_may_have_been_imported_before(tmp_path: Path) -> None:
    """It chooses its OpenGL when it is imported, and without MUJOCO_GL that is the window system's."""
    code = f"""
import mujoco
from ivideogpt.data.sources.metaworld import collect
collect("plate-slide", 1, out={str(tmp_path / "out")!r}, workers=0, max_steps=1)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=280)
    assert verify_set(tmp_path / "out") == []


def test_without_metaworld(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.policies", None)
    with pytest.raises(ImportError, match=r"pip install 'ivideogpt\[envs\]'"):
        collect("plate-slide", 1, out=tmp_path / "out")


def test_without_opengl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both probes fail for real: the interpreter that runs them finds no library."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "_PROBE", "raise OSError('cannot load the library')")
    rendering.choose_gl.cache_clear()
    try:
        with pytest.raises(
            OSError, match=r"egl: OSError: cannot load.*osmesa: .*libegl1 and libgl1-mesa-dri.*libosmesa6"
        ):
            rendering.choose_gl()
        assert "MUJOCO_GL" not in os.environ
    finally:
        rendering.choose_gl.cache_clear()


def test_the_users_opengl_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    rendering.choose_gl.cache_clear()
    try:
        assert rendering.choose_gl() == "glfw"
    finally:
        rendering.choose_gl.cache_clear()
