"""Several processes train what one would: DDP, fully sharded, resumed, and with activation checkpointing."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ivideogpt
from ivideogpt.data.episode import Episode
from ivideogpt.data.shards import ShardSetWriter
from ivideogpt.training.checkpoints import latest_checkpoint
from ivideogpt.training.sharding import read_sharded_checkpoint

SCRIPT = Path(__file__).with_name("parallel_fit.py")
Weights = dict[str, torch.Tensor]


class Fit:
    """Starts `parallel_fit.py` in one process or several, and waits for the weights."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder = shards, folder

    def start(self, name: str, processes: int = 1, **settings: Any) -> subprocess.Popen[str]:
        """Starts a training whose files go to the folder of this name."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        whole: dict[str, Any] = {
            "kind": "transformer", "shards": str(self.shards), "folder": str(folder), "strategy": "auto",
            "data": {"batch_size": 4 // processes, "num_workers": 0}, "trainer": {"max_steps": 5},
        }  # fmt: skip
        for key, value in settings.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
        whole["trainer"].setdefault("devices", processes)
        file = folder / "settings.json"
        file.write_text(json.dumps(whole), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(file)]
        sources = str(Path(ivideogpt.__file__).parents[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": sources}
        return subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            start_new_session=True, preexec_fn=_default_signals,
        )  # fmt: skip

    def metrics(self, name: str) -> dict[str, float]:
        """The last metrics of a training."""
        return json.loads((self.folder / name / "metrics.json").read_text())

    def interrupt(self, name: str, number: int, after: int, processes: int = 1, **settings: Any) -> tuple[int, int]:
        """Sends a signal when the checkpoint of update ``after`` is there; the exit code, and the update reached."""
        process = self.start(name, processes, **settings)
        checkpoints = self.folder / name / "checkpoints"
        deadline = time.monotonic() + 200
        while not (checkpoints / f"update-{after:06d}.ckpt").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-4000:]
            time.sleep(0.02)
        if number == signal.SIGKILL:  # everything at once, as when a machine goes down
            for pid in [process.pid, *descendants(process.pid)]:
                os.kill(pid, number)
        else:
            os.killpg(process.pid, number)
        process.communicate(timeout=100)
        found = latest_checkpoint(checkpoints)
        assert found is not None
        return process.returncode, found[0]

    def __call__(self, name: str, processes: int = 1, **settings: Any) -> Weights:
        process = self.start(name, processes, **settings)
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-4000:]
        return torch.load(self.folder / name / "weights.pt", weights_only=True)


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [other for child in children for other in descendants(child)]


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test that was started in the background ignores it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def few(folder: Path, episodes: int) -> str:
    """A shard set of some episodes."""
    rng = np.random.default_rng(1)
    with ShardSetWriter(folder / "few") as writer:
        for number in range(episodes):
            video = rng.integers(0, 255, (6, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
            actions, rewards = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((6, 3), (6,)))
            rewards[0] = 0
            writer.write(f"few-{number}", Episode(video, actions, rewards, fps=5.0, source="test/few"))
    return str(folder / "few")


@pytest.fixture
def fit(shards: Path, tmp_path: Path) -> Fit:
    return Fit(shards, tmp_path)


def distance(one: Weights, other: Weights) -> float:
    """Largest difference of two weights of the same name."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def far(one: Weights, other: Weights, limit: float) -> float:
    """Share of the weights that differ by more than ``limit``.

    Where a gradient is all but zero its sign is a matter of rounding, and AdamW's first steps follow the sign: the
    convolutions have such weights.
    """
    differences = torch.cat([(one[name].double() - other[name].double()).abs().flatten() for name in one])
    return (differences > limit).double().mean().item()


def moved(kind: str, weights: Weights) -> float:
    """How far the weights are from those at the start."""
    return distance(weights, runpy.run_path(str(SCRIPT))["build"](kind).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "tokenizer"])
def test_two_processes_equal_one_with_the_doubled_batch(fit: Fit, kind: str) -> None:
    one = fit("one", kind=kind)
    two = fit("two", 2, kind=kind, strategy="ddp")
    assert moved(kind, one) > 1e-3
    assert far(one, two, 1e-6) < (1e-3 if kind == "tokenizer" else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_discriminator_in_two_processes_equals_one_with_the_doubled_batch(fit: Fit, accumulate: int) -> None:
    settings: dict[str, Any] = {"kind": "adversarial", "every": 1, "data": {"epoch_batches": 99}}
    module = {"discriminator_start": 2, "accumulate": accumulate}
    one = fit("one", **settings, module=module)
    two = fit("two", 2, strategy="ddp", **settings, module=module)
    start = runpy.run_path(str(SCRIPT))["build"]("adversarial").state_dict()
    for part in ("tokenizer.", "discriminator."):
        first, second = ({name: value for name, value in end.items() if name.startswith(part)} for end in (one, two))
        assert distance(first, {name: start[name] for name in first}) > 1e-3  # the critic has begun
        assert far(first, second, 1e-6) < 1e-3
    if accumulate > 1:  # stopped before the critic begins, it goes on to the bit
        half = fit("half", 2, strategy="ddp", **settings, module=module, trainer={"max_steps": 2})
        assert all(torch.equal(half[name], start[name]) for name in start if name.startswith("discriminator."))
        assert distance(fit("half", 2, strategy="ddp", **settings, module=module), two) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "tokenizer"])
def test_sharded_equals_ddp(fit: Fit, kind: str) -> None:
    ddp = fit("ddp", 2, kind=kind, strategy="ddp")
    sharded = fit("sharded", 2, kind=kind, strategy="sharded")
    assert moved(kind, ddp) > 1e-3
    assert far(ddp, sharded, 1e-6) < (1e-3 if kind == "tokenizer" else 1e-9)
    found = latest_checkpoint(fit.folder / "sharded" / "checkpoints")
    assert found is not None
    assert found[0] == 5 and found[1].is_dir()
    assert distance(read_sharded_checkpoint(found[1])["state_dict"], sharded) == 0


@pytest.mark.slow
def test_adapters_are_the_same_in_one_process_in_two_and_sharded(fit: Fit) -> None:
    settings: dict[str, Any] = {"module": {"lora": {"rank": 4}}}
    one = fit("one", **settings)
    assert sum(".lora_" in name for name in one) == len(one) - 4  # the action layer and the reward head
    assert max(value.abs().max().item() for name, value in one.items() if ".lora_B." in name) > 1e-3  # they were zero
    assert far(one, fit("ddp", 2, strategy="ddp", **settings), 1e-6) < 1e-9
    assert far(one, fit("sharded", 2, strategy="sharded", **settings), 1e-6) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_compiled_blocks_train_the_same_in_two_processes(fit: Fit, strategy: str, lora: dict[str, int] | None) -> None:
    module = {} if lora is None else {"lora": lora}
    eager = fit("eager", 2, strategy=strategy, module=module)
    compiled = fit("compiled", 2, strategy=strategy, module={**module, "compile": True})
    assert eager.keys() == compiled.keys()
    assert far(eager, compiled, 1e-5) < 1e-3


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"), [("transformer", "ddp"), ("transformer", "sharded"), ("adversarial", "ddp")]
)
def test_a_bad_loss_on_one_process_stops_all_with_the_same_checkpoints(fit: Fit, kind: str, strategy: str) -> None:
    settings: dict[str, Any] = {"kind": kind, "strategy": strategy}
    settings |= {"every": 1, "module": {"max_bad_updates": 2, "loss_limit": 1e6}, "trainer": {"max_steps": 20}}
    process = fit.start("run", 2, **settings, spoilt=[1, 3])
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 1
    folder = fit.folder / "run" / "checkpoints"
    kept = f"{folder / 'update-000002.ckpt'} is kept; {folder / 'update-000003.ckpt'}, whose weights gave no good loss"
    reports = [line for line in errors.splitlines() if "NonFiniteLossError: train/loss is" in line]
    assert len([line for line in reports if "on process 1 at update 5" in line and kept in line]) == 2, errors[-4000:]
    assert names(folder) == ["update-000002.ckpt", "update-000003.ckpt.diverged"]
    fit("run", 2, **settings)
    assert names(folder) == ["update-000019.ckpt", "update-000020.ckpt"]


@pytest.mark.slow
def test_a_damaged_sharded_checkpoint_is_skipped_for_the_one_before(fit: Fit) -> None:
    settings: dict[str, Any] = {"strategy": "sharded", "every": 2}
    before = fit("run", **settings)
    folder = fit.folder / "run" / "checkpoints"
    newest = folder / "update-000005.ckpt"
    assert latest_checkpoint(folder) == (5, newest)
    assert len(names(newest)) == 4
    for file in newest.iterdir():
        content = file.read_bytes()
        middle = len(content) // 2 - 8
        for damaged in (bytes(len(content)), content[:middle] + bytes(16) + content[middle + 16 :], content[:-1]):
            file.write_bytes(damaged)
            with pytest.warns(UserWarning, match=r"skipping the checkpoint .*update-000005.ckpt, which does not load"):
                assert latest_checkpoint(folder) == (4, folder / "update-000004.ckpt")
        file.write_bytes(content)
    (newest / ".metadata.crc32").unlink()  # of before there was one
    assert latest_checkpoint(folder) == (5, newest)
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    assert distance(fit("run", **settings), before) == 0
    assert distance(read_sharded_checkpoint(newest)["state_dict"], before) == 0


LONG = {"every": 5, "trainer": {"max_steps": 200}, "data": {"num_workers": 2}}
"""Long enough for a signal to come in the middle."""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_the_update_that_was_under_way(fit: Fit, processes: int) -> None:
    settings = {**LONG, "strategy": "ddp" if processes > 1 else "auto"}
    code, update = fit.interrupt("run", signal.SIGTERM, 5, processes, **settings)
    assert code == (143 if processes == 1 else 1)  # torchrun says 1 whatever its processes say
    assert 5 <= update < 200
    assert distance(fit("run", processes, **settings), fit("whole", processes, **settings)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_a_killed_run_of_two_processes_and_two_workers_is_resumed_to_the_bit(fit: Fit, strategy: str) -> None:
    settings = {**LONG, "strategy": strategy}
    code, update = fit.interrupt("run", signal.SIGKILL, 10, 2, **settings)
    assert code == -signal.SIGKILL
    assert 10 <= update < 200
    assert distance(fit("run", 2, **settings), fit("whole", 2, **settings)) == 0


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_in_another_number_of_processes(fit: Fit) -> None:
    settings: dict[str, Any] = {"every": 2, "strategy": "sharded", "module": {"schedule": "constant"}}
    fit("run", 2, **settings)
    resumed = fit("run", 1, **settings, trainer={"max_steps": 8})
    assert distance(resumed, fit("whole", 2, **settings, trainer={"max_steps": 8})) < 2e-6


@pytest.mark.slow
def test_accumulated_batches_and_recomputed_activations_change_nothing(fit: Fit) -> None:
    one = fit("one")
    small: dict[str, Any] = {"data": {"batch_size": 1, "epoch_batches": 99}, "trainer": {"accumulate_grad_batches": 2}}
    two = fit("two", 2, strategy="sharded", module={"activation_checkpointing": True}, **small)
    assert distance(one, two) < 2e-6


GLOBAL: dict[str, Any] = {"data": {"batch_size": None, "global_batch_size": 4, "epoch_batches": 3}}
"""Epochs of three updates, so that some end in between."""


@pytest.mark.slow
def test_an_update_has_the_same_clips_in_any_number_of_processes(fit: Fit) -> None:
    accumulated = fit("accumulated", **GLOBAL, trainer={"accumulate_grad_batches": 2})
    assert moved("transformer", accumulated) > 1e-3
    assert distance(accumulated, fit("two", 2, strategy="ddp", **GLOBAL)) < 1e-6


@pytest.mark.slow
def test_a_killed_run_of_one_process_goes_on_in_two(fit: Fit) -> None:
    settings: dict[str, Any] = {**GLOBAL, "every": 5}
    one = {"accumulate_grad_batches": 2, "max_steps": 40}
    code, update = fit.interrupt("run", signal.SIGKILL, 10, **settings, trainer=one)
    assert code == -signal.SIGKILL
    assert 10 <= update < 40
    resumed = fit("run", 2, **settings, strategy="ddp", trainer={"max_steps": 40})
    whole = fit("whole", **settings, trainer=one)
    assert moved("transformer", whole) > 1e-3
    assert distance(resumed, whole) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy", "episodes"),
    [("transformer", "ddp", 3), ("transformer", "ddp", 1), ("transformer", "sharded", 1), ("tokenizer", "ddp", 1)],
)
def test_each_validation_clip_counts_once(fit: Fit, kind: str, strategy: str, episodes: int) -> None:
    """Also where there are fewer of them than processes."""
    once = {"val_check_interval": 5, "check_val_every_n_epoch": None}
    settings: dict[str, Any] = {"kind": kind, "val": few(fit.folder, episodes), "trainer": once}
    fit("one", **settings)
    fit("two", 2, strategy=strategy, **settings)
    one, two = ({n: v for n, v in fit.metrics(name).items() if "val/" in n} for name in ("one", "two"))
    assert "val/loss" in one and one == pytest.approx(two, rel=1e-3, abs=1e-4)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
GPU: dict[str, Any] = {"trainer": {"accelerator": "gpu", "precision": "32-true"}}
MIXED: dict[str, Any] = {"trainer": {"accelerator": "gpu", "precision": "bf16-mixed"}}


def apart(one: Weights, other: Weights, start: Weights) -> float:
    """How far two trainings ended from each other, relative to the way that the first went."""
    ends = torch.stack([(one[name].double() - other[name].double()).norm() for name in one]).norm()
    ways = torch.stack([(one[name].double() - start[name].double()).norm() for name in one]).norm()
    return float(ends / ways)


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("kind", ["transformer", "tokenizer"])
def test_on_a_gpu_ddp_and_sharded_equal_one_process(fit: Fit, kind: str) -> None:
    one = fit("one", kind=kind, **GPU)
    assert moved(kind, one) > 1e-3
    ddp = fit("ddp", kind=kind, strategy="ddp", **GPU)
    sharded = fit("sharded", kind=kind, strategy="sharded", **GPU)
    assert far(one, ddp, 1e-5) < 1e-2
    assert far(one, sharded, 1e-5) < 1e-2
    found = latest_checkpoint(fit.folder / "sharded" / "checkpoints")
    assert found is not None and found[0] == 5
    assert distance(read_sharded_checkpoint(found[1])["state_dict"], sharded) == 0


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("strategy", ["auto", "sharded"])
def test_on_a_gpu_compiled_and_mixed_precision_go_the_same_way(fit: Fit, strategy: str) -> None:
    start = runpy.run_path(str(SCRIPT))["build"]("transformer").state_dict()
    exact = fit("exact", strategy=strategy, **GPU)
    start = {name: start[name] for name in exact}
    mixed = fit("mixed", strategy=strategy, **MIXED)
    fast = {"compile": True, "tokenizer_precision": "bfloat16", "residual_precision": "bfloat16"}
    compiled = fit("compiled", strategy=strategy, module=fast, **MIXED)
    assert 0 < apart(exact, mixed, start) < 0.5  # AdamW's first steps follow signs, also those of rounding
    assert 0 < apart(mixed, compiled, start) < 0.5
