"""Evaluation: hand-made models with known scores, shuffled actions, rewards, seeds, a real model, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt import cli
from ivideogpt.metrics import mse, psnr, ssim
from ivideogpt.metrics.clips import ClipSet
from ivideogpt.metrics.evaluation import evaluate
from ivideogpt.metrics.judges import Judges, judges_for
from ivideogpt.metrics.networks import random_network
from ivideogpt.metrics.protocols import EvaluationProtocol
from tests.metrics.conftest import CONTEXT, HORIZON, Integrator, MemoryClips

Measured = Callable[..., dict[str, Any]]


def test_a_perfect_model(measured: Measured) -> None:
    clips = MemoryClips(["push", "push", "lift", "push", "lift"])
    result = measured(Integrator(), clips, {"name": "integrator", "seed": 3}, runs=2)
    assert (result["model"], result["seed"]) == ("integrator", 3)
    assert result["protocol"]["horizon"] == HORIZON
    assert result["protocol"]["context_length"] == CONTEXT
    assert {task: entry["clips"] for task, entry in result["tasks"].items()} == {"push": 3, "lift": 2}
    overall = result["overall"]
    assert (overall["clips"], overall["episodes"]) == (5, 5)
    assert overall["model"] == pytest.approx({"psnr": 100.0, "ssim": 1.0, "mse": 0.0}, abs=1e-4)
    assert overall["std_over_runs"] == pytest.approx({"psnr": 0.0, "ssim": 0.0, "mse": 0.0}, abs=1e-6)
    assert overall["reward"]["pearson_r"] == pytest.approx(1.0)
    assert overall["reward"]["frames"] == 15
    true = clips.columns["rewards"][:, CONTEXT:]
    assert overall["reward"]["mse"] == pytest.approx(float((true + 1.0).square().mean()), rel=1e-4)
    assert [row["key"] for row in result["videos"]] == [f"episode-{number}" for number in range(5)]
    assert all(len(row["best"]["psnr"]) == 2 for row in result["videos"])


def test_repeating_the_last_frame_is_measured_per_frame(measured: Measured) -> None:
    clips = MemoryClips(["push", "lift"])
    result = measured(Integrator(), clips)
    video = clips.columns["video"]
    truth = video[:, CONTEXT:]
    expected = psnr(video[:, CONTEXT - 1 : CONTEXT].expand_as(truth), truth)
    curves = result["overall"]["curves"]["repeat_last_frame"]
    assert curves["psnr"] == pytest.approx(expected.mean(0).tolist(), rel=1e-4)
    assert result["tasks"]["push"]["repeat_last_frame"]["psnr"] == pytest.approx(float(expected[0].mean()), rel=1e-4)
    assert curves["mse"] == sorted(curves["mse"])  # the world drifts away from the last frame


def test_shuffled_actions_come_from_another_episode_of_the_source(measured: Measured) -> None:
    clips = MemoryClips(["push", "push", "lift", "push"])
    model = Integrator()
    result = measured(model, clips)
    own, shuffled = model.calls[0]["actions"], model.calls[1]["actions"]
    for row in (0, 1, 3):
        assert any(torch.equal(shuffled[row], own[other]) for other in {0, 1, 3} - {row})
    assert torch.equal(shuffled[2], own[2])  # the only "lift" has nobody to swap with
    assert result["tasks"]["push"]["shuffled_actions"]["clips"] == 3
    assert result["tasks"]["lift"]["shuffled_actions"] is None
    following = result["overall"]["shuffled_actions"]
    assert following["clips"] == 3
    assert following["change"]["mse"] > 0 > following["change"]["psnr"]
    assert following["shuffled"]["mse"] == pytest.approx(following["own"]["mse"] + following["change"]["mse"])
    low, high = following["change_interval"]["psnr"]
    assert low <= following["change"]["psnr"] <= high < 0


def test_own_and_shuffled_actions_share_their_random_numbers(measured: Measured) -> None:
    class Deaf(Integrator):
        def rollout(self, context_frames: Tensor, actions: Tensor | None = None, **settings: Any) -> Any:
            return super().rollout(context_frames, None, **settings)

    result = measured(Deaf(noise=0.04), MemoryClips(["push"] * 4), num_samples=3, shuffled_samples=2)
    assert result["overall"]["shuffled_actions"]["change"] == pytest.approx({"psnr": 0.0, "ssim": 0.0, "mse": 0.0})
    assert result["overall"]["shuffled_actions"]["mse_ratio"] == pytest.approx(1.0)


def test_best_and_mean_of_several_samples(measured: Measured) -> None:
    one, many = (
        measured(Integrator(noise=0.04), MemoryClips(["push"] * 3), num_samples=count)["overall"] for count in (1, 8)
    )
    assert many["model"]["psnr"] > one["model"]["psnr"]
    assert many["model"]["mse"] < one["model"]["mse"] == pytest.approx(one["mean_of_samples"]["mse"])
    curve = many["curves"]["model"]["mse"]
    assert sum(curve) / len(curve) == pytest.approx(many["mean_of_samples"]["mse"])  # curves are means over samples
    assert many["mean_of_samples"]["mse"] > many["model"]["mse"]


def test_every_device_computes_the_same(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames in float32, without TF32, and random numbers of the CPU; a model in bfloat16 decodes in what it likes."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = conv.fp32_precision, matmul.fp32_precision
    seen: list[tuple[str, str]] = []

    class Watched(Integrator):
        dtype = torch.float32

        def rollout(self, context_frames: Tensor, actions: Tensor | None = None, **settings: Any) -> Any:
            seen.append((conv.fp32_precision, matmul.fp32_precision))
            return super().rollout(context_frames, actions, **settings)

        def parameters(self) -> Any:
            return iter([torch.zeros(1, dtype=self.dtype)])

    for dtype, precision in ((torch.float32, "float32"), (torch.bfloat16, None)):
        model = Watched()
        model.dtype = dtype
        measured(model, MemoryClips(["push"] * 2))
        assert {call["frame_precision"] for call in model.calls} == {precision}
        assert {one.device.type for call in model.calls for one in call["generator"]} == {"cpu"}
    assert set(seen) == {("ieee", "ieee")}
    assert (conv.fp32_precision, matmul.fp32_precision) == before


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how it was computed."""
    return {name: result[name] for name in ("tasks", "overall", "videos")}


def test_the_seed_decides_and_runs_differ(measured: Measured) -> None:
    clips = MemoryClips(["push"] * 3)
    first, again, other = (
        measured(Integrator(noise=0.04), clips, {"seed": seed}, runs=3, num_samples=2) for seed in (1, 1, 2)
    )
    assert numbers(first) == numbers(again)
    assert first["overall"]["model"] != other["overall"]["model"]
    runs = first["overall"]["runs"]["psnr"]
    assert len(set(runs)) == 3
    assert first["overall"]["model"]["psnr"] == pytest.approx(sum(runs) / 3)
    assert first["overall"]["std_over_runs"]["psnr"] == pytest.approx(float(torch.tensor(runs).std()), rel=1e-5)
    low, high = first["overall"]["interval"]["psnr"]
    assert low < first["overall"]["model"]["psnr"] < high


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_the_batch_size_changes_no_random_number(batch_size: int, measured: Measured) -> None:
    clips = MemoryClips(["push", "lift", "push", "push", "lift"])
    given = measured(Integrator(noise=0.04), clips, {"batch_size": batch_size}, num_samples=4, runs=2)
    usual = measured(Integrator(noise=0.04), clips, num_samples=4, runs=2)
    assert given["overall"]["runs"]["mse"] == pytest.approx(usual["overall"]["runs"]["mse"], rel=1e-5)
    for ours, theirs in zip(given["videos"], usual["videos"], strict=True):
        assert ours["best"]["psnr"] == pytest.approx(theirs["best"]["psnr"], rel=1e-5)


def test_no_more_samples_than_the_batch_size_are_rolled_out_at_once(measured: Measured) -> None:
    model = Integrator(noise=0.04)
    measured(model, MemoryClips(["push"] * 2), {"batch_size": 8}, num_samples=20)
    assert {len(call["generator"]) for call in model.calls} == {8, 4, 1}  # chunks, the rest, shuffled actions


def test_without_actions_and_rewards(measured: Measured) -> None:
    clips = MemoryClips(["push"] * 2)
    del clips.columns["actions"], clips.columns["rewards"]
    clips.columns["video"] = (clips.columns["video"] * 255).byte()
    result = measured(Integrator(takes_actions=False), clips)
    assert result["protocol"]["actions"] is False
    assert result["overall"]["shuffled_actions"] is None
    assert result["overall"]["reward"] is None


def test_argmax_needs_one_run(measured: Measured) -> None:
    result = measured(Integrator(), MemoryClips(["push"]), temperature=0.0, num_samples=5, runs=3)
    assert (result["protocol"]["runs"], result["protocol"]["num_samples"]) == (1, 1)
    assert result["overall"]["std_over_runs"] == {"psnr": None, "ssim": None, "mse": None}
    assert any("argmax" in note for note in result["notes"])


def test_a_real_model(tiny_world_model: Callable[..., Any]) -> None:
    model = tiny_world_model(4, reward=True)
    protocol = EvaluationProtocol().changed(horizon=4, temperature=0.0, videos=6).settled(model.config)
    clips = ClipSet.open("embedded:heldout", protocol)
    assert clips.notes == ["recordings of 64 x 64 pixels were cropped and resized to 32 x 32"]
    result = evaluate(model, clips, protocol)
    assert result is not None
    batch = clips.batch(range(6))
    video = batch["video"].float() / 255
    rolled = model.rollout(video[:, :2], batch["actions"], horizon=4, temperature=0).video[:, 2:]
    expected = float(psnr(rolled, video[:, 2:]).mean())
    assert result["overall"]["model"]["psnr"] == pytest.approx(expected, rel=1e-4)
    assert -1 <= result["overall"]["reward"]["pearson_r"] <= 1
    tokens = result["overall"]["tokens"]
    assert tokens["perplexity"] > 1
    assert 1 <= tokens["dynamics_entries_used"] <= 48
    assert len(result["hashes"]["model"]) == 64
    json.dumps(result, allow_nan=False)


# Bad input


def test_no_clip_and_no_actions(measured: Measured) -> None:
    with pytest.raises(ValueError, match="there is no clip to evaluate"):
        measured(Integrator(), MemoryClips([]))
    clips = MemoryClips(["push"])
    del clips.columns["actions"]
    with pytest.raises(ValueError, match="needs actions and the clips have none"):
        measured(Integrator(), clips)
    clips.columns["actions"] = torch.zeros(1, 5, 3)
    with pytest.raises(ValueError, match="takes actions of 1 numbers, the clips have 3"):
        measured(Integrator(), clips)


def test_short_clips(measured: Measured) -> None:
    with pytest.raises(ValueError, match="clips of 5 frames are too short for 2 context frames and a horizon of 9"):
        measured(Integrator(), MemoryClips(["push"]), horizon=9)


def test_frames_that_are_not_finite(measured: Measured) -> None:
    clips = MemoryClips(["push", "push"])
    clips.columns["video"][1, 3] = float("nan")
    with pytest.raises(ValueError, match="recorded frames hold values that are not finite"):
        measured(Integrator(), clips)

    class Broken(Integrator):
        def rollout(self, context_frames: Tensor, actions: Tensor | None = None, **settings: Any) -> Any:
            found = super().rollout(context_frames, actions, **settings)
            found.video[1] = float("inf")
            return found

    with pytest.raises(ValueError, match="frames that are not finite .* for episode 'episode-1', run 0"):
        measured(Broken(), MemoryClips(["push", "push"]))


def test_clips_that_do_not_move_are_counted(measured: Measured) -> None:
    clips = MemoryClips(["push", "push", "push"])
    clips.columns["actions"][1] = 0
    clips.columns["video"][1] = 0.5
    result = measured(Integrator(), clips)
    assert any(note.startswith("1 of 3 clips do not move at all") for note in result["notes"])
    assert result["videos"][1]["repeat_last_frame"]["psnr"] == 100.0
    assert result["overall"]["model"]["psnr"] == pytest.approx(100.0)


def test_several_processes_need_a_journal(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 0, get_world_size=lambda: 2)
    monkeypatch.setattr("ivideogpt.metrics.evaluation.dist", group)
    with pytest.raises(ValueError, match="give --out FILE"):
        measured(Integrator(), MemoryClips(["push"]))


def test_a_single_video_has_no_covariance(measured: Measured) -> None:
    judges = Judges({"psnr": psnr, "ssim": ssim, "mse": mse}, features=random_network(4), hashes={"fvd": "0" * 64})
    one = measured(Integrator(), MemoryClips(["push"]), {"judges": judges})
    assert one["overall"]["distance_of_other_features"] is None
    assert any("needs at least 2 real" in note and "full rank it takes 5" in note for note in one["notes"])
    few = measured(Integrator(), MemoryClips(["push"] * 3), {"judges": judges})
    assert few["overall"]["distance_of_other_features"]["value"] >= 0
    (needs, _, chance) = (note for note in few["notes"] if "Frechet distance of random features, not FVD" in note)
    assert "3 real videos are too few for a covariance of 4 features, which needs 5" in needs
    assert "videos of the same distribution would score about" in chance
    assert "fvd" not in few["overall"]["model"]


def test_networks_that_are_missing_are_said_and_the_rest_is_measured(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("IVIDEOGPT_NETWORKS", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    judges = judges_for(EvaluationProtocol())
    result = measured(Integrator(), MemoryClips(["push"] * 3), {"judges": judges})
    assert list(result["missing"]) == ["lpips", "fvd"]
    assert "hf download" in result["missing"]["fvd"] and "SHA-256" in result["missing"]["fvd"]
    assert set(result["overall"]["model"]) == {"psnr", "ssim", "mse"}
    assert result["hashes"]["networks"] == {}
    assert list(judges_for(EvaluationProtocol(metrics=("ssim",), fvd=None)).missing) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocol", "bair"], "the protocol 'bair' has context_length 1, this model has 2"),
        (["--protocol", "bair-action-free"], "is one without actions, and this model needs actions of width 4"),
        (["--protocol", "robonet"], "no protocol 'robonet'; did you mean 'robonet-"),
        (["--protocol", "robonet-64"], "about 256 clips, and there are 16; give --videos 16"),
        (["--horizon", "40"], "episodes are shorter than the 42 frames"),
        (["--out", "."], "--out .: this is a folder; name a file"),
    ],
)
def test_the_command_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--model", "ivideogpt-metaworld-nano", "--data", "embedded:heldout", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
