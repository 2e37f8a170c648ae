"""Triton's kernels give what torch operations give: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).with_name("kernel_checks.py")
NAMES = [line[len("def check_") :].split("(")[0] for line in CHECKS.read_text().splitlines() if "def check_" in line]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_check(name: str) -> None:
    """In a process of its own: the interpreter must be asked for before Triton is imported, and holds for all of it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(CHECKS), name], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
