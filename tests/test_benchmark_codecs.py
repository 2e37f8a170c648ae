"""Benchmarks of codecs and of opening a set: every lossless candidate is lossless, both sides open the same set."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ivideogpt.data.blocks import DEFAULT_CODEC, codec_named
from ivideogpt.data.codec import encode_video
from ivideogpt.data.reader import ShardSet

pytest.importorskip("lz4")

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # the folder that holds the package `benchmarks`, which is not installed
    sys.path.insert(0, str(ROOT))
codecs, opening = (importlib.import_module(f"benchmarks.{name}") for name in ("codecs", "index"))


def test_candidates_give_back_what_they_took() -> None:
    rng = np.random.default_rng(0)
    video = np.repeat(rng.integers(0, 256, (1, 12, 10, 3), dtype=np.uint8), 37, axis=0)
    video[:, :, 3] = rng.integers(0, 256, (37, 12, 3), dtype=np.uint8)
    for candidate in codecs.candidates():
        if candidate.compressor.startswith("jpeg"):
            continue
        encoded = codecs.Encoded(candidate, video)
        for start, length in ((0, 37), (5, 16), (21, 16), (36, 1)):
            np.testing.assert_array_equal(encoded.clip(start, length), video[start : start + length], candidate.name)


def test_the_default_codec_is_among_them() -> None:
    video = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    names = {candidate.name: candidate for candidate in codecs.candidates()}
    blocks = encode_video(video, codec_named(DEFAULT_CODEC))
    assert codecs.Encoded(names["before+zstd-3/16"], video).blocks == blocks


@pytest.mark.slow
def test_results_hold_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "codecs.json"
    words = ["codecs.py", "--only", "metaworld", "--seconds", "0.001", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    codecs.main()
    found = json.loads(out.read_text())["results"]
    assert "metaworld, 64 px x 30" in found
    for rows in found.values():
        assert rows["npz"]["of_npz"] == 1 and rows["npz"]["psnr"] is None
        assert rows["none+jpeg-95/1"]["psnr"] > rows["none+jpeg-90/1"]["psnr"] > 30
        for row in rows.values():
            assert row["encode_episodes_a_second"]["median"] > 0 and row["clips_a_second"]["count"] == 1


def test_both_versions_of_a_set_open_alike(tmp_path: Path) -> None:
    opening.lay_out(tmp_path, 3, 5)
    sets = [ShardSet(tmp_path / name) for name in ("index", "members")]
    assert [shards.manifest["schema_version"] for shards in sets] == [2, 1]
    rows = [[shards.index.row(i) | {"camera": ""} for i in range(len(shards))] for shards in sets]
    assert rows[0] == rows[1] and len(rows[0]) == 15
    run = opening.opened(tmp_path / "index")
    assert run["episodes"] == 15 and run["seconds"] > 0
