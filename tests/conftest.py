"""Fixtures of all tests: reference data that lies beside the repository, and tiny random world models."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from ivideogpt.config import WorldModelConfig
    from ivideogpt.world_model import WorldModel


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference tensors and real recordings: ``$IVIDEOGPT_SHARED``, or ``shared`` beside the repository."""
    folder = Path(os.environ.get("IVIDEOGPT_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference data at {folder}: set IVIDEOGPT_SHARED to the folder that holds golden/ and data/")
    return folder


@dataclass
class Golden:
    """A checkpoint in the published layout, and what the original implementation computes with it."""

    folder: Path
    tensors: dict[str, torch.Tensor]

    @property
    def video(self) -> torch.Tensor:
        """Input (B, T, C, H, W), float in [0, 1]."""
        return self.tensors["pixels"].float() / 255


@pytest.fixture(scope="session")
def golden(shared: Path) -> Callable[[str], Golden]:
    """``golden(name)`` gives the recorded checkpoint ``name``."""
    from safetensors.torch import load_file

    def load(name: str) -> Golden:
        return Golden(shared / "golden" / name, load_file(shared / "golden" / name / "golden.safetensors"))

    return load


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., WorldModelConfig]:
    """Smallest world model configuration that has every part: 32 px, 8 x 8 grid, 64 + 4 tokens a frame."""

    def build(action_dim: int | None = None, reward: bool = False, **tokenizer: Any) -> WorldModelConfig:
        from ivideogpt.config import RewardHeadConfig, TokenizerConfig, TransformerConfig, WorldModelConfig

        fields: dict[str, Any] = dict(
            resolution=32, block_channels=(8, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=4,
            codebook_size=32, dynamics_codebook_size=48, patch_size=4, max_attention_resolution=8, context_length=2,
        )  # fmt: skip
        tokens = TokenizerConfig(**{**fields, **tokenizer})
        transformer = TransformerConfig(
            vocab_size=tokens.vocab_size, num_layers=2, num_heads=2, embed_dim=32, mlp_dim=48, max_positions=256,
            action_dim=action_dim,
        )  # fmt: skip
        return WorldModelConfig(tokens, transformer, RewardHeadConfig(32) if reward else None)

    return build


@pytest.fixture(scope="session")
def tiny_world_model(tiny_config: Callable[..., WorldModelConfig]) -> Callable[..., WorldModel]:
    """``tiny_world_model(action_dim=None, reward=False, seed=0, ...)`` gives a random world model in eval mode."""

    def build(action_dim: int | None = None, reward: bool = False, seed: int = 0, **tokenizer: Any) -> WorldModel:
        from ivideogpt.world_model import WorldModel

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = WorldModel(tiny_config(action_dim, reward, **tokenizer))
            for parameter in model.parameters():  # the zero-initialised action layer would hide mistakes
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return build


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Two threads unless the environment says otherwise: float32 sums do not depend on the number of cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
