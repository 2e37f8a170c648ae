"""The SLURM template: its tasks run a recipe together, and a job that was asked to end goes back into the queue.

SLURM itself is not here. What stands for `srun` starts as many tasks as the job has, with the variables that SLURM
gives them, hands a signal on to them and ends with the highest of their exit codes, as SLURM's does; `scontrol` writes
down what it was asked.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ivideogpt
from ivideogpt.recipes.reading import parse_yaml
from ivideogpt.recipes.results import read_record

RECIPES = Path(__file__).parents[2] / "recipes"
LIGHTNING = "import sys; from ivideogpt.cli import lightning_main; sys.exit(lightning_main(sys.argv[1:]))"
SRUN = """#!{python}
import os, signal, subprocess, sys, time
number, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
command = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
kills = len(command) < len(sys.argv) - 1
tasks = []
for rank in range(number):
    node, local = divmod(rank, number // nodes)
    place = dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(local), SLURM_NODEID=str(node))
    tasks.append(subprocess.Popen(command, env=dict(os.environ, **place)))
signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
while any(task.poll() is None for task in tasks):
    time.sleep(0.05)
    if kills and any(task.poll() for task in tasks):
        time.sleep(1)
        [task.kill() for task in tasks if task.poll() is None]
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""


def start(folder: Path, lightning: str, *words: str, nodes: int = 1, tasks: int = 2) -> subprocess.Popen[str]:
    """Starts the template as the first machine of a job would, with this command as `lightning`."""
    programs = {
        "srun": SRUN.format(python=sys.executable), "scontrol": f'#!/bin/sh\necho "$@" > {folder}/asked\n',
        "lightning": f"#!/bin/sh\n{lightning}\n",
    }  # fmt: skip
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_NNODES": str(nodes), "MASTER_PORT": str(port),
        "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_NTASKS": str(nodes * tasks), "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "ivideogpt", "SLURM_NODELIST": "localhost", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(ivideogpt.__file__).parents[1]),
    }  # fmt: skip
    command = ["bash", str(RECIPES / "base" / "slurm.sbatch"), *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def run(folder: Path, lightning: str, *words: str, nodes: int = 1, tasks: int = 2) -> tuple[int, str, str]:
    """Exit code and what was printed."""
    process = start(folder, lightning, *words, nodes=nodes, tasks=tasks)
    out, errors = process.communicate(timeout=200)
    return process.returncode, out, errors


def real() -> str:
    return f"exec {sys.executable} -c '{LIGHTNING}' \"$@\""


def test_every_stage_gets_the_jobs_machines(tmp_path: Path) -> None:
    only_first = f'[ "$SLURM_PROCID" = 0 ] || exit 0\n{real()}'  # eight imports say nothing more than one
    words = [str(RECIPES / "bair.yaml"), "--print-config", "output=elsewhere"]
    code, out, errors = run(tmp_path, only_first, *words, nodes=4)
    assert code == 0, errors
    recipe = parse_yaml(out, "the printed recipe")
    assert recipe["output"] == "elsewhere"
    for stage in recipe["stages"].values():
        assert (stage["trainer"]["num_nodes"], stage["trainer"]["devices"]) == (4, 2)
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("codes", "asked"), [((143, 143), "requeue 77\n"), ((2, 137), None), ((0, 2), None)])
def test_only_a_job_that_was_asked_to_end_is_queued_again(codes: tuple[int, int], asked: str | None, tmp_path) -> None:
    first, second = codes
    code, _, _ = run(tmp_path, f'[ "$SLURM_PROCID" = 0 ] && exit {first}\nexit {second}')
    assert code == max(codes)
    found = tmp_path / "asked"
    assert (found.read_text() if found.exists() else None) == asked


@pytest.mark.slow
def test_two_tasks_train_one_model_are_asked_to_end_and_go_on(recipe, tmp_path: Path) -> None:
    words = [str(recipe(stages=("tokenizer",))), "trainer.strategy=ddp", "trainer.max_steps=300"]
    process = start(tmp_path, real(), *words)
    checkpoints = tmp_path / "out" / "tokenizer" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("update-*.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-4000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)  # the script and its tasks, as at a time limit
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors[-4000:]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert errors.count("SIGTERM: saved at update") == 1
    saved = max(int(path.stem.rpartition("-")[2]) for path in checkpoints.iterdir())
    assert 2 <= saved < 300
    words[-1] = f"trainer.max_steps={saved + 2}"
    code, out, errors = run(tmp_path, real(), *words, "on_change=continue")
    assert code == 0, errors[-4000:]
    assert out.count("tokenizer: finished in") == 1
    record = read_record(tmp_path / "out" / "tokenizer")
    assert record is not None
    assert (record["state"], record["updates"]) == ("finished", saved + 2)
