"""Runs the demo on the embedded recordings with a tiny model: interrupted, then whole, then again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ivideogpt import cli
from ivideogpt.charts import Series, line_chart, ticks
from ivideogpt.data.reader import load_manifest, resolve_source
from ivideogpt.data.verification import verify_set
from ivideogpt.report import Example, Report, Row, best, render, write_report

if TYPE_CHECKING:
    from ivideogpt.world_model import WorldModel

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tiny_world_model: Callable[..., WorldModel], tmp_path: Path) -> Path:
    return tiny_world_model(action_dim=4, reward=True).save_pretrained(tmp_path / "tiny")


def test_demo(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["demo", "--model", str(model), "--out", "demo", "--updates"]
    monkeypatch.setattr(sys, "argv", ["ivideogpt", *words, "6"])
    interrupt([*words, "100000"], tmp_path)
    out = Path("demo")
    assert not (out / "report.html").exists()
    assert not (out / "model").exists()

    assert cli.main([*words, "6"]) == 0
    printed = capsys.readouterr().out
    assert f"Found {episodes('train')} train episodes" in printed
    assert f"Found {episodes('heldout')} held-out episodes" in printed
    assert "its rollouts are identical" in printed
    assert tasks()[0] in printed
    assert printed.endswith(f"Report: {out / 'report.html'}\n")
    assert {path.name for path in out.iterdir()} >= {"data", "training", "model", "before.json", "after.json"}
    check_page((out / "report.html").read_text())

    first = (out / "model" / "transformer" / "model.safetensors").read_bytes()
    assert cli.main([*words, "6"]) == 0
    assert "skipped" in capsys.readouterr().out
    assert (out / "model" / "transformer" / "model.safetensors").read_bytes() == first


def episodes(split: str) -> int:
    return load_manifest(resolve_source(f"embedded:{split}"))["counts"]["episodes"]


def tasks() -> list[str]:
    sources = load_manifest(resolve_source("embedded:heldout"))["sources"]
    return [source.rpartition("/")[2] for source in sources]


def interrupt(words: list[str], folder: Path) -> None:
    """Starts the demo and presses Ctrl-C while it trains."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        [sys.executable, "-m", "ivideogpt.cli", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    record = folder / "demo" / "training" / "transformer" / "stage.json"
    deadline = time.monotonic() + 200
    while not record.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert err.endswith("ivideogpt: interrupted\n")
    assert "Traceback" not in err
    assert json.loads(record.read_text())["state"] == "running"
    assert verify_set(folder / "demo" / "data" / "train") == []
    assert not [path for path in (folder / "demo").rglob("*") if path.name.endswith((".part", ".partial"))]


def check_page(page: str) -> None:
    """Self-contained, and everything that was asked for is on it."""
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "<script" not in page
    shown = len(tasks())
    assert shown >= 2
    assert page.count("data:image/gif;base64,") == shown  # one rollout a task
    assert page.count("data:image/png;base64,") == shown
    assert page.count('<svg class="chart"') == shown + 1  # rewards, and the training loss
    for text in (*tasks(), "overall", "last frame"):
        assert f"<td>{text}</td>" in page or f">{text}</th>" in page
    for command in ("ivideogpt demo --model", "ivideogpt run demo output=", "ivideogpt predict", "ivideogpt evaluate"):
        assert f"<pre>{command}" in page
    assert "from_pretrained(&#34;demo/model&#34;)" in page


def test_damaged_recordings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--prepare-only", "--out", str(tmp_path / "a")]) == 0
    packed = tmp_path / "a" / "data"
    (shard,) = (packed / "heldout").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-5000])
    capsys.readouterr()
    assert cli.main(["demo", "--prepare-only", "--out", str(tmp_path / "b"), "--data", str(packed)]) == 2
    assert "heldout is damaged" in capsys.readouterr().err
    # Its own damaged copy is simply packed again.
    assert cli.main(["demo", "--prepare-only", "--out", str(tmp_path / "a")]) == 0
    assert f"Packed {episodes('heldout')} held-out" in capsys.readouterr().out
    assert verify_set(packed / "heldout") == []


# The page


def small_report() -> Report:
    video = np.zeros((4, 8, 8, 3), np.uint8)
    scores = {"last frame": {"psnr": 20.0, "ssim": 0.5, "mse": 0.01}, "after": {"psnr": 19.0, "ssim": 0.6, "mse": 0.01}}
    return Report(
        title="A <b>title</b>",
        summary="",
        facts=[],
        methods=["last frame", "after"],
        rows=[Row("task", 1, scores)],
        examples=[Example("task", "episode", video, video, 1, 30.0, 20.0)],
    )


def test_text_is_escaped_and_the_better_score_marked() -> None:
    page = render(small_report())
    assert "A &lt;b&gt;title&lt;/b&gt;" in page
    assert re.findall(r'<td class="([^"]*win)">([\d.]+)', page) == [
        ("group win", "20.00"),
        ("win", "0.600"),
        ("group win", "10.00"),
    ]
    assert "<svg" not in page  # neither rewards nor losses are known


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(small_report(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, (0, 5, 10)), (-0.3, 0.9, (-0.5, 0, 0.5, 1)), (2, 2, (1.5, 2, 2.5)), (0, 0.001, (0, 0.0005, 0.001))],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_charts_leave_out_what_is_not_a_number() -> None:
    chart = line_chart([Series("a", [(0, 1.0), (1, float("nan")), (2, 3.0)], "truth")], "frame")
    assert chart.count("<circle") == 2
    assert "nan" not in chart
    assert line_chart([Series("a", [(5, 1.0)], "truth")], "update").count("<circle") == 1
    assert line_chart([Series("a", [(0, float("inf"))], "truth")], "frame") == ""


def test_best_knows_the_direction() -> None:
    from ivideogpt.report import METRICS

    row = small_report().rows[0]
    assert [best(row, metric) for metric in METRICS[:2]] == ["last frame", "after"]
