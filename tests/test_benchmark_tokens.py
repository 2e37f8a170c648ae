"""The benchmark of training from tokens: it runs, checks what it compares, and its results have their fields."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # the folder that holds the package `benchmarks`, which is not installed
    sys.path.insert(0, str(ROOT))
benchmark = importlib.import_module("benchmarks.tokens")


def check_record(record: dict[str, Any]) -> None:
    assert (record["benchmark"], record["version"]) == ("tokens", 1)
    assert record["checked_clips"] >= 4
    for side in record["sides"].values():
        raw = [second for block in side["seconds"] for second in block]
        assert len(side["seconds"]) == record["settings"]["repeats"] and len(raw) == side["stats"]["count"]
        assert side["updates_per_second"] == pytest.approx(1 / side["stats"]["median"])
    own = record["sides"]["tokens"]["updates_per_second"]
    for name, ratio in record["ratios"].items():
        assert ratio == pytest.approx(own / record["sides"][name]["updates_per_second"])
    assert record["bytes"]["per_clip"] < record["bytes"]["per_clip_raw_pixels"] / 10


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ["--updates", "1", "--repeats", "1", "--segment-length", "4", "--batch-size", "2", "--out", str(out)]
    assert benchmark.main(words) == 0
    check_record(json.loads(out.read_text()))


def test_other_tokens_are_noticed(tmp_path: Path) -> None:
    import torch

    from ivideogpt import from_pretrained
    from ivideogpt.data import TokenSet
    from ivideogpt.training.tokenization import tokenize_clips

    tokenizer = from_pretrained("ivideogpt-metaworld-nano").tokenizer
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.copy_(tokenizer.quantize.embedding.weight.flip(0))
    tokenize_clips(tokenizer, ["embedded:train"], tmp_path / "t", 3, clips_per_episode=1)
    with pytest.raises(RuntimeError, match="is not what the tokenizer gives"):
        benchmark.check_equal("ivideogpt-metaworld-nano", TokenSet(tmp_path / "t"), torch.device("cpu"))


def test_results_are_whole() -> None:
    check_record(json.loads((ROOT / "benchmarks" / "results" / "tokens-cpu.json").read_text()))
