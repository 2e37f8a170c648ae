"""What a second start of a stage takes from this start's recipe, and what from the checkpoint."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ivideogpt import recipes
from ivideogpt.training import TokenizerModule

EMA: dict[str, Any] = {
    "class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}
}  # fmt: skip
SHARDED = {"class_path": "ivideogpt.training.sharding.FullyShardedStrategy"}


def rates(stage: Path) -> dict[int, float]:
    """Learning rates that were logged, by update."""
    with open(stage / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/learning_rate")]
    return {int(row["step"]): float(row["train/learning_rate"]) for row in rows}


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "tokenizer" / "diffusion_pytorch_model.safetensors")


def unfinish(stage: Path) -> None:
    """Leaves of a finished stage what a kill between its last checkpoint and its end would."""
    record = json.loads((stage / "stage.json").read_text())
    for name in ("finished", "seconds", "updates"):
        del record[name]
    (stage / "stage.json").write_text(json.dumps({**record, "state": "running"}))
    shutil.rmtree(stage / "tokenizer")


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_training_goes_on_with_the_learning_rate_that_it_is_given(recipe, schedule: str) -> None:
    path = recipe(stages=("tokenizer",))
    words = [f"tokenizer.module.schedule={schedule}", "tokenizer.trainer.log_every_n_steps=1", "trainer.max_steps=4"]
    output = recipes.run(path, words)
    assert output is not None
    first = rates(output / "tokenizer")
    changes = ["tokenizer.module.learning_rate=7e-5", "tokenizer.module.weight_decay=0.3", "on_change=continue"]
    recipes.run(path, [*words[:2], "trainer.max_steps=8", *changes])
    found = rates(output / "tokenizer")
    assert list(found) == list(range(1, 9)) and {n: found[n] for n in first} == first
    later = [found[n] for n in range(5, 9)]
    assert max(later) <= 7e-5 < min(first[n] for n in (1, 2))
    assert later == ([pytest.approx(7e-5)] * 4 if schedule == "constant" else sorted(later, reverse=True))
    newest = torch.load(output / "tokenizer" / "checkpoints" / "update-000008.ckpt", weights_only=True)
    assert {group["weight_decay"] for group in newest["optimizer_states"][0]["param_groups"]} == {0.3, 0.0}


@pytest.mark.parametrize("callbacks", [[EMA], []], ids=["averaged", "plain"])
def test_a_kill_behind_the_last_checkpoint_costs_no_weights(recipe, callbacks: list[Any]) -> None:
    words = [f"tokenizer.trainer.callbacks={json.dumps(callbacks)}"]
    path = recipe(stages=("tokenizer",))
    output = recipes.run(path, words)
    assert output is not None
    expected = weights(output / "tokenizer")
    unfinish(output / "tokenizer")
    recipes.run(path, words)
    found = weights(output / "tokenizer")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_strategy_of_whole_weights_may_change(recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(stages=("tokenizer",))
    recipes.run(path, ["tokenizer.trainer.strategy=auto"])
    recipes.run(path, ["tokenizer.trainer.strategy=ddp"])
    assert "finished before, skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"with other settings: trainer.strategy"):
        recipes.run(path, [f"tokenizer.trainer.strategy={json.dumps(SHARDED)}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["transformer.trainer.strategy=ddpp"], r"stages.transformer.trainer: .*ddpp"),
        (
            [
                f"transformer.trainer.strategy={json.dumps(SHARDED)}",
                f"transformer.trainer.callbacks={json.dumps([EMA])}",
            ],
            r"stages.transformer: averaged weights \(EMA\) need whole weights",
        ),
        ([f"tokenizer.trainer.strategy={json.dumps(SHARDED)}"], r"stages.tokenizer: a tokenizer with codebook_restart"),
    ],
)
def test_what_a_strategy_cannot_do_is_said_before_anything_is_trained(
    recipe, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    def trained(*_: Any) -> None:
        raise AssertionError("a stage was trained")

    monkeypatch.setattr(TokenizerModule, "training_step", trained)
    with pytest.raises(ValueError, match=message):
        recipes.run(recipe(), words)


@pytest.mark.slow
def test_an_overlay_of_spread_weights_reaches_to_the_evaluation(recipe) -> None:
    path = recipe(stages=("tokenizer", "transformer", "evaluate"))
    words = [f"defaults.trainer.strategy={json.dumps(SHARDED)}", "tokenizer.module.codebook_restart=null"]
    output = recipes.run(path, words)
    assert output is not None and (output / "evaluate" / "results.json").is_file()
