"""The doctor: nothing worse than a note about real recordings, and each planted fault found and named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivideogpt.data.doctor import LAGS, check, check_leaks, correlations, examine, lag_curve, read_set
from ivideogpt.data.episode import Episode
from ivideogpt.data.packing import pack
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.shards import ShardSetWriter

Episodes = list[Episode]


def moving(seed: int, length: int = 40) -> Episode:
    """Noise of which each action replaces as much as it is large: actions[t] makes frame t + 1 out of frame t."""
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(length, 3)).astype(np.float32) * rng.uniform(0.1, 2.0, (length, 1)).astype(np.float32)
    texture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    video = np.empty((length, 64, 64, 3), np.uint8)
    for t in range(length):
        blend = np.clip(np.linalg.norm(actions[t - 1]) / 4, 0.05, 1) if t else 1.0
        fresh = rng.integers(0, 256, texture.shape)
        texture = (texture * (1 - blend) + fresh * blend).astype(np.uint8) if t else texture
        video[t] = texture
    rewards = rng.uniform(0, 1, length).astype(np.float32)
    rewards[0] = 0
    return Episode(video, actions, rewards, fps=5.0, source="moving")


@pytest.fixture(scope="module")
def good() -> Episodes:
    return [moving(seed) for seed in range(8)]


def findings(episodes: Episodes, **settings: int) -> dict[str, str]:
    readings = [examine(f"e{number}", episode) for number, episode in enumerate(episodes)]
    return {finding.check: finding.severity for finding in check(readings, **settings)}


def changed(episode: Episode, **fields: Any) -> Episode:
    return dataclasses.replace(episode, **fields)


def test_nothing_in_good_episodes(good: Episodes) -> None:
    assert findings(good) == {}
    assert LAGS[int(lag_curve([examine(str(i), episode) for i, episode in enumerate(good)]).argmax())] == 0


@pytest.mark.parametrize("shift", [-3, -2, -1, 1, 2, 3])
def test_shifted_actions(good: Episodes, shift: int) -> None:
    """Rows moved by `shift`: with 1, actions[t] holds what was done at t - 1, so frames change before their action."""
    episodes = [changed(episode, actions=np.roll(np.asarray(episode.actions), shift, axis=0)) for episode in good]
    expected = {"misaligned actions": "error"} if shift > 0 else {"late answer": "note"}
    assert findings(episodes) == (expected if shift > -3 else {"misaligned actions": "warning"})
    curve = lag_curve([examine(str(i), episode) for i, episode in enumerate(episodes)])
    assert LAGS[int(curve.argmax())] == -shift


def black(episode: Episode) -> Episode:
    video = episode.video.copy()
    video[5] = 0
    return changed(episode, video=video)


def still(episode: Episode) -> Episode:
    return changed(episode, video=np.repeat(episode.video[:1], len(episode), axis=0))


def stuttering(episode: Episode) -> Episode:
    video = episode.video.copy()
    video[7] = video[6]
    return changed(episode, video=video)


def first_constant(episode: Episode) -> Episode:
    actions = np.array(episode.actions)
    actions[:, 1] = 0.25
    return changed(episode, actions=actions)


def saturated(episode: Episode) -> Episode:
    actions = np.clip(np.asarray(episode.actions) * 3, -1, 1)
    return changed(episode, actions=actions)


def in_millimetres(episode: Episode) -> Episode:
    return changed(episode, actions=np.asarray(episode.actions) * np.array([1, 1, 1000], np.float32))


PLANTED: dict[str, tuple[Callable[[Episodes], Episodes], dict[str, str]]] = {
    "black frame": (lambda e: [black(e[0]), *e[1:]], {"flat frames": "error"}),
    "frozen": (lambda e: [still(e[0]), *e[1:]], {"frozen frames": "warning"}),
    "repeated frame": (lambda e: [stuttering(e[0]), *e[1:]], {"repeated frames": "note"}),
    "copy": (lambda e: [*e, e[2]], {"duplicates": "warning"}),
    "overlap": (
        lambda e: [*e, changed(e[2], video=e[2].video[9:], actions=np.asarray(e[2].actions)[9:], rewards=None,
                               terminations=None)],
        {"overlapping episodes": "warning", "rewards": "warning"},
    ),
    "constant dimension": (lambda e: [first_constant(x) for x in e], {"constant actions": "warning"}),
    "clipped": (lambda e: [saturated(x) for x in e], {"clipped actions": "note"}),
    "scales": (lambda e: [in_millimetres(x) for x in e], {"action scales": "warning"}),
    "scales of sources": (
        lambda e: [*e[:4], *(changed(x, actions=np.asarray(x.actions) * 20, source="other") for x in e[4:])],
        {"action scales of sources": "warning"},
    ),
    "no reward ever": (
        lambda e: [changed(x, rewards=np.zeros(len(x), np.float32)) for x in e], {"rewards": "warning"}
    ),
    "rewards of some": (lambda e: [changed(e[0], rewards=None), *e[1:]], {"rewards": "warning"}),
    "actions of some": (lambda e: [changed(e[0], actions=None), *e[1:]], {"action sizes": "warning"}),
    "frame rates": (lambda e: [changed(e[0], fps=30.0), *e[1:]], {"frame rates": "note"}),
    "resolutions": (lambda e: [changed(e[0], video=e[0].video[:, :48].copy()), *e[1:]], {"resolutions": "note"}),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault(good: Episodes, fault: str) -> None:
    plant, expected = PLANTED[fault]
    assert findings(plant(good)) == expected


def test_short_episodes(good: Episodes) -> None:
    assert findings(good, segment_length=50) == {"short episodes": "warning"}
    assert findings(good, segment_length=16, stride=4) == {"short episodes": "note"}


def test_leaks(good: Episodes) -> None:
    train = [examine(f"t{number}", episode) for number, episode in enumerate(good[:6])]
    part = changed(good[7], video=np.concatenate([good[0].video[:8], good[7].video[8:]]))
    held_out = [examine("same", good[3]), examine("part", part), examine("fine", good[6])]
    found = {(finding.severity, finding.keys) for finding in check_leaks(train, held_out)}
    assert found == {("error", ("same",)), ("warning", ("part",))}


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    motion = rng.uniform(size=30)
    found = correlations(motion[:, None] * np.sign(rng.normal(size=(30, 1))), motion)
    assert found[LAGS.index(0)] == pytest.approx(1)
    assert np.abs(np.delete(found, LAGS.index(0))).max() < 0.7


def test_real_recordings(shared: Path, tmp_path: Path) -> None:
    pack(shared / "data" / "metaworld", tmp_path / "all")
    readings, bad = read_set(ShardSet(tmp_path / "all"))
    assert bad == []
    assert len(readings) == 20
    assert {finding.severity for finding in check(readings)} <= {"note"}
    some, _ = read_set(ShardSet(tmp_path / "all"), 3)
    assert [reading.key for reading in some] == [readings[i].key for i in (0, 10, 19)]


# The command


def write(folder: Path, episodes: Episodes) -> Path:
    with ShardSetWriter(folder) as writer:
        for number, episode in enumerate(episodes):
            writer.write(f"e{number}", episode)
    return folder


def test_exit_codes_and_json(
    run: Callable[..., int], good: Episodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", write(tmp_path / "good", good)) == 0
    assert "8 episodes, nothing found" in capsys.readouterr().out
    assert run("doctor", write(tmp_path / "copy", [*good, good[0]])) == 3
    assert "duplicates" in capsys.readouterr().out
    write(tmp_path / "both" / "train", good)
    write(tmp_path / "both" / "heldout", good[1:3])
    assert run("doctor", tmp_path / "both", "--json", tmp_path / "found.json") == 4
    record = json.loads((tmp_path / "found.json").read_text())
    assert [(row["check"], row["keys"]) for row in record["findings"]] == [("leak", ["e0", "e1"])]
    assert run("doctor", "embedded:train", "--against", "embedded:heldout") == 0
    assert "embedded:train: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="--stride must be at least 1, got 0"):
        run("doctor", tmp_path / "good", "--stride", "0")


def test_page(run: Callable[..., int], good: Episodes, tmp_path: Path) -> None:
    folder, page = (
        write(tmp_path / "set", [good[0], changed(good[1], source="<b>x</b>"), good[0]]),
        tmp_path / "page.html",
    )
    assert run("doctor", folder, "--page", page) == 3
    text = page.read_text(encoding="utf-8")
    assert "warning: duplicates" in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text and "<b>x</b>" not in text
    assert text.count("data:image/png;base64,") == 3
    assert text.count("Histogram of ") == 4  # three dimensions and the rewards
    assert "http" not in text and "<script" not in text


def test_a_record_that_cannot_be_read_is_a_finding(run: Callable[..., int], good: Episodes, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", good)
    path, offset, size = ShardSet(folder).place(3)
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 1
    path.write_bytes(data)
    assert run("doctor", folder, "--json", tmp_path / "found.json") == 4
    (row,) = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert (row["check"], row["keys"]) == ("unreadable", ["e3"])
