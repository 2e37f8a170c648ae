"""Stages that train an adapter: the base they start from, what they leave, and the stages behind them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ivideogpt
from ivideogpt import recipes
from ivideogpt.recipes.consolidation import consolidate
from ivideogpt.zoo.adapter import is_adapter

LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}


def with_stages(path: Path, base: str, **changes: Any) -> Path:
    """Adds to the recipe in ``path`` an adapter of ``base``, a reward head on top of it, and an evaluation."""
    content = yaml.safe_load(path.read_text())
    source = {"from": base}
    lora = {"tokenizer": source, "transformer": source, "reward_head": {"transform": "symlog"}, "lora": LORA}
    content["stages"] |= {
        "adapter": {
            "module": {
                "class_path": "ivideogpt.training.TransformerModule",
                "init_args": {**lora, "warmup_updates": 2, "learning_rate": 1e-2, **changes},
            }
        },
        "reward": {
            "module": {
                "class_path": "ivideogpt.training.RewardModule",
                "init_args": {part: {"from": "adapter"} for part in ("tokenizer", "transformer", "reward_head")},
            }
        },
        "evaluate": {
            "module": {
                "class_path": "ivideogpt.training.EvaluationModule",
                "init_args": {"world_model": {"from": "adapter"}, "horizon": 2, "num_examples": 0},
            },
            "trainer": {"limit_test_batches": 1, "callbacks": []},
        },
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_an_adapter_of_an_earlier_stage_and_the_stages_behind_it(recipe, tmp_path: Path) -> None:
    path = with_stages(recipe(), "transformer")
    output = recipes.run(path)
    assert output is not None
    folder = output / "adapter"
    assert is_adapter(folder) and not (folder / "transformer").exists()
    base, adapted = (ivideogpt.from_pretrained(output / name) for name in ("transformer", "adapter"))
    changed = {
        name for name, value in base.transformer.state_dict().items()
        if not torch.equal(value, adapted.transformer.state_dict()[name])
    }  # fmt: skip
    matrices = {f"layers.{layer}.self_attn.{name}.weight" for layer in (0, 1) for name in ("q_proj", "v_proj")}
    assert changed == matrices | {"action_linear.weight", "action_linear.bias"}
    assert adapted.extras["training"] == {"stage": "adapter", "updates": 6, "seed": 3}
    assert all(torch.equal(v, adapted.tokenizer.state_dict()[n]) for n, v in base.tokenizer.state_dict().items())

    # the reward stage trained a head on the merged model, and is a whole one
    whole = ivideogpt.from_pretrained(output / "model")
    assert not is_adapter(output / "model")
    for name, value in adapted.transformer.state_dict().items():
        torch.testing.assert_close(whole.transformer.state_dict()[name], value, atol=1e-6, rtol=0)
    assert (output / "evaluate" / "results.json").is_file()

    # a checkpoint of the stage makes the same adapter, elsewhere
    found, update = consolidate(folder, tmp_path / "made")
    assert update == 6
    again = ivideogpt.from_pretrained(found)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in adapted.state_dict().items())

    # and the whole output can be moved
    shutil.move(output, tmp_path / "moved")
    moved = ivideogpt.from_pretrained(tmp_path / "moved" / "adapter")
    assert all(torch.equal(value, moved.state_dict()[name]) for name, value in adapted.state_dict().items())


def test_an_adapter_of_the_embedded_model(recipe, tmp_path: Path, shards: dict[str, str]) -> None:
    start = ivideogpt.from_pretrained("ivideogpt-metaworld-nano")
    path = with_stages(recipe(stages=()), "ivideogpt-metaworld-nano")
    words = [f"adapter.data.{key}={shards['px64']}" for key in ("train", "val")]
    words += ["adapter.data.resolution=64", "reward=null", "evaluate=null", "adapter.trainer.max_steps=3"]
    output = recipes.run(path, words)
    assert output is not None
    folder, model = output / "adapter", ivideogpt.from_pretrained(output / "model")
    assert is_adapter(output / "model")  # a copy of the adapter
    assert model.extras["base_model"] == "ivideogpt-metaworld-nano"
    assert '"model": "ivideogpt-metaworld-nano"' in (folder / "ivideogpt.json").read_text()
    assert model.config.transformer == start.config.transformer
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.suffix == ".safetensors")
    assert size < 0.05 * 4 * sum(parameter.numel() for parameter in start.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": {"preset": "nano"}}, r"adapter.module.lora: an adapter belongs to a model that is there"),
        (
            {"tokenizer": {"from": "ivideogpt-metaworld-nano"}},
            r"has one base, but the tokenizer comes from 'ivideogpt-",
        ),
        ({"lora": {"rank": 2, "ranks": 3}}, r"adapter.module.lora: LoRA has no argument 'ranks'; .*'rank'"),
        ({"lora": {"rank": "many"}}, r"adapter.module: .*many"),
        ({"lora": {"targets": ["embed_tokens"]}}, r"adapter.module.lora: targets must be some of q_proj"),
        ({"lora": {"rank": 0}}, r"lora: rank must lie in 1..1024, got 0"),
    ],
)
def test_mistakes_are_found_before_anything_runs(recipe, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = with_stages(recipe(), "transformer", **changes)
    with pytest.raises(ValueError, match=message):
        recipes.load(path)


def test_an_adapter_of_an_adapter_is_refused(recipe) -> None:
    path = with_stages(recipe(), "transformer")
    content = yaml.safe_load(path.read_text())
    content["stages"] = {
        name: {**content["stages"][name], "trainer": {"max_steps": 0}}
        for name in ("tokenizer", "transformer", "adapter")
    }
    second = yaml.safe_load(yaml.safe_dump(content["stages"]["adapter"]))
    second["module"]["init_args"] |= {part: {"from": "adapter"} for part in ("tokenizer", "transformer")}
    content["stages"]["second"] = second
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match=r"second.module.transformer.from: 'adapter' .* merge it first"):
        recipes.run(path)
