"""Tests of LoRA training: what it changes, what its checkpoints hold, and that it resumes to the bit."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ivideogpt.training import TransformerModule
from ivideogpt.training.callbacks import SeededUpdates
from ivideogpt.training.checkpoints import AtomicCheckpointIO, Checkpoints
from ivideogpt.training.lora import LoRA, adapter_matrices, add_lora, merged
from ivideogpt.world_model import WorldModel

SMALL = LoRA(rank=2, alpha=4, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture
def model(tiny_world_model) -> WorldModel:
    return tiny_world_model(action_dim=3, reward=True)


def module_of(model: WorldModel, lora: Any = SMALL, **settings: Any) -> TransformerModule:
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    settings = {"learning_rate": 1e-2, "warmup_updates": 0, **settings}
    return TransformerModule(model.transformer, model.tokenizer, model.reward_head, lora=lora, **settings)


def disturb(module: TransformerModule) -> TransformerModule:
    """Gives the matrices that begin as zero some value, as a training does."""
    for name, parameter in module.transformer.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return module


def clips(frames: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "video": torch.rand(2, frames, 3, 32, 32, generator=generator),
        "actions": torch.rand(2, frames, 3, generator=generator),
    }


def test_fresh_matrices_change_no_logit(model: WorldModel) -> None:
    plain, adapted = module_of(model, None).eval(), module_of(model).eval()
    torch.testing.assert_close(adapted.predict_clip(clips()).logits, plain.predict_clip(clips()).logits, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["whole", "lora", "last block", "action layer"])
def test_arithmetic_is_what_is_done(kind: str, tiny_world_model) -> None:
    model = tiny_world_model(action_dim=3)
    transformer, length = model.transformer, 24
    if kind == "lora":
        add_lora(transformer, LoRA(rank=2, targets=("q_proj", "down_proj")))
        transformer.action_linear.requires_grad_(False)
    elif kind != "whole":
        transformer.requires_grad_(False)
        (transformer.layers[-1] if kind == "last block" else transformer.action_linear).requires_grad_(True)
    embeddings = transformer.embed(torch.arange(length)[None])
    if kind != "lora":  # whose lowest layers then have no gradient to hand on
        embeddings = embeddings + transformer.embed_actions(torch.zeros(1, length, 3))
    embeddings = embeddings.detach().requires_grad_(embeddings.requires_grad)
    with FlopCounterMode(display=False) as counter:
        transformer.logits(transformer.backbone(embeddings)).sum().backward()
    products = ("mm", "addmm", "bmm")
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in products)
    config = transformer.config
    attention = (2 + 6 if kind == "last block" else 6 + 6) * config.embed_dim * length**2  # of two blocks
    assert config.num_layers == 2
    assert transformer.flops_per_sequence(length) - attention == counted


def test_the_base_stays_and_everything_else_is_trained(model: WorldModel, data, trainer) -> None:
    module = module_of(model)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    run = trainer(max_steps=3)
    run.fit(module, datamodule=data())
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    matrices = {name for name in before if ".lora_" in name}
    assert len(matrices) == 2 * 3 * 2  # A and B of three layers of two blocks
    assert changed == matrices | {f"transformer.action_linear.{name}" for name in ("weight", "bias")} | {
        f"reward_head.linear.{name}" for name in ("weight", "bias")
    }
    assert {name.replace(".base_layer.", ".") for name in before} >= {name for name, _ in model.named_parameters()}


def test_merged_layers_are_plain_and_compute_the_same(model: WorldModel) -> None:
    module = disturb(module_of(model)).eval()
    plain = merged(module.transformer)
    assert all(type(layer) is nn.Linear for name, layer in plain.named_modules() if name.endswith("_proj"))
    assert plain.state_dict().keys() == model.transformer.state_dict().keys()
    assert plain.embed_tokens.weight.data_ptr() == module.transformer.embed_tokens.weight.data_ptr()  # shared
    tokens = module.tokenize(clips())
    expected = module.transformer(tokens).logits
    torch.testing.assert_close(plain(tokens).logits, expected, atol=1e-5, rtol=0)
    assert (expected - model.transformer(tokens).logits).abs().max() > 1e-2


def test_rollouts_while_training_are_those_of_the_merged_model(model: WorldModel) -> None:
    module = disturb(module_of(model)).eval()
    expected = TransformerModule(merged(module.transformer), module.tokenizer).eval()
    assert torch.equal(module.imagine(clips(), temperature=0), expected.imagine(clips(), temperature=0))


def run_to(folder: Path, trainer, data, module: TransformerModule, updates: int, resume: Path | None = None) -> Any:
    run = trainer(
        max_steps=updates,
        enable_checkpointing=True,
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        callbacks=[SeededUpdates(0), Checkpoints(every_n_updates=2)],
    )
    run.fit(module, datamodule=data(epoch_batches=100), ckpt_path=resume, weights_only=True)
    return torch.load(folder / "checkpoints" / f"update-{updates:06d}.ckpt", weights_only=True)


def test_checkpoints_hold_what_is_trained_and_resume_to_the_bit(
    model: WorldModel, data, trainer, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"lora": LoRA(rank=2, dropout=0.2), "schedule": "constant"}
    straight = run_to(tmp_path / "straight", trainer, data, module_of(model, **settings), 4)
    run_to(tmp_path / "halves", trainer, data, module_of(model, **settings), 2)
    halfway = tmp_path / "halves" / "checkpoints" / "update-000002.ckpt"
    other = module_of(model, **settings)
    disturb(other)  # what the checkpoint holds must not depend on what was there
    resumed = run_to(tmp_path / "halves", trainer, data, other, 4, halfway)
    assert straight["state_dict"].keys() == resumed["state_dict"].keys()
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in straight["state_dict"].items())
    trained = {f"transformer.action_linear.{name}" for name in ("weight", "bias")}
    trained |= {f"reward_head.linear.{name}" for name in ("weight", "bias")}
    matrices = straight["state_dict"].keys() - trained
    assert len(matrices) == 2 * 7 * 2
    assert all(".lora_" in name for name in matrices)
    plain = sum(parameter.numel() for parameter in model.transformer.parameters())
    assert sum(value.numel() for value in straight["state_dict"].values()) < plain / 2


def test_the_matrices_decay_and_biases_do_not(model: WorldModel) -> None:
    from ivideogpt.training.optim import parameter_groups

    groups = {group["name"]: group["params"] for group in parameter_groups(module_of(model).trained_parts(), 0.1)}
    assert len(groups["decay"]) == 12 + 2  # and the weights of the action layer and the reward head
    assert len(groups["no_decay"]) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"lora: rank must lie in 1..1024, got 0"),
        ({"rank": 5000}, r"rank must lie in"),
        ({"alpha": 0.0}, r"lora: alpha must be positive, got 0.0"),
        ({"dropout": 1.0}, r"lora: dropout must lie in \[0, 1\), got 1.0"),
        ({"targets": ["q_proj", "embed_tokens"]}, r"lora: targets must be some of q_proj, .*'embed_tokens'"),
        ({"targets": []}, r"lora: targets must be some of"),
    ],
)
def test_refused_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**fields)


def test_what_does_not_go_with_it(model: WorldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"does not go with seed_embeddings False, .* and freeze \['transformer'\]"):
        module_of(model, freeze=["transformer"])
    with pytest.raises(ValueError, match=r"does not go with seed_embeddings True"):
        module_of(model, seed_embeddings=True)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        add_lora(module_of(model).transformer, SMALL)
    frozen = module_of(model, freeze=["transformer.action_linear"])
    assert not any("action_linear" in name for name in frozen.state_dict())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'ivideogpt\[lora\]'"):
        module_of(model)


def test_a_mapping_is_as_good_as_the_dataclass(model: WorldModel) -> None:
    one, other = module_of(model), module_of(model, {"rank": 2, "alpha": 4, "targets": list(SMALL.targets)})
    pairs = zip(adapter_matrices(one.transformer).items(), adapter_matrices(other.transformer).items(), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
