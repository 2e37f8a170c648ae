"""The SLURM template: its command is one that runs recipes, and a job that was asked to end goes back into the queue.

SLURM itself is not here: `srun` runs its command once, `scontrol` writes down what it was asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ivideogpt
from ivideogpt.recipes.reading import parse_yaml

RECIPES = Path(__file__).parents[2] / "recipes"
LIGHTNING = "import sys; from ivideogpt.cli import lightning_main; sys.exit(lightning_main(sys.argv[1:]))"


def submit(folder: Path, lightning: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the template as the first machine of a job would, with this command as `lightning`."""
    programs = {"srun": 'exec "$@"', "scontrol": f'echo "$@" > {folder}/asked', "lightning": lightning}
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_NNODES": "4", "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_JOB_ID": "77", "PYTHONPATH": str(Path(ivideogpt.__file__).parents[1]),
    }  # fmt: skip
    command = ["bash", str(RECIPES / "base" / "slurm.sbatch"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_every_stage_gets_the_jobs_machines(tmp_path: Path) -> None:
    words = [str(RECIPES / "bair.yaml"), "--print-config", "output=elsewhere"]
    done = submit(tmp_path, f"exec {sys.executable} -c '{LIGHTNING}' \"$@\"", *words)
    assert done.returncode == 0, done.stderr
    recipe = parse_yaml(done.stdout, "the printed recipe")
    assert recipe["output"] == "elsewhere"
    for stage in recipe["stages"].values():
        assert (stage["trainer"]["num_nodes"], stage["trainer"]["devices"]) == (4, 8)
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("code", "asked"), [(143, "requeue 77\n"), (2, None)])
def test_only_a_job_that_was_asked_to_end_is_queued_again(code: int, asked: str | None, tmp_path: Path) -> None:
    assert submit(tmp_path, f"exit {code}").returncode == code
    found = tmp_path / "asked"
    assert (found.read_text() if found.exists() else None) == asked
