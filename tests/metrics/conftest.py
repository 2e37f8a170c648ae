"""A world that can be predicted without error, clips of it in memory, and an evaluation of both in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.metrics.evaluation import evaluate
from ivideogpt.metrics.protocols import EvaluationProtocol

CONTEXT, HORIZON, SIZE = 2, 3, 12


class Integrator:
    """A world whose frames are one grey level, the first number of all actions so far; predicted without error."""

    device = torch.device("cpu")

    def __init__(self, rewards: bool = True, takes_actions: bool = True, noise: float = 0.0) -> None:
        self.config = SimpleNamespace(
            context_length=CONTEXT, action_dim=1 if takes_actions else None, tokenizer=SimpleNamespace(resolution=SIZE)
        )
        self.rewards = rewards
        self.noise = noise
        self.calls: list[dict[str, Any]] = []

    def rollout(self, context_frames: Tensor, actions: Tensor | None = None, **settings: Any) -> Any:
        self.calls.append({"actions": actions, **settings})
        samples = settings["num_samples"]
        level = context_frames[:, -1].mean(dim=(1, 2, 3))  # (B,)
        steps = torch.zeros(len(level), settings["horizon"]) if actions is None else actions[:, CONTEXT - 1 :, 0]
        levels = (level[:, None] + steps.cumsum(1)).repeat_interleave(samples, dim=0)
        chance = torch.stack([torch.randn(settings["horizon"], generator=one) for one in settings["generator"]])
        levels = levels + self.noise * chance
        future = levels[:, :, None, None, None].expand(-1, -1, 3, SIZE, SIZE)
        video = torch.cat([context_frames.repeat_interleave(samples, dim=0), future], dim=1)
        return SimpleNamespace(video=video, rewards=2.0 * levels + 1.0 if self.rewards else None)


class MemoryClips:
    """Clips of the integrator's world, one a source named."""

    def __init__(self, sources: Sequence[str], seed: int = 0, frames: int = CONTEXT + HORIZON) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = len(sources)
        actions = 0.1 * torch.rand(count, frames, 1, generator=generator)
        levels = 0.2 + torch.cat([torch.zeros(count, 1), actions[:, :-1, 0].cumsum(1)], dim=1)
        video = levels[:, :, None, None, None].expand(-1, -1, 3, SIZE, SIZE).clone()
        self.columns: dict[str, Tensor] = {"video": video, "actions": actions, "rewards": levels}
        self.sources = list(sources)
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.sources)

    def place(self, number: int) -> tuple[str, str, int]:
        return f"episode-{number}", self.sources[number], 0

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        rows = list(numbers)
        return {name: column[rows] for name, column in self.columns.items()} | {
            "key": [self.place(row)[0] for row in rows]
        }

    def data(self) -> dict[str, Any]:
        return {"memory": {"sum": str(float(self.columns["video"].sum()))}}


@pytest.fixture
def measured() -> Callable[..., dict[str, Any]]:
    """``measured(model, clips, **changes of the protocol)`` is the result; one run unless another number is given."""

    def run(model: Any, clips: Any, options: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        protocol = EvaluationProtocol().changed(**{"horizon": HORIZON, "runs": 1, **changes}).settled(model.config)
        result = evaluate(model, clips, protocol, **(options or {}))
        assert result is not None
        return result

    return run
