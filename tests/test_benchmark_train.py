"""The benchmark of training: it runs, sees other work, and what its page says of the results is what they hold."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ivideogpt.zoo.privacy import check_nothing_private

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # the folder that holds the package `benchmarks`, which is not installed
    sys.path.insert(0, str(ROOT))
benchmark = importlib.import_module("benchmarks.train")
sides_of = importlib.import_module("benchmarks.train_sides")
RESULTS = ROOT / "benchmarks" / "results"


def check_record(record: dict[str, Any]) -> None:
    assert (record["benchmark"], record["version"]) == ("train", 1)
    bfloat16 = {"bf16-mixed", "tokenizer_precision: bfloat16"}
    measured = any(
        values["measures"]["bfloat16"] for case in record["cases"].values() for values in case["sides"].values()
    )
    assert set(record.get("equal_ids", [])) == (bfloat16 if measured else set())
    assert all(0.9 < share <= 1.0 for share in record.get("equal_ids", {}).values())
    for name, result in record["cases"].items():
        case, settings = result["case"], result["settings"]
        assert name == f"{case} {settings['batch_size']} x {settings['frames']}"
        base = result["sides"]["original"]
        for side, values in result["sides"].items():
            raw = [second for block in values["seconds"] for second in block]
            assert len(raw) == settings["updates"] * settings["repeats"] == values["stats"]["count"]
            assert values["updates_per_second"] == pytest.approx(1 / values["stats"]["median"])
            ratio = result["ratios"][side]
            assert ratio["speed"] == pytest.approx(base["stats"]["median"] / values["stats"]["median"])
            if values["peak_bytes"]:
                assert ratio["memory"] == pytest.approx(values["peak_bytes"] / base["peak_bytes"])
        for target in result["targets"]:
            measured, wanted = target["measured"], target["wanted"]
            assert target["reached"] is (measured <= wanted if target["target"] == "memory" else measured >= wanted)
        if case != "tokenizer":
            assert all(value < 1e-3 for value in result["checks"]["relative_differences"].values())


@pytest.mark.slow
def test_a_transformer(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ["--cases", "nano", "--batch-size", "1", "--frames", "4", "--updates", "1", "--repeats", "1"]
    assert benchmark.main([*words, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    check_record(record)
    (result,) = record["cases"].values()
    wanted = {"original", "+ fused AdamW", "+ kernels for the tokenizer", "ours, from tokens"}
    if sides_of.has_bfloat16(torch.device("cpu")):
        wanted.add("+ bf16-mixed")
    assert wanted <= result["sides"].keys()
    assert result["targets"] == []  # the targets are about the published sizes
    assert set(result["checks"]["relative_differences"]) == {"loss", "gradients"}


@pytest.mark.slow
def test_a_tokenizer_goes_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    out.write_text(json.dumps({"benchmark": "train", "version": 1, "cases": {"kept": 1}}))
    words = ["--cases", "tokenizer", "--tokenizer", "nano", "--frames", "3", "--updates", "1", "--repeats", "1"]
    assert benchmark.main([*words, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["cases"].pop("kept") == 1
    check_record(record)
    (result,) = record["cases"].values()
    assert {target["target"] for target in result["targets"]} == {"tokenizer", "memory"}


def test_other_work_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wm = sides_of.build_world_model("nano", 0.0, torch.device("cpu"))
    video = torch.rand(1, 4, 3, 64, 64)
    assert sides_of.check_same_work(wm, video, gradients=True)["gradients"] < 1e-3
    build = sides_of.llama_of

    def perturbed(wm: Any) -> Any:
        llama = build(wm)
        llama.model.norm.weight = torch.nn.Parameter(llama.model.norm.weight * 1.5)
        return llama

    monkeypatch.setattr(sides_of, "llama_of", perturbed)
    with pytest.raises(sides_of.DifferentWorkError, match="original and ours differ"):
        sides_of.check_same_work(wm, video, gradients=False)


def test_arithmetic_counts_what_labels_need() -> None:
    wm = sides_of.build_world_model("nano", 0.0, torch.device("cpu"))
    length, front = wm.layout.sequence_length(4), wm.layout.context_span
    head, config = wm.transformer.lm_head.weight.numel(), wm.transformer.config
    keys_values = 2 * config.embed_dim**2
    others = 2 * config.embed_dim**2 + 3 * config.embed_dim * config.mlp_dim
    whole = (config.num_layers - 1) * (keys_values + others) + keys_values
    attention = 6 * config.embed_dim * (config.num_layers * length**2 - front**2)
    expected = 3 * (6 * (whole * length + (others + head) * (length - front)) + attention)
    assert sides_of.transformer_flops(wm, (3, length)) == pytest.approx(expected)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("train-*.json")), ids=lambda path: path.name)
def test_the_results_are_whole_and_what_the_page_says(path: Path) -> None:
    record = json.loads(path.read_text())
    check_record(record)
    check_nothing_private(path.read_text(), path.name)
    page = (ROOT / "benchmarks" / "training.md").read_text().splitlines()
    assert record["cases"]
    for result in record["cases"].values():
        for row in benchmark.markdown(result):
            assert row in page
        assert f"`{result['versions']['commit'][:7]}`" in "\n".join(page)
