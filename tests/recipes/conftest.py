"""Fixtures of the recipe tests: synthetic shards and a small recipe over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

EXPECTED = (
    r"ignore:.*isinstance\(treespec, LeafSpec\). is deprecated",  # inside Lightning
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in EXPECTED:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of synthetic shard sets, 32 px with three actions and rewards, and 64 px with four, by resolution."""
    from ivideogpt.data.episode import Episode
    from ivideogpt.data.shards import ShardSetWriter

    folders = {}
    for size, action_dim in ((32, 3), (64, 4)):
        folder = tmp_path_factory.mktemp("shards") / f"px{size}"
        rng = np.random.default_rng(size)
        with ShardSetWriter(folder) as writer:
            for index in range(4):
                video = rng.integers(0, 255, (20, size // 8, size // 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
                actions = rng.uniform(-1, 1, (20, action_dim)).astype(np.float32)
                rewards = np.concatenate([[0], actions[:-1, 0]]).astype(np.float32)
                writer.write(f"noise-{index:03d}", Episode(video, actions, rewards, fps=5.0, source="test/noise"))
        folders[f"px{size}"] = str(folder)
    return folders


@pytest.fixture
def recipe(shards: dict[str, str], tmp_path: Path) -> Callable[..., Path]:
    """``recipe(stages=(...))`` writes a recipe of tiny models and gives its path."""

    def write(stages: tuple[str, ...] = ("tokenizer", "transformer"), **top: Any) -> Path:
        every: dict[str, Any] = {
            "tokenizer": {
                "module": {
                    "class_path": "ivideogpt.training.TokenizerModule",
                    "init_args": {"tokenizer": TOKENIZER, "perceptual_weight": 0.0, "codebook_restart": 2},
                }
            },
            "transformer": {
                "module": {
                    "class_path": "ivideogpt.training.TransformerModule",
                    "init_args": {
                        "tokenizer": {"from": "tokenizer"},
                        "transformer": TRANSFORMER,
                        "reward_head": {"transform": "symlog"},
                        "warmup_updates": 2,
                        "learning_rate": "1e-3",
                    },
                }
            },
            "evaluate": {
                "module": {
                    "class_path": "ivideogpt.training.EvaluationModule",
                    "init_args": {"world_model": {"from": "transformer"}, "horizon": 2, "num_examples": 0},
                },
                "trainer": {"limit_test_batches": 1},
            },
        }
        content: dict[str, Any] = {
            "name": "tiny",
            "seed": 3,
            "output": str(tmp_path / "out"),
            "defaults": {
                "data": {
                    "class_path": "ivideogpt.data.VideoDataModule",
                    "init_args": {
                        "train": shards["px32"], "val": shards["px32"], "segment_length": 4, "context_length": 2,
                        "resolution": 32, "batch_size": 2, "num_workers": 0, "epoch_batches": 5,
                    },
                },
                "trainer": {
                    "accelerator": "cpu", "max_steps": 6, "limit_val_batches": 1, "log_every_n_steps": 2,
                    "check_val_every_n_epoch": None, "val_check_interval": 4,
                    "callbacks": [
                        {
                            "class_path": "ivideogpt.training.checkpoints.Checkpoints",
                            "init_args": {"every_n_updates": 2},
                        }
                    ],
                },
            },
            "stages": {name: every[name] for name in stages},
        }  # fmt: skip
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**content, **top}, sort_keys=False), encoding="utf-8")
        return path

    return write


TOKENIZER = dict(
    resolution=32, block_channels=[8, 32, 32], layers_per_block=1, latent_channels=4, norm_num_groups=4,
    codebook_size=32, dynamics_codebook_size=48, context_length=2, max_attention_resolution=8,
)  # fmt: skip
TRANSFORMER = dict(
    num_layers=2, num_heads=2, embed_dim=32, mlp_dim=48, max_positions=256, action_dim=3, attention_dropout=0.2
)
