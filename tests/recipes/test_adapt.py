"""`ivideogpt adapt tokenizer`: the tokenizer learns new recordings, and nothing else changes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ivideogpt
from ivideogpt import cli
from ivideogpt.models.action_layers import ActionLayers
from ivideogpt.zoo.checkpoint import save_parts


def test_the_tokenizer_alone_is_adapted(
    tiny_world_model, shards: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tiny_world_model(action_dim=3, reward=True)
    start.save_pretrained(tmp_path / "start")
    words = ["adapt", "tokenizer", "--model", str(tmp_path / "start"), "--data", shards["px32"], "--out"]
    words += [str(tmp_path / "out"), "--heldout", shards["px32"], "--updates", "30", "--horizon", "3", "--limit", "4"]
    words += ["tokenizer.module.learning_rate=3e-3", "tokenizer.data.segment_length=4"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "before" in shown and "after" in shown
    adapted = ivideogpt.from_pretrained(tmp_path / "out" / "model")
    for part in ("transformer", "reward_head"):
        for name, value in getattr(start, part).state_dict().items():
            assert torch.equal(value, getattr(adapted, part).state_dict()[name]), name
    changed = adapted.tokenizer.state_dict()
    same = {name for name, value in start.tokenizer.state_dict().items() if torch.equal(value, changed[name])}
    assert same >= {name for name in changed if name.startswith(("encoder.", "cond_encoder.", "quant"))}
    assert not same & {name for name in changed if name.startswith(("decoder.conv_in.w", "cond_decoder.conv_in.w"))}
    assert adapted.extras["recipe"] == "adapt"
    assert adapted.extras["training"] == {"stage": "tokenizer", "updates": 30, "seed": 0}
    assert "name: adapt" in (tmp_path / "out" / "model" / "recipe.yaml").read_text()
    record = json.loads((tmp_path / "out" / "adapt.json").read_text())
    assert record["clips"] == 4
    assert record["after"]["reconstruction PSNR"] > record["before"]["reconstruction PSNR"] + 0.5
    assert record["before"].keys() == record["after"].keys()
    assert cli.main(words) == 0  # finished before: measured again, with the same numbers
    assert json.loads((tmp_path / "out" / "adapt.json").read_text())["after"] == record["after"]


@pytest.mark.slow
def test_two_processes_adapt_one_model(tiny_world_model, shards: dict[str, str], tmp_path: Path) -> None:
    tiny_world_model(action_dim=3).save_pretrained(tmp_path / "start")
    words = ["adapt", "tokenizer", "--model", str(tmp_path / "start"), "--data", shards["px32"], "--out"]
    words += [str(tmp_path / "out"), "--heldout", shards["px32"], "--updates", "2", "--horizon", "3", "--limit", "4"]
    words += ["tokenizer.data.segment_length=4", "tokenizer.trainer.devices=2", "tokenizer.trainer.strategy=ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "ivideogpt.cli", *words, "--device", "cpu"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("before") == done.stdout.count("after") == 1
    assert ivideogpt.from_pretrained(tmp_path / "out" / "model").extras["training"]["updates"] == 2


def test_one_of_several_robots_is_measured_and_all_are_kept(
    tiny_world_model, shards: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tiny_world_model()
    layers = ActionLayers({"square": 3, "other": 5}, start.config.transformer.embed_dim)
    parts = dataclasses.replace(start.parts, action_layers=layers)
    save_parts(tmp_path / "start", parts)
    words = ["adapt", "tokenizer", "--model", str(tmp_path / "start"), "--data", shards["px32"], "--out"]
    words += [str(tmp_path / "out"), "--heldout", shards["px32"], "--updates", "1", "--horizon", "3", "--limit", "2"]
    words.append("tokenizer.data.segment_length=4")
    assert cli.main(words) == 2
    assert "give action_space, one of" in capsys.readouterr().err
    assert cli.main([*words, "--action-space", "square"]) == 0
    for space, size in layers.spaces.items():
        model = ivideogpt.from_pretrained(tmp_path / "out" / "model", action_space=space)
        assert model.config.action_dim == size


def test_mistakes_are_one_line(tmp_path: Path, shards: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adapt", "tokenizer", "--model", "ivideogpt-metaworld-nano", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--data", shards["px64"], "--heldout", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
