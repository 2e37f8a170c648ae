"""The published recipes: their numbers are the published ones, and their losses those of the original computation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ivideogpt import recipes
from ivideogpt.data.position import share_of
from ivideogpt.recipes.batches import accumulated, check_batch, clips_of_update, processes
from ivideogpt.recipes.checking import trains
from ivideogpt.recipes.classes import import_class
from ivideogpt.recipes.parts import PartBuilder, part_config
from ivideogpt.recipes.stage import Stage

# tokenizer updates (half of the published steps), transformer updates, resolution, t0, segments, action size
PUBLISHED: dict[str, tuple[int, int, int, int, int, int | None]] = {
    "bair": (100_000, 100_000, 64, 1, 16, 4),
    "bair_action_free": (100_000, 70_000, 64, 1, 16, None),
    "robonet_64": (300_000, 600_000, 64, 2, 12, 5),
    "robonet_256": (100_000, 600_000, 256, 2, 12, 5),
    "vp2_robosuite": (100_000, 200_000, 64, 2, 12, 4),
    "vp2_robodesk": (100_000, 200_000, 64, 2, 12, 5),
    "oxe_64": (500_000, 700_000, 64, 2, 16, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_published_ones(name: str) -> None:
    tokenizer_updates, transformer_updates, resolution, context, segment, action_dim = PUBLISHED[name]
    stages = recipes.load(name)["stages"]
    tokenizer, transformer = stages["tokenizer"], stages["transformer"]
    fields = tokenizer["module"]["init_args"]
    assert tokenizer["trainer"]["max_steps"] == tokenizer_updates
    assert transformer["trainer"]["max_steps"] == transformer_updates
    config = part_config("tokenizer", fields["tokenizer"], name)
    assert (config.resolution, config.context_length) == (resolution, context)
    assert (fields["learning_rate"], fields["l1_weight"], fields["perceptual_weight"]) == (5e-4, 1.0, 1.0)
    assert (fields["commitment_weight"], fields["gradient_clip"]) == (1.0, 1.0)
    fields = transformer["module"]["init_args"]
    config = part_config("transformer", fields["transformer"], name)
    assert (config.num_layers, config.embed_dim, config.attention_dropout) == (12, 768, 0.1)
    assert config.action_dim == action_dim
    assert (fields["learning_rate"], fields["warmup_updates"], fields["weight_decay"]) == (1e-4, 5000, 0.01)
    assert fields["schedule"] == "cosine"
    for stage, length in ((tokenizer, 8), (transformer, segment)):
        data, trainer = stage["data"]["init_args"], stage["trainer"]
        assert (data["segment_length"], data["context_length"], data["resolution"]) == (length, context, resolution)
        assert data["augment"] == (resolution == 64)
        assert trainer["precision"] == "bf16-mixed"
        assert (data["global_batch_size"], data["batch_size"]) == (64, None)
    assert tokenizer["data"]["init_args"]["horizon"] == (16 if segment == 16 else 12)


def test_the_mixture_is_the_published_one() -> None:
    data = {stage: content["data"]["init_args"] for stage, content in recipes.load("oxe_64")["stages"].items()}
    assert (data["transformer"]["train"], data["tokenizer"]["train"]) == ("mixture:select", "mixture:select+sthsth")
    for one in data.values():
        assert (one["stride"], one["target_rate"], one["holdout_every"]) == (None, 3.0, 100)


def test_further_numbers_of_open_x_embodiment() -> None:
    medium = recipes.load("oxe_64_medium")["stages"]["transformer"]
    config = part_config("transformer", medium["module"]["init_args"]["transformer"], "medium")
    assert (config.num_layers, config.embed_dim, medium["module"]["init_args"]["gradient_clip"]) == (24, 1024, 1.0)
    assert (medium["data"]["init_args"]["global_batch_size"], per_device(medium)) == (64, 8)
    goal = recipes.load("oxe_64_goal")["stages"]
    assert goal["tokenizer"]["data"]["init_args"]["shuffle_frames"] and goal["transformer"]["data"]["init_args"]["goal"]
    assert goal["tokenizer"]["module"]["init_args"]["learning_rate"] == 1e-4
    assert goal["transformer"]["data"]["init_args"]["segment_length"] == 17
    large = recipes.load("oxe_256")["stages"]
    fields = large["tokenizer"]["module"]["init_args"]
    assert fields["discriminator_start"] == 125_000 and fields["accumulate"] == 4
    assert [per_device(stage) for stage in large.values()] == [2, 4]
    assert [stage["data"]["init_args"]["global_batch_size"] for stage in large.values()] == [32, 16]


@pytest.mark.parametrize("name", [*PUBLISHED, "oxe_64_medium", "oxe_64_goal"])
def test_any_number_of_gpus_trains_the_published_batch(name: str) -> None:
    for words in (["trainer.devices=1", "trainer.accumulate_grad_batches=4"], ["trainer.devices=8"]):
        for stage in recipes.load(name, words)["stages"].values():
            if trains(import_class(stage["module"]["class_path"], name)):
                assert clips_of_update(stage) == 64
                check_batch(stage, name)


def per_device(stage: dict[str, Any]) -> int:
    """Clips of a batch on each GPU."""
    return share_of(clips_of_update(stage) or 0, processes(stage["trainer"]), accumulated(stage))


def build(name: str, stage: str, folder: Path) -> Any:
    """The module of a recipe's stage with the parts of a recorded checkpoint, changed as the recipe says."""
    stages, words = recipes.load(name)["stages"], []
    for part in ("tokenizer",) if stage == "tokenizer" else ("tokenizer", "transformer"):
        spec = stages[stage]["module"]["init_args"][part]
        changes = {"action_dim": spec["action_dim"]} if "from" in spec and "action_dim" in spec else {}
        words.append(f"{stage}.module.{part}={json.dumps({'from': str(folder), **changes})}")
    recipe = recipes.load(name, [*words, *(f"{other}=null" for other in stages if other != stage)])
    built = Stage(stage, recipe["stages"][stage], folder, recipe["seed"], {}, "error", name, "")
    return built.build_module(PartBuilder({})).eval()


# the recorded checkpoint that stands in: its computation is the recipe's, its sizes are not
RECORDED = {name: "oxe-64-act-free" if row[-1] is None else "bair-64-act-cond" for name, row in PUBLISHED.items()} | {
    "oxe_64_medium": "oxe-64-act-free",
    "oxe_64_goal": "oxe-64-act-free",
    "oxe_256": "oxe-64-act-free",
    "metaworld": "bair-64-act-cond",
    "finetune": "bair-64-act-cond",
    "finetune_lora": "bair-64-act-cond",
    "embodiments": "oxe-64-act-free",
}


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_losses_are_the_recorded_ones(name: str, golden: Callable[[str], Any]) -> None:
    if name == "finetune_lora":
        pytest.importorskip("peft")  # fresh matrices change nothing
    recorded, stages = golden(RECORDED[name]), recipes.load(name)["stages"]
    expected, batch = recorded.tensors, {"video": recorded.video}
    clips, length = recorded.video.shape[:2]
    if "actions" in expected:
        batch["actions"] = expected["actions"]
    if name == "embodiments":  # fresh action layers add nothing
        batch |= {"actions": torch.ones(clips, length, 5), "source": ["bair"] * clips}
    module = build(name, "transformer", recorded.folder)
    if module.reward_head is not None:
        batch["rewards"] = torch.zeros(clips, length)
    losses = module.losses(module.predict_clip(batch), batch)
    assert losses["token_loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert ("reward_loss" in losses) is (name == "metaworld")
    if name != "metaworld":
        assert losses["loss"] is losses["token_loss"]
    if "tokenizer" not in stages:
        return
    module = build(name, "tokenizer", recorded.folder)
    assert (module.discriminator is not None) is (name == "oxe_256")  # whose part comes in after its start update
    module.reconstruction.perceptual_weight = 0.0  # no VGG weights are recorded
    context, future = module.split(recorded.video)
    loss = module.losses(module.tokenizer(context, future), context, future)["loss"]
    wanted = expected["commit_loss"] + expected["dynamics_commit_loss"]
    for kind, frames in (("future", future), ("context", context)):
        reconstruction = expected[f"train_{kind}_reconstruction"].float()
        wanted = wanted + (reconstruction - frames.flatten(0, 1)).abs().mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
