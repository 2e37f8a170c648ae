"""`ivideogpt adapt tokenizer`: the tokenizer learns new recordings, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ivideogpt
from ivideogpt import cli


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
    assert any(not torch.equal(value, changed[name]) for name, value in start.tokenizer.state_dict().items())
    record = json.loads((tmp_path / "out" / "adapt.json").read_text())
    assert record["clips"] == 4
    assert record["after"]["reconstruction PSNR"] > record["before"]["reconstruction PSNR"] + 0.5
    assert record["before"].keys() == record["after"].keys()
    assert cli.main(words) == 0  # finished before: measured again, with the same numbers
    assert json.loads((tmp_path / "out" / "adapt.json").read_text())["after"] == record["after"]


def test_mistakes_are_one_line(tmp_path: Path, shards: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adapt", "tokenizer", "--model", "ivideogpt-metaworld-nano", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--data", shards["px64"], "--heldout", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
