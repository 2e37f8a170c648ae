"""Two gloo processes that share the videos give the numbers of one process, for every metric."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import ivideogpt

SCRIPT = Path(__file__).with_name("parallel_metrics.py")


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    measure = runpy.run_path(str(SCRIPT))["measure"]
    alone = measure([(video, [0, 1, 2, 3]) for video in range(7)])
    out = tmp_path / "two.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ivideogpt.__file__).parents[1]),
    }  # fmt: skip
    finished = subprocess.run(
        [*launcher, str(SCRIPT), str(out)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    together = json.loads(out.read_text(encoding="utf-8"))
    assert set(together) == set(alone)
    assert {"psnr_best", "ssim_curve", "following_delta_psnr", "rewards_pearson_r", "frechet"} <= set(alone)
    for name, expected in alone.items():
        found = together[name]
        pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
        for a, b in pairs:
            assert math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9), f"{name}: {found} against {expected}"
