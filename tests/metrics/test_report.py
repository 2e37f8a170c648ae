"""The report: which videos it shows, what their maps say, and that the page needs nothing from outside of it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ivideogpt import cli
from ivideogpt.metrics.clips import ClipSet
from ivideogpt.metrics.evaluation import evaluate
from ivideogpt.metrics.examples import choose, entropy_map, gather
from ivideogpt.metrics.judges import Judges
from ivideogpt.metrics.measuring import Work
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.report import render, write_report
from ivideogpt.metrics.video import mse, psnr, ssim

Shown = tuple[Work, dict[str, Any]]


@pytest.fixture(scope="module")
def shown(tiny_world_model: Callable[..., Any]) -> Shown:
    """A small evaluation of a random model, and its result."""
    model = tiny_world_model(4, reward=True)
    protocol = EvaluationProtocol().changed(horizon=4, videos=7, runs=2, num_samples=3).settled(model.config)
    clips = ClipSet.open("embedded:heldout", protocol)
    judges = Judges({"psnr": psnr, "ssim": ssim, "mse": mse}, missing={"fvd": "its <network> is missing"})
    result = evaluate(model, clips, protocol, judges=judges, name="a <b>model</b>")
    assert result is not None
    return Work(model, clips, protocol, judges, 0, 2), json.loads(json.dumps(result))


def test_the_best_and_the_worst_are_chosen() -> None:
    videos = [{"best": {"psnr": [value, 0.0], "mse": [value, 0.0]}} for value in (3.0, 9.0, 1.0, 7.0, 5.0)]
    assert choose({"videos": videos}, "psnr") == ([1, 3], [2, 0], 4)
    assert choose({"videos": videos}, "mse") == ([2, 0], [1, 3], 4)
    assert choose({"videos": videos[:1]}, "psnr") == ([0], [], 0)


def test_shown_videos_are_those_that_were_measured(shown: Shown) -> None:
    work, result = shown
    examples = gather(work, result)
    assert examples.metric == "psnr"
    by_key = {(video["key"], video["start"]): video for video in result["videos"]}
    for video in [*examples.best, *examples.worst, examples.median]:
        assert video.samples.shape == (5, 6, 32, 32, 3)
        truth, best = (torch.tensor(one).permute(0, 3, 1, 2)[None, 2:] / 255 for one in (video.truth, video.samples[0]))
        measured = by_key[video.key, video.start]["best"]["psnr"][0]
        assert float(psnr(best, truth).mean()) == pytest.approx(measured, abs=0.02)  # it was rounded to bytes
    worst = min(video["best"]["psnr"][0] for video in result["videos"])
    assert examples.worst[0].values["psnr"] == worst


def test_entropy_is_that_of_the_distribution_the_token_was_drawn_from(shown: Shown) -> None:
    model: Any = shown[0].model
    tokens = model.rollout(torch.rand(1, 2, 3, 32, 32), torch.zeros(1, 5, 4), horizon=3).tokens
    actions = torch.randn(1, 5, 4)
    found = entropy_map(model, tokens, actions)
    assert found is not None
    assert found.shape == (3, 2, 2)
    logits = model(tokens, actions).logits[0].detach()
    layout = model.layout
    for frame in range(3):
        first = layout.context_span + frame * layout.frame_stride + 1  # behind the slot
        for token in range(4):
            p = logits[first + token - 1].double().softmax(-1)
            bits = float(-(p * p.log2()).sum())
            assert found[frame, token // 2, token % 2] == pytest.approx(bits, abs=1e-4)
    assert found.max() <= math.log2(layout.vocab_size)
    with torch.no_grad():
        head = model.transformer.lm_head.weight.clone()
        model.transformer.lm_head.weight.zero_()
    uniform = entropy_map(model, tokens, actions)
    with torch.no_grad():
        model.transformer.lm_head.weight.copy_(head)
    assert uniform is not None
    np.testing.assert_allclose(uniform, math.log2(layout.vocab_size), rtol=1e-5)


def test_the_page(shown: Shown) -> None:
    work, result = shown
    page = render(result, gather(work, result))
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|url\(|@import", page)
    assert "<script" not in page
    assert "a &lt;b&gt;model&lt;/b&gt;" in page and "<b>model" not in page
    assert "its &lt;network&gt; is missing" in page
    assert "prefers-color-scheme: dark" in page
    assert page.count('class="interval"') == 3
    assert page.count('<svg class="chart"') == 3
    assert page.count('class="band prediction"') == 3
    gifs = re.findall(r"data:image/gif;base64,([^\"]+)", page)
    assert len(gifs) == 3 + 3 + 1
    for one in gifs:
        with Image.open(io.BytesIO(base64.b64decode(one))) as image:
            assert 1 <= getattr(image, "n_frames", 1) <= 6
            assert image.size in ((96, 32), (192, 32))
    assert len(re.findall(r"data:image/png;base64,", page)) == 1 + 3
    for text in ("plate-slide-v3", "best of 3", "Drift", "Best videos", "Worst videos", "5 futures", "bits a token"):
        assert text in page


def test_a_page_without_videos(shown: Shown) -> None:
    page = render(shown[1])
    assert "Best videos" not in page and "data:" not in page
    assert page.count('<svg class="chart"') == 3


def test_a_failed_write_leaves_the_old_page(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(shown[1], None, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_writes_all(shown: Shown, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = shown[0].model
    model.save_pretrained(tmp_path / "model")
    out, page = tmp_path / "results.json", tmp_path / "report.html"
    words = ["evaluate", "--model", str(tmp_path / "model"), "--data", "embedded:heldout", "--out", str(out)]
    words += ["--report", str(page), "--explain", "--videos", "3", "--horizon", "2", "--runs", "1", "--note", "tiny"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    for text in ("protocol", "What alone would give another number", "lossy frames", "note: tiny", f"wrote {page}"):
        assert text in printed
    result = json.loads(out.read_text())
    assert result["explanation"]["videos"] == 3
    assert "What alone would give another number" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "report.html", "results.json"]


def test_protocols_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--protocols"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "robonet-256" in printed and "100 a clip, temperature 1, top-k 100, 3 runs" in printed
