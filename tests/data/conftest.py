"""Fixtures of the data tests: small synthetic episodes and sets made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivideogpt.data.cli import add_parser
from ivideogpt.data.episode import Episode
from ivideogpt.data.shards import ShardSetWriter


def synthetic_episode(
    length: int = 20, size: int = 16, action_dim: int | None = 4, seed: int = 0, **fields: Any
) -> Episode:
    """A bright square on noise; the red channel of the first pixel is the frame's number."""
    rng = np.random.default_rng(seed)
    video = np.repeat(rng.integers(0, 80, (1, size, size, 3), dtype=np.uint8), length, axis=0)
    for t in range(length):
        video[t, t % size, :, 1] = 200
        video[t, 0, 0, 0] = t
    actions = None if action_dim is None else rng.uniform(-1, 1, (length, action_dim)).astype(np.float32)
    rewards = rng.uniform(0, 10, length).astype(np.float32)
    rewards[0] = 0
    values: dict[str, Any] = {"rewards": rewards, "source": "synthetic", "licence": "CC0-1.0", "fps": 10.0}
    return Episode(video=video, actions=actions, **(values | fields))


@pytest.fixture
def make_episode() -> Callable[..., Episode]:
    return synthetic_episode


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """`make_set(name, episodes=8, per_shard=3, cameras=(), **episode)` writes a set and gives its folder.

    With cameras there are so many recordings, each with an episode of every camera.
    """

    def make(name: str = "set", episodes: int = 8, per_shard: int = 3, **fields: Any) -> Path:
        folder = tmp_path / name
        lengths = fields.pop("lengths", None)
        cameras = fields.pop("cameras", ())
        with ShardSetWriter(folder, shard_episodes=per_shard, command="made by a test") as writer:
            for i in range(episodes):
                length, key = lengths[i % len(lengths)] if lengths else 12 + i, f"{name}-{i:03d}"
                views = [(f"{key}-{view}", {"camera": view, "metadata": {"recording": key}}) for view in cameras]
                for view_key, about in views or [(key, {})]:
                    writer.write(view_key, synthetic_episode(length, seed=i, **fields, **about))
        return folder

    return make


@pytest.fixture
def run() -> Callable[..., int]:
    """`run("pack", folder, ...)` is `ivideogpt data pack folder ...`, with its errors as they are raised."""

    def call(*words: str | Path) -> int:
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers())
        args = parser.parse_args(["data", *map(str, words)])
        return args.func(args)

    return call


@pytest.fixture(autouse=True)
def _simulator(request: pytest.FixtureRequest) -> None:
    """Skips tests marked `simulator` where there is no simulator or nothing to render with."""
    if request.node.get_closest_marker("simulator") is None:
        return
    pytest.importorskip("metaworld")
    from ivideogpt.data.sources.rendering import choose_gl

    try:
        choose_gl()
    except OSError as error:
        pytest.skip(str(error))
