"""Mistakes of any stage are found before the first update of the first one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import ivideogpt
from ivideogpt import cli, recipes
from ivideogpt.metrics import networks


def refused(path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run of ``path`` ends with; no stage has begun."""
    capsys.readouterr()
    assert cli.main(["run", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert not list((path.parent / "out").glob("*/stage.json")) and not list((path.parent / "out").glob("*/*/*.ckpt"))
    return error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "transformer.module.transformer.action_dim=7",
            "stages.transformer: the model's action_dim is 7, that of the data is 3; change one of the two: "
            "transformer.module.transformer.action_dim=3 gives it a fresh action layer",
        ),
        ("transformer.data.resolution=64", "stages.transformer: the model's resolution is 32, that of the data is 64"),
        ("transformer.data.segment_length=12", "a clip of 12 frames takes"),
        (
            "transformer.data.use_rewards=false",
            "stages.transformer: the model has a reward head and the data have no rewards; leave it out: "
            "transformer.module.reward_head=null",
        ),
        ("transformer.data.use_actions=false", "transformer.module.transformer.action_dim=null drops the action layer"),
        ("transformer.module.action_warmup_updates=-3", "stages.transformer.module: action_warmup_updates must not be"),
        ("evaluate.module.horizon=100", "stages.evaluate: 4 of 4 episodes are shorter than the 102 frames"),
        ("evaluate.data.context_length=1", "stages.evaluate: the model's context_length is 2, that of the data is 1"),
        ("evaluate.module.world_model.from=tokenizer", "'tokenizer' makes a tokenizer only, not a world_model"),
        ("tokenizer.module.tokenizer.context_length=1", "stages.tokenizer: the model's context_length is 1"),
    ],
)
def test_a_mistake_in_a_late_stage_costs_no_early_one(
    recipe: Any, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(stages=("tokenizer", "transformer", "evaluate"), seed=0)
    words = [change]
    if "segment_length" in change:
        words.append("transformer.module.transformer.max_positions=150")
    assert message in refused(path, words, capsys)


def test_statistics_and_spaces_of_actions_are_looked_for_first(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["transformer.module.transformer.action_dim=null", "transformer.data.pad_actions=true"]
    error = refused(recipe(), [*words, "transformer.module.action_spaces={test/noise: 2}"], capsys)
    assert "stages.transformer: the action space 'test/noise' has size 2, 'test/noise' has 3" in error


def test_a_large_model_is_tried_in_no_time(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["transformer.module.transformer.num_layers=400", "transformer.module.transformer.embed_dim=8192"]
    words += ["transformer.module.transformer.num_heads=64", "transformer.module.transformer.mlp_dim=32768"]
    begin = time.monotonic()  # 400 billion weights
    refused(recipe(), [*words, "transformer.data.resolution=64"], capsys)
    assert time.monotonic() - begin < 60


CRITIC = (
    "tokenizer.module.discriminator={class_path: ivideogpt.models.discriminator.PatchDiscriminator,"
    " init_args: {base_channels: 8}}"
)


@pytest.mark.parametrize(
    ("settings", "found", "remedies"),
    [
        (["gradient_clip_val=0.5"], "gradient_clip_val=0.5", "tokenizer.module.gradient_clip=0.5"),
        (["accumulate_grad_batches=4"], "accumulate_grad_batches=4", "tokenizer.module.accumulate=4"),
    ],
)
def test_a_trainer_that_would_clip_or_accumulate_for_a_discriminator(
    recipe: Any, settings: list[str], found: str, remedies: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"tokenizer.trainer.{word}" for word in settings]
    error = refused(recipe(), [CRITIC, "tokenizer.module.codebook_restart=null", *words], capsys)
    assert "stages.tokenizer.trainer: TokenizerModule with a discriminator makes its updates by itself" in error
    assert f"got {found}; set them to null, and {remedies} in their place" in error


def grpo(recipe: Any, model: Any, folder: Path, **settings: Any) -> Path:
    start = model.save_pretrained(folder / "start")
    parts = {part: {"from": str(start)} for part in ("tokenizer", "transformer")}
    stage = {
        "module": {
            "class_path": "ivideogpt.training.GRPOModule",
            "init_args": {**parts, "perceptual_weight": 0.0, "group_size": 2, **settings},
        }
    }
    path: Path = recipe(stages=("tokenizer",))
    content = yaml.safe_load(path.read_text())
    content["stages"]["policy"] = stage
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_grpo_and_a_trainer_that_would_clip_or_accumulate(
    recipe: Any, tiny_world_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = grpo(recipe, tiny_world_model(action_dim=3), tmp_path)
    words = ["policy.trainer.gradient_clip_val=1.0", "policy.trainer.accumulate_grad_batches=2"]
    error = refused(path, words, capsys)
    assert "stages.policy.trainer: GRPOModule makes its updates by itself" in error
    assert "policy.module.gradient_clip=1.0 and a larger policy.data.batch_size" in error
    assert "stages.policy.module: group_size 1 must be at least 2" in refused(
        path, ["policy.module.group_size=1"], capsys
    )


def test_weights_of_a_loss_are_fetched_first_and_the_message_names_the_stage(
    recipe: Any, tiny_world_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(networks, "find_weights", lambda name: networks.Missing(name, "not on this disk"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = grpo(recipe, tiny_world_model(action_dim=3), tmp_path, perceptual_weight=1.0)
    error = refused(path, [], capsys)
    assert "stages.policy.module: " in error and "policy.module.perceptual_weight=0" in error


@pytest.mark.parametrize("settings", [["max_steps=-1"], ["max_steps=-1", "max_epochs=-1"]])
def test_a_cosine_needs_a_last_update(recipe: Any, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"transformer.trainer.{word}" for word in (*settings, "max_time=00:00:00:05")]
    error = refused(recipe(), words, capsys)
    assert "stages.transformer: a cosine schedule needs to know the last update, and trainer.max_steps is -1" in error


def test_a_constant_rate_can_be_trained_for_a_time(recipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["tokenizer.trainer.max_steps=-1", "tokenizer.trainer.max_time=00:00:00:02"]
    output = recipes.run(recipe(stages=("tokenizer",)), words)
    assert output is not None and (output / "tokenizer" / "tokenizer").is_dir()
    assert "tokenizer: updates for a time" in capfd.readouterr().out


def test_what_is_left_out_of_a_model_is_said(
    recipe: Any, tiny_world_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_world_model(action_dim=3, reward=True)
    model.extras |= {"action_mean": [0.5, 0.0, 0.0], "action_std": [1.0, 2.0, 1.0]}
    start = model.save_pretrained(tmp_path / "start")
    words = [f"transformer.module.{part}={{from: {start}}}" for part in ("tokenizer", "transformer")]
    words += ["transformer.module.reward_head=null", "transformer.trainer.max_steps=1"]
    output = recipes.run(recipe(stages=("transformer",)), words)
    assert f"transformer: the reward head of {start} is left out" in capsys.readouterr().out
    assert output is not None
    tuned = ivideogpt.from_pretrained(output / "model")
    assert tuned.reward_head is None and "reward_transform" not in tuned.extras
    assert tuned.extras["action_mean"] == [0.5, 0.0, 0.0]

    # no actions any more, and no statistics of them; the data have none either
    words[1] = f"transformer.module.transformer={{from: {start}, action_dim: null}}"
    words += ["transformer.data.use_actions=false", f"output={tmp_path / 'free'}"]
    output = recipes.run(recipe(stages=("transformer",)), words)
    assert "the action layer (actions of size 3) of" in capsys.readouterr().out
    assert output is not None
    free = ivideogpt.from_pretrained(output / "model")
    assert free.config.action_dim is None and "action_mean" not in free.extras


def test_a_model_with_actions_becomes_one_of_several_embodiments(
    recipe: Any, tiny_world_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_world_model(action_dim=3, reward=True)
    model.extras |= {"action_mean": [0.5, 0.0, 0.0], "action_std": [1.0, 2.0, 1.0]}
    start = model.save_pretrained(tmp_path / "start")
    words = [f"transformer.module.tokenizer={{from: {start}}}", "transformer.module.reward_head=null"]
    words += ["transformer.data.pad_actions=true", "transformer.trainer.max_steps=1"]
    spaces = "transformer.module.action_spaces={test/noise: 3, other: 2}"
    base = f"transformer.module.transformer={{from: {start}"
    assert "got 3 and [0.5, 0.0, 0.0]. Beside `from`, action_dim: null drops" in refused(
        recipe(stages=("transformer",)), [*words, spaces, base + "}"], capsys
    )
    output = recipes.run(recipe(stages=("transformer",)), [*words, spaces, base + ", action_dim: null}"])
    assert output is not None
    several = ivideogpt.from_pretrained(output / "model", action_space="test/noise")
    assert several.config.action_dim == 3

    # from that one to other spaces: what is kept, new and dropped is said
    capsys.readouterr()
    words[0] = f"transformer.module.tokenizer={{from: {output / 'model'}}}"
    words += [f"transformer.module.transformer={{from: {output / 'model'}}}", f"output={tmp_path / 'next'}"]
    recipes.run(recipe(stages=("transformer",)), [*words, "transformer.module.action_spaces={test/noise: 3, third: 4}"])
    said = capsys.readouterr().out
    assert "'test/noise' kept; 'third' new, zero until trained; 'other' dropped" in said


def test_lora_does_not_drop_an_action_layer(
    recipe: Any, tiny_world_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tiny_world_model(action_dim=3).save_pretrained(tmp_path / "start")
    words = [f"transformer.module.tokenizer={{from: {start}}}", "transformer.module.lora={rank: 2, alpha: 4}"]
    words += [f"transformer.module.transformer={{from: {start}, action_dim: null}}"]
    error = refused(recipe(stages=("transformer",)), words, capsys)
    assert "stages.transformer.module.lora: an adapter keeps its base's action layer" in error
