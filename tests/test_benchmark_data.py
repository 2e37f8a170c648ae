"""The benchmark of training data: it runs, both sides give the same clips, and its results have their fields."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # the folder that holds the package `benchmarks`, which is not installed
    sys.path.insert(0, str(ROOT))
benchmark = importlib.import_module("benchmarks.data")
pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="gives processes their cores")


def check_record(record: dict[str, Any]) -> None:
    assert (record["benchmark"], record["version"]) == ("data", 1)
    settings = record["settings"]
    asked = [len(settings[name]) for name in ("frames", "resolutions", "workers")]
    assert len(record["cases"]) == 2 * int(np.prod(asked))
    for case in record["cases"]:
        medians = {}
        for name, side in case["sides"].items():
            assert len(side["seconds"]) == settings["repeats"]
            medians[name] = case["clips"] / np.median(side["seconds"])
            assert side["clips_per_second"]["median"] == pytest.approx(medians[name], rel=0.3)  # of an even number
        assert case["ratio"] == pytest.approx(medians["ours"] / medians["npz"], rel=0.3)
    assert all(row["shards"] > 0 and row["npz"] > 0 for row in record["bytes"])
    start = record["start"]
    assert start["shards"] == settings["start_shards"]
    assert len(start["open"]["seconds"]) == len(start["first_batch"]["seconds"]) == settings["repeats"]
    assert record["targets"] == json.loads(json.dumps(benchmark.targets_of(record)))
    for row in record["targets"].values():
        assert isinstance(row["reached"], bool)


def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = "--frames 30 --resolutions 64 --workers 1 --clips 4 --batch-size 2 --segment-length 3 --repeats 1"
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    try:
        assert benchmark.main([*words.split(), "--start-shards", "3", "--start-episodes", "2", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(before[0])
    assert os.sched_getaffinity(0) == before[1]
    check_record(json.loads(out.read_text()))


def test_both_sides_give_clips_of_the_same_recordings(tmp_path: Path) -> None:
    videos = [np.full((7, 16, 16, 3), 40 * number, np.uint8) + np.arange(7, dtype=np.uint8)[:, None, None, None]
              for number in range(2)]  # fmt: skip
    benchmark.write_npz(tmp_path / "npz", videos, 4, 30)
    benchmark.pack(tmp_path / "npz", tmp_path / "shards")
    plain = benchmark.NpzClips(tmp_path / "npz", 4, 5, 16, augment=False)
    data = benchmark.VideoDataModule(
        str(tmp_path / "shards"), segment_length=5, resolution=16, batch_size=4, num_workers=0, augment=False
    )
    (batch,) = [data.on_after_batch_transfer(batch) for batch in data.train_dataloader()]
    for video in (*[plain[number][0] for number in range(4)], *batch["video"]):
        levels = (video[:, 0, 0, 0] * 255).round()
        assert torch.equal(video, (levels / 255)[:, None, None, None].expand_as(video))
        assert (levels % 40 < 7).all() and (levels.diff().abs() == 1).all()  # to and fro through one recording
    turned = benchmark.NpzClips(tmp_path / "npz", 4, 5, 16, augment=True)[1][0]
    assert turned.shape == (5, 3, 16, 16) and not torch.equal(turned, plain[1][0])


def test_targets_are_judged_by_the_worst() -> None:
    def case(ratio: float, **fields: Any) -> dict[str, Any]:
        return {"ratio": ratio, "augmented": True, "resolution": 64, "frames": 30} | fields

    record: dict[str, Any] = {
        "cases": [case(7.0), case(4.0), case(0.5, augmented=False), case(9.0, resolution=256, frames=300)],
        "bytes": [{"npz": 10, "shards": 11}, {"npz": 10, "shards": 9}],
        "start": {"first_batch": {"stats": {"median": 0.4}}},
    }
    found = {name: (row["worst"], row["reached"]) for name, row in benchmark.targets_of(record).items()}
    assert found == {
        "augmented at 64 px": (4.0, False),
        "augmented at 300 frames": (9.0, False),
        "bytes of npz": (1.1, True),
        "start-up, s": (0.4, True),
    }


def test_results_are_whole() -> None:
    for path in sorted((ROOT / "benchmarks" / "results").glob("data-cpu*.json")):
        check_record(json.loads(path.read_text()))
