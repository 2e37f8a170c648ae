"""What docs/evaluation.md shows runs, its table is that of the presets, its numbers are those of the results file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ivideogpt import cli
from ivideogpt.metrics.protocols import PROTOCOLS
from ivideogpt.recipes.checking import parse_arguments
from ivideogpt.training import EvaluationModule

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
MODEL = "ivideogpt-metaworld-nano"


def test_the_commands_run(
    tiny_world_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """With a small random model in place of the embedded one."""
    monkeypatch.chdir(tmp_path)
    tiny_world_model(4, reward=True).save_pretrained("tiny")
    lines = re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)[0].splitlines()
    assert len(lines) == 3
    for line in lines:
        words = ["tiny" if word == MODEL else word for word in shlex.split(line)[1:]]
        assert cli.main(words) == 0, capsys.readouterr().err
    assert "tiny, measured twice" in capsys.readouterr().out
    assert {"before.json", "after.json", "before.html"} <= {path.name for path in tmp_path.iterdir()}


def test_the_stage_is_one() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    module = yaml.safe_load(text)["evaluate"]["module"]
    assert module["class_path"] == "ivideogpt.training.EvaluationModule"
    parse_arguments(EvaluationModule, module["init_args"], "evaluate", skip={"world_model"})


def test_the_table_of_protocols() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", TEXT, re.M)
    named = {name: row for row in rows for name in re.findall(r"`([\w-]+)`", row[0])}
    assert list(named) == list(PROTOCOLS)
    for name, (_, _, clips, frames, pixels, actions, futures) in named.items():
        protocol = PROTOCOLS[name]
        assert clips.split(",")[0] == str(protocol.videos or "all")
        given = protocol.context_length or "the model's"
        assert frames == f"{given} + {protocol.horizon}"
        assert str(protocol.resolution or "the model's") in pixels
        assert actions.split(",")[0] == {True: "yes", False: "no", None: "as the model"}[protocol.actions]
        assert futures == f"{protocol.num_samples}, T {protocol.temperature:g}, top-k {protocol.top_k}"


def test_numbers_are_from_the_results_file() -> None:
    results = json.loads((ROOT / "model_cards" / "results" / f"{MODEL}.sampled.json").read_text())
    explained = {f"{row['reason']}: {row['change']}": row["values"] for row in results["explanation"]["rows"]}
    shown = re.findall(r"^\| ([a-zA-Z ]+: [^|]+) \| ([^|]*) \| ([^|]*) \|$", TEXT, flags=re.MULTILINE)
    assert len(shown) >= 10
    for change, *cells in shown:
        for (metric, digits), cell in zip((("psnr", 2), ("ssim", 3)), cells, strict=True):
            if metric in explained[change]:
                assert cell == " → ".join(f"{value:.{digits}f}" for value in explained[change][metric])
            else:
                assert not cell.strip(), (change, metric)
    text, about = TEXT.replace("\n", " "), results["explanation"]
    assert f"({about['videos']} clips, best of {about['samples']}," in text
