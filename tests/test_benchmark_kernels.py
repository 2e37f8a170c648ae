"""The benchmark of the Triton kernels: it runs in Triton's interpreter, and its results have their fields."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
SHORTER = "from benchmarks import kernels as k; k.SWEEP = {name: k.SWEEP[name][:2] for name in ('out', 'attend')}; "
FEW = {"step", "qkv", "attend", "out", "gate_up", "down", "head", "sample"}
MANY = {"step", "scatter", "attend", "add_norm", "gated", "sample"}


def run(out: Path, *words: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    fixed = ["--size", "tiny", "--device", "cpu", "--chain", "1", "--repeats", "1", "--out", str(out)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    program = [sys.executable, "-c", SHORTER + "raise SystemExit(k.main())", *fixed, *words]
    return subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment)


def check_record(record: dict[str, Any]) -> None:
    assert (record["benchmark"], record["version"]) == ("kernels", 1) and record["date"].endswith("+00:00")
    assert record["machine"]["cpu"] and record["versions"]["torch"] and record["versions"]["triton"]
    bandwidth = record["rates"]["bandwidth_bytes_per_second"]["best"]
    for rows, result in record["rows"].items():
        assert set(result["parts"]) == (FEW if int(rows) <= 4 else MANY)
        assert 0 <= result["hidden_difference"] < 0.05
        for timing in [*result["parts"].values(), *result.get("sweep", {}).values()]:
            for side in timing["sides"].values():
                raw = [seconds for one in side["seconds"] for seconds in one]
                assert len(raw) == record["settings"]["repeats"] and side["launches"] >= 1
                share = timing["bytes_moved"] / side["stats"]["median"] / bandwidth
                assert side["bandwidth_share"] == pytest.approx(share)
        for timing in result["parts"].values():
            medians = {name: side["stats"]["median"] for name, side in timing["sides"].items()}
            assert timing["ratio"] == pytest.approx(medians["torch"] / medians["ours"])


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run(out, "--rows", "1", "6", "--sweep")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    check_record(record)
    assert set(record["rows"]) == {"1", "6"}
    assert set(record["rows"]["1"]["sweep"]) == {"out", "attend"} and set(record["rows"]["6"]["sweep"]) == {"attend"}
    sides = record["rows"]["1"]["sweep"]["out"]
    assert len(sides["sides"]) == 2 and sides["best"] in sides["sides"]


def test_a_cpu_must_be_asked_for(tmp_path: Path) -> None:
    done = run(tmp_path / "result.json", interpreted=False)
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr
