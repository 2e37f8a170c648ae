"""Evaluation: hand-made models with known scores, shuffled actions, rewards, a real model, files and the table."""

import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from ivideogpt.metrics import psnr
from ivideogpt.metrics.evaluation import evaluate_rollouts, format_table, pearson, task_of, write_results

CONTEXT, HORIZON, SIZE = 2, 3, 12


class Integrator:
    """A world whose frames are one grey level, the first number of all actions so far; predicted without error."""

    def __init__(self, reward_head: bool = True, takes_actions: bool = True, noise: float = 0.0) -> None:
        self.config = SimpleNamespace(context_length=CONTEXT, action_dim=1 if takes_actions else None)
        self.reward_head = reward_head
        self.noise = noise
        self.calls: list[dict[str, Any]] = []

    def rollout(self, context_frames: Tensor, actions: Tensor | None = None, **settings: Any) -> Any:
        self.calls.append({"actions": actions, **settings})
        samples = settings["num_samples"]
        level = context_frames[:, -1].mean(dim=(1, 2, 3))  # (B,)
        steps = torch.zeros(len(level), settings["horizon"]) if actions is None else actions[:, CONTEXT - 1 :, 0]
        levels = (level[:, None] + steps.cumsum(1)).repeat_interleave(samples, dim=0)
        levels = levels + self.noise * torch.randn(levels.shape, generator=settings["generator"])
        future = levels[:, :, None, None, None].expand(-1, -1, 3, SIZE, SIZE)
        video = torch.cat([context_frames.repeat_interleave(samples, dim=0), future], dim=1)
        return SimpleNamespace(video=video, rewards=2.0 * levels + 1.0 if self.reward_head else None)


def world_clips(seed: int, tasks: list[str], frames: int = CONTEXT + HORIZON) -> dict[str, Any]:
    """A batch of clips of the integrator's world, one a task named."""
    generator = torch.Generator().manual_seed(seed)
    actions = 0.1 * torch.rand(len(tasks), frames, 1, generator=generator)
    levels = 0.2 + torch.cat([torch.zeros(len(tasks), 1), actions[:, :-1, 0].cumsum(1)], dim=1)
    video = levels[:, :, None, None, None].expand(-1, -1, 3, SIZE, SIZE).clone()
    keys = [f"{task}-s{seed}-n000-{index:05d}" for index, task in enumerate(tasks)]
    return {"video": video, "actions": actions, "rewards": levels, "key": keys}


def test_a_perfect_model() -> None:
    batches = [world_clips(0, ["push", "push", "lift"]), world_clips(1, ["push", "lift"])]
    result = evaluate_rollouts(Integrator(), batches, HORIZON, device="cpu", name="integrator", seed=3)
    assert result["model"] == "integrator"
    assert (result["horizon"], result["context_length"], result["seed"]) == (HORIZON, CONTEXT, 3)
    assert set(result["tasks"]) == {"push", "lift"}
    assert [result["tasks"][task]["clips"] for task in ("push", "lift")] == [3, 2]
    overall = result["overall"]
    assert (overall["clips"], overall["episodes"]) == (5, 5)
    assert overall["model"] == pytest.approx({"psnr": 100.0, "ssim": 1.0, "mse": 0.0}, abs=1e-4)
    assert overall["reward"]["pearson_r"] == pytest.approx(1.0)
    assert overall["reward"]["frames"] == 15
    true = torch.cat([batch["rewards"][:, CONTEXT:].flatten() for batch in batches])
    assert overall["reward"]["mse"] == pytest.approx(float((true + 1.0).square().mean()), rel=1e-4)


def test_repeating_the_last_frame_is_measured_per_frame() -> None:
    batch = world_clips(0, ["push", "lift"])
    result = evaluate_rollouts(Integrator(), [batch], HORIZON, device="cpu")
    truth = batch["video"][:, CONTEXT:]
    expected = psnr(batch["video"][:, CONTEXT - 1 : CONTEXT].expand_as(truth), truth)
    assert result["overall"]["curves"]["repeat_last_frame"]["psnr"] == pytest.approx(
        expected.mean(0).tolist(), rel=1e-4
    )
    assert result["tasks"]["push"]["repeat_last_frame"]["psnr"] == pytest.approx(float(expected[0].mean()), rel=1e-4)
    curve = result["overall"]["curves"]["repeat_last_frame"]["mse"]
    assert curve == sorted(curve)  # the world drifts away from the last frame


def test_shuffled_actions_come_from_another_episode_of_the_task() -> None:
    batches = [world_clips(0, ["push", "push", "lift"]), world_clips(1, ["lift", "push"])]
    model = Integrator()
    result = evaluate_rollouts(model, batches, HORIZON, device="cpu")
    own, shuffled = model.calls[0]["actions"], model.calls[1]["actions"]
    assert torch.equal(shuffled[:2], own[[1, 0]])
    assert torch.equal(shuffled[2], own[2])  # the only "lift" so far has nobody to swap with
    later = model.calls[3]["actions"]
    assert torch.equal(later[0], own[2])
    assert any(torch.equal(later[1], donor) for donor in own[:2])
    assert result["tasks"]["push"]["shuffled_actions"]["clips"] == 3
    assert result["tasks"]["lift"]["shuffled_actions"]["clips"] == 1
    following = result["overall"]["shuffled_actions"]
    assert following["clips"] == 4
    assert following["change"]["mse"] > 0 > following["change"]["psnr"]
    assert following["shuffled"]["mse"] == pytest.approx(following["own"]["mse"] + following["change"]["mse"])


def test_own_and_shuffled_actions_share_their_random_numbers() -> None:
    class Deaf(Integrator):
        def rollout(self, context_frames: Tensor, actions: Tensor | None = None, **settings: Any) -> Any:
            return super().rollout(context_frames, None, **settings)

    result = evaluate_rollouts(Deaf(noise=0.05), [world_clips(0, ["push"] * 4)], HORIZON, device="cpu")
    assert result["overall"]["shuffled_actions"]["change"] == {"psnr": 0.0, "ssim": 0.0, "mse": 0.0}
    assert result["overall"]["shuffled_actions"]["mse_ratio"] == 1.0


def test_best_of_several_samples() -> None:
    batches = [world_clips(0, ["push"] * 3)]
    one, many = (
        evaluate_rollouts(Integrator(noise=0.05), batches, HORIZON, device="cpu", num_samples=count)["overall"]
        for count in (1, 8)
    )
    assert many["model"]["psnr"] > one["model"]["psnr"]
    assert many["model"]["mse"] < one["model"]["mse"]
    curve = many["curves"]["model"]["mse"]
    assert sum(curve) / len(curve) > many["model"]["mse"]  # curves are means over samples


def test_the_seed_decides() -> None:
    results = [
        evaluate_rollouts(Integrator(noise=0.05), [world_clips(0, ["push"] * 3)], HORIZON, device="cpu", seed=seed)
        for seed in (1, 1, 2)
    ]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    assert results[0]["overall"]["model"] != results[2]["overall"]["model"]


def test_without_actions_and_rewards() -> None:
    batch = world_clips(0, ["push"] * 2)
    del batch["actions"], batch["rewards"]
    batch["video"] = (batch["video"] * 255).byte()
    result = evaluate_rollouts(Integrator(takes_actions=False), iter([batch]), device="cpu")
    assert result["horizon"] == HORIZON  # all that the clips have
    assert result["overall"]["shuffled_actions"] is None
    assert result["overall"]["reward"] is None


def test_the_source_names_the_task_where_there_is_one() -> None:
    batch = world_clips(0, ["push", "push"]) | {"source": ["metaworld/push-v3", "metaworld/lift-v3"]}
    assert set(evaluate_rollouts(Integrator(), [batch], device="cpu")["tasks"]) == {
        "metaworld/push-v3",
        "metaworld/lift-v3",
    }


@pytest.mark.parametrize(
    ("key", "task"),
    [
        ("plate-slide-s7-n030-00012", "plate-slide"), ("door-lock", "door-lock"), ("bair_000_12", "bair"),
        ("00012", "clips"), ("3-14", "clips"), ("take2", "take2"),
    ],
)  # fmt: skip
def test_task_of(key: str, task: str) -> None:
    assert task_of(key) == task


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no clip to evaluate"):
        evaluate_rollouts(Integrator(), [], HORIZON, device="cpu")
    with pytest.raises(ValueError, match="clips of 5 frames are too short for 2 context frames and a horizon of 9"):
        evaluate_rollouts(Integrator(), [world_clips(0, ["push"])], 9, device="cpu")
    batch = world_clips(0, ["push"])
    del batch["actions"]
    with pytest.raises(ValueError, match="needs actions and the clips have none"):
        evaluate_rollouts(Integrator(), [batch], HORIZON, device="cpu")


def test_pearson() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    assert pearson(x, -3 * x + 7) == pytest.approx(-1.0)
    assert pearson(x, torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(
        float(torch.corrcoef(torch.tensor([[1.0, 2, 4], [1, 3, 2]]))[0, 1])
    )
    assert pearson(x, torch.full((3,), 0.1)) is None
    assert pearson(x[:1], x[:1]) is None


def test_a_real_model(tiny_world_model: Callable[..., Any]) -> None:
    model = tiny_world_model(2, reward=True)
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        "video": torch.rand(3, 6, 3, 32, 32, generator=generator),
        "actions": torch.randn(3, 6, 2, generator=generator),
        "rewards": torch.rand(3, 6, generator=generator),
        "key": ["a-1", "a-2", "b-1"],
    }
    result = evaluate_rollouts(model, [batch], temperature=0)
    assert result["horizon"] == 4
    assert result["overall"]["shuffled_actions"]["clips"] == 2
    assert -1 <= result["overall"]["reward"]["pearson_r"] <= 1
    rolled = model.rollout(batch["video"][:, :2], batch["actions"], horizon=4, temperature=0).video[:, 2:]
    expected = float(psnr(rolled, batch["video"][:, 2:]).mean())
    assert result["overall"]["model"]["psnr"] == pytest.approx(expected, rel=1e-4)
    json.dumps(result, allow_nan=False)


def test_files_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = evaluate_rollouts(Integrator(), [world_clips(0, ["push"] * 2)], HORIZON, device="cpu")
    path = tmp_path / "results.json"
    write_results(result, path)
    assert json.loads(path.read_text()) == result
    with pytest.raises(ValueError, match="JSON"):
        write_results({"psnr": math.nan}, path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_results({"other": 1}, path)
    assert json.loads(path.read_text()) == result
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("tasks", [["push", "push", "lift"], ["push"]])
def test_table(tasks: list[str]) -> None:
    result = evaluate_rollouts(Integrator(), [world_clips(0, tasks)], HORIZON, device="cpu", name="integrator")
    table = format_table(result)
    assert table.row_count == (3 if len(set(tasks)) > 1 else 1)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "integrator: 3 frames from 2" in text
    assert "100.00 / " in text
    assert "1.000" in text
