"""Arguments of a rollout that cannot be: one clear error each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.rollout import rollout

Build = Callable[..., Any]
ACTION_DIM = 3


def clip(batch: int = 2, frames: int = 2) -> Tensor:
    return torch.rand(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def some_actions(batch: int = 2, frames: int = 6) -> Tensor:
    return torch.randn(batch, frames, ACTION_DIM, generator=torch.Generator().manual_seed(0))


def bad(changes: dict[str, Any], message: str) -> Any:
    return pytest.param(changes, message, id=message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        bad({"context_frames": torch.rand(2, 3, 32, 32)}, r"\(B, T, C, H, W\), got \(2, 3, 32, 32\)"),
        bad({"context_frames": torch.rand(1, 2, 3, 64, 64)}, r"\(3, 32, 32\) for this model, got \(3, 64, 64\)"),
        bad({"context_frames": torch.rand(1, 2, 1, 32, 32)}, r"got \(1, 32, 32\)"),
        bad({"context_frames": torch.rand(0, 2, 3, 32, 32)}, "no clip"),
        bad({"context_frames": clip(frames=1)}, "takes 2 context frames, got 1"),
        bad({"context_frames": clip(frames=3)}, "takes 2 context frames, got 3"),
        bad({"context_frames": (clip() * 255).byte()}, "torch.uint8: divide"),
        bad({"context_frames": clip() * 255}, r"\[0, 1\], got values from"),
        bad({"context_frames": clip() * 2 - 1}, r"\[0, 1\], got values from -"),
        bad({"context_frames": clip() * float("nan")}, "from nan"),
        bad({"context_frames": clip().numpy()}, "must be a tensor"),
        bad({"actions": None}, "needs actions of width 3, got None"),
        bad({"actions": some_actions()[..., :2]}, r"shape \(2, T, 3\).*got \(2, 6, 2\)"),
        bad({"actions": some_actions(batch=3)}, r"shape \(2, T, 3\).*got \(3, 6, 3\)"),
        bad({"actions": some_actions()[0]}, r"got \(6, 3\)"),
        bad({"actions": some_actions() * float("nan")}, "finite, got nan"),
        bad({"actions": some_actions() * float("inf")}, "finite, got -?inf"),
        bad({"actions": some_actions(frames=4)}, "needs at least 5 actions.*got 4"),
        bad({"actions": some_actions(frames=2), "horizon": None}, "horizon must be an integer >= 1, got 0"),
        bad({"horizon": 0}, "horizon must be an integer >= 1, got 0"),
        bad({"horizon": 2.5}, "got 2.5"),
        bad({"horizon": 26, "actions": some_actions(frames=40)}, "256 positions, which hold 25 future frames"),
        bad({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        bad({"temperature": -0.5}, "temperature.*-0.5"),
        bad({"temperature": None}, "temperature.*None"),
        bad({"speculation": True}, "speculation must be a Speculation or None, got True"),
        bad({"generator": 5}, "generator must be a torch.Generator.*got 5"),
        bad({"generator": [None, None]}, "holds torch.Generators, got None"),
        bad({"top_k": 0}, "top_k.*0"),
    ],
)
def test_bad_input(tiny_world_model: Build, changes: dict[str, Any], message: str) -> None:
    model = tiny_world_model(ACTION_DIM)
    arguments: dict[str, Any] = {"context_frames": clip(), "actions": some_actions(), "horizon": 4} | changes
    with pytest.raises(ValueError, match=message):
        rollout(model.tokenizer, model.transformer, None, **arguments)


def test_actions_for_an_action_free_model(tiny_world_model: Build) -> None:
    with pytest.raises(ValueError, match="takes no actions"):
        tiny_world_model().rollout(clip(), some_actions(), horizon=2)


def test_unknown_frame_precision(tiny_world_model: Build) -> None:
    with pytest.raises(ValueError, match="frame_precision must be float32, bfloat16 or None, got 'int8'"):
        tiny_world_model().rollout(clip(), horizon=2, frame_precision="int8")


def test_generator_on_another_device(tiny_world_model: Build) -> None:
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="generator lives on cuda, the model on cpu"):
        tiny_world_model().rollout(clip(), horizon=2, generator=Elsewhere())
