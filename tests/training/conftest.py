"""Fixtures of the training tests: synthetic shards and a trainer that is quiet and quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer

from ivideogpt.data.datamodule import VideoDataModule
from ivideogpt.data.episode import Episode
from ivideogpt.data.shards import ShardSetWriter

ACTION_DIM = 3


EXPECTED = (
    r"ignore:.*isinstance\(treespec, LeafSpec\). is deprecated",  # inside Lightning
    r"ignore:Found \d+ module\(s\) in eval mode",  # the frozen tokenizer
    r"ignore:.*does not have many workers",
    r"ignore:.*smaller than the logging interval",
    r"ignore:.*is not supported by the model summary",
    r"ignore:This process .* is multi-threaded, use of fork",  # since Python 3.12; processes that set their signals
    r"ignore:You're using the WeightAveraging callback with a model that overrides",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in EXPECTED:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of six episodes of a square that the actions push about, 32 px, with rewards."""
    folder = tmp_path_factory.mktemp("shards") / "train"
    rng = np.random.default_rng(0)
    with ShardSetWriter(folder) as writer:
        for index in range(6):
            video = np.full((10, 32, 32, 3), 40, np.uint8)
            actions = rng.uniform(-1, 1, (10, ACTION_DIM)).astype(np.float32)
            place = np.array([12.0, 12.0])
            for time in range(10):
                y, x = np.clip(place, 0, 24).astype(int)
                video[time, y : y + 8, x : x + 8] = (200, 30 * index, 60)
                place = place + 3 * actions[time, :2]
            rewards = np.concatenate([[0], actions[:-1, 0]]).astype(np.float32)
            writer.write(f"square-{index:03d}", Episode(video, actions, rewards, fps=5.0, source="test/square"))
    return folder


@pytest.fixture
def data(shards: Path) -> Callable[..., VideoDataModule]:
    """``data(**changes)`` gives a data module over the synthetic shards."""

    def build(**changes: Any) -> VideoDataModule:
        settings: dict[str, Any] = dict(
            train=str(shards), val=str(shards), segment_length=4, context_length=2, resolution=32, batch_size=2,
            num_workers=0, augment=False,
        )  # fmt: skip
        return VideoDataModule(**{**settings, **changes})

    return build


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """``trainer(**changes)`` gives a silent CPU trainer that writes to the test's folder."""

    def build(**changes: Any) -> Trainer:
        settings: dict[str, Any] = dict(
            accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=1, default_root_dir=tmp_path,
        )  # fmt: skip
        return Trainer(**{**settings, **changes})

    return build
