"""The benchmark of GRPO: it runs, a model against itself differs in nothing, and the committed result is whole."""

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
benchmark = importlib.import_module("benchmarks.grpo")


def check_record(record: dict[str, Any]) -> None:
    for values in record["metrics"].values():
        changes = values["per_clip"]
        assert len(changes) == record["settings"]["clips"]
        assert values["difference"] == pytest.approx(sum(changes) / len(changes), abs=1e-6)
        assert values["difference"] == pytest.approx(values["after"] - values["before"], abs=1e-5)
        assert values["interval"][0] <= values["difference"] <= values["interval"][1]


@pytest.mark.slow
def test_a_model_against_itself(tmp_path: Path) -> None:
    words = [
        "--after",
        benchmark.BEFORE,
        "--samples",
        "1",
        "--clips-per-episode",
        "1",
        "--out",
        str(tmp_path / "r.json"),
    ]
    assert benchmark.main(words) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    check_record(record)
    assert record["settings"]["clips"] == 16
    assert all(not any(values["per_clip"]) for values in record["metrics"].values())


def test_the_result_is_whole_and_what_the_recipe_says() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "grpo-cpu.json").read_text())
    check_record(record)
    header = (ROOT / "recipes" / "grpo.yaml").read_text().split("\nname:")[0]
    l1, psnr = record["metrics"]["l1"], record["metrics"]["psnr"]
    for number in (l1["before"], l1["after"], l1["difference"], *l1["interval"]):
        assert f"{number:.4f}" in header
    for number in (psnr["before"], psnr["after"], psnr["difference"], *psnr["interval"]):
        assert f"{number:.2f}" in header
