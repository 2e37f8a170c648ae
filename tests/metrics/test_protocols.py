"""Protocols: what the presets fix, what a change makes of them, and which models and recordings they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ivideogpt.data.packing import pack
from ivideogpt.metrics.clips import ClipSet
from ivideogpt.metrics.protocols import PROTOCOLS, EvaluationProtocol, differing_fields, protocol_named


def config(context_length: int = 2, resolution: int = 64, action_dim: int | None = 4) -> Any:
    tokenizer = SimpleNamespace(resolution=resolution)
    return SimpleNamespace(context_length=context_length, action_dim=action_dim, tokenizer=tokenizer)


# name, context, horizon, resolution, samples, actions: the published ones after the paper's section on evaluation
@pytest.mark.parametrize(
    ("name", "context", "horizon", "px", "samples", "actions"),
    [
        ("bair", 1, 15, 64, 100, True), ("bair-action-free", 1, 15, 64, 100, False),
        ("robonet-64", 2, 10, 64, 100, True), ("robonet-256", 2, 10, 256, 100, True),
    ],
)  # fmt: skip
def test_published_presets(name: str, context: int, horizon: int, px: int, samples: int, actions: bool) -> None:
    protocol = PROTOCOLS[name]
    assert (protocol.context_length, protocol.horizon, protocol.resolution) == (context, horizon, px)
    assert (protocol.num_samples, protocol.temperature, protocol.top_k) == (samples, 1.0, 100)
    assert (protocol.videos, protocol.runs, protocol.first_frame, protocol.actions) == (256, 3, "first", actions)
    assert (protocol.lpips, protocol.fvd) == ("vgg", "i3d")
    fits = config(context, px, 4 if actions else None)
    assert protocol.settled(fits) == protocol


def test_all_presets_are_there_and_say_what_they_are() -> None:
    assert list(PROTOCOLS) == [
        "bair", "bair-action-free", "robonet-64", "robonet-256", "vp2", "ucf101-class", "craftbench", "custom",
    ]  # fmt: skip
    for protocol in PROTOCOLS.values():
        text = " ".join(f"{name} {value}" for name, value in protocol.rows())
        for word in ("split", "predicted", "px", "runs", "LPIPS", "FVD", "SSIM", "[0, 1]", "source"):
            assert word in text, (protocol.name, word)
    assert PROTOCOLS["ucf101-class"].frames == 17
    assert set(PROTOCOLS["craftbench"].metrics) == {"ssim", "lpips"}


def test_a_change_makes_a_custom_protocol_that_remembers_its_base() -> None:
    changed = PROTOCOLS["bair"].changed(num_samples=10)
    assert (changed.name, changed.base, changed.num_samples) == ("custom", "bair", 10)
    assert changed.changed(runs=1).base == "bair"
    assert PROTOCOLS["bair"].changed(num_samples=100) is PROTOCOLS["bair"]
    assert EvaluationProtocol().changed(clips_per_episode=3).first_frame == "even"
    assert EvaluationProtocol().changed(horizon=4).base is None


def test_differing_fields_are_named() -> None:
    first, second = (EvaluationProtocol(horizon=horizon).to_json() for horizon in (10, 15))
    assert differing_fields(first, second) == ["horizon: 10 against 15"]
    assert differing_fields(first, first) == []
    second["horizon"], second["new_field"] = 10, 4
    assert differing_fields(first, second) == ["new_field: None against 4"]
    del first["strides"], second["new_field"]  # a file of a version that did not have it
    assert differing_fields(first, second) == []


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("bair", {"context_length": 1, "action_dim": None}, "gives the model its recorded actions, and this model takes"
         " none; choose --protocol bair-action-free"),
        ("bair-action-free", {"context_length": 1}, "is one without actions, and this model needs actions of width 4;"
         " choose --protocol bair or"),
        ("bair", {}, "has context_length 1, this model has 2"),
        ("robonet-256", {}, "has resolution 256, this model has 64"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(name: str, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PROTOCOLS[name].settled(config(**model))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="no protocol 'biar'; did you mean 'bair'"):
        protocol_named("biar")
    for changes in ({"horizon": 0}, {"runs": True}, {"temperature": float("nan")}, {"num_samples": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} of a protocol must be"):
            EvaluationProtocol().changed(**changes)


# Recordings


@pytest.fixture
def recordings(tmp_path: Path) -> Callable[..., str]:
    """``recordings(frames=..., size=..., action=...)`` packs three episodes."""

    def make(frames: int = 12, size: tuple[int, int] = (64, 64), action: bool = True) -> str:
        folder = tmp_path / f"{frames}-{size[0]}-{action}"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for number in range(3):
            image = rng.integers(0, 255, (frames + number, *size, 3)).astype(np.uint8)
            actions: Any = {"action": rng.normal(size=(frames + number, 4)).astype(np.float32)} if action else {}
            np.savez(folder / f"{number}.npz", image=image, **actions)
        pack(folder, folder / "packed", format="npz")
        return str(folder / "packed")

    return make


def opened(source: str, **changes: Any) -> ClipSet:
    return ClipSet.open(source, EvaluationProtocol().changed(**changes).settled(config()))


def test_clips_are_of_the_protocols_shape(recordings: Callable[..., str]) -> None:
    clips = opened(recordings(size=(80, 96)), horizon=5, clips_per_episode=2)
    assert len(clips) == 6
    batch = clips.batch([0, 1, 5])
    assert tuple(batch["video"].shape) == (3, 7, 3, 64, 64)
    assert tuple(batch["actions"].shape) == (3, 7, 4)
    assert [clips.place(number)[2] for number in (0, 1)] == [0, 5] == batch["start"][:2]
    assert clips.notes == ["recordings of 80 x 96 pixels were cropped and resized to 64 x 64"]
    assert [len(digest) for shards in clips.data().values() for digest in shards.values()] == [64]


def test_fewer_videos_are_the_same_ones_every_time(recordings: Callable[..., str]) -> None:
    source = recordings()
    few, again = (opened(source, clips_per_episode=3, videos=4) for _ in range(2))
    assert few.positions == again.positions == sorted(set(few.positions))
    assert len(few) == 4
    clips = opened(source, clips_per_episode=3)
    assert clips.at_most(9) is clips
    assert (len(clips.at_most(4)), clips.at_most(4).protocol.videos) == (4, 4)


def test_recordings_that_do_not_fit(recordings: Callable[..., str]) -> None:
    source = recordings()
    with pytest.raises(ValueError, match=r"1 of 3 episodes are shorter than the 13 frames .* \(12 frames\)"):
        opened(source, horizon=11)
    with pytest.raises(ValueError, match=r"3 of 3 episodes are shorter than the 23 frames .* stride 2"):
        opened(source, stride=2)
    with pytest.raises(ValueError, match=r"about 256 clips, and there are 3; give --videos 3, which makes it a custom"):
        opened(source, videos=256)
    with pytest.raises(ValueError, match=r"have 32 x 32 pixels and the protocol 64 x 64: frames are never enlarged"):
        opened(recordings(size=(32, 32)))
    with pytest.raises(ValueError, match="its recorded actions, and 3 episodes have none"):
        opened(recordings(action=False))
