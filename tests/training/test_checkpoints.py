"""Tests of checkpoints, logs and progress: what survives a kill, a full disk, a damaged file."""

from __future__ import annotations

import csv
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ivideogpt
from ivideogpt.training import TransformerModule
from ivideogpt.training.callbacks import SeededUpdates
from ivideogpt.training.checkpoints import AtomicCheckpointIO, Checkpoints, latest_checkpoint
from ivideogpt.training.logs import MetricsCSV
from ivideogpt.training.progress import format_seconds, remaining_seconds

STATE = {"state_dict": {"x": torch.ones(3)}, "optimizer_states": [], "global_step": 1, "loops": {}}


class FullDisk:
    """Pickles as a storage whose write fails in the middle of the file."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    path = tmp_path / "update-000001.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*update-000001.ckpt.*No space left"):
        AtomicCheckpointIO().save_checkpoint({**STATE, "bad": FullDisk()}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from ivideogpt.training.checkpoints import AtomicCheckpointIO
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write behind the limit is then an error
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3), "b": torch.zeros(100_000)}, Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_what_ends_a_write_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "update-000001.ckpt"
    environment = {**os.environ, "PYTHONPATH": str(Path(ivideogpt.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], env=environment, capture_output=True, text=True, timeout=120
    )
    says = done.stderr.splitlines()[-1]
    assert f"cannot write the checkpoint {path}: [Errno 27] File too large. Earlier checkpoints are whole" in says
    assert not list(tmp_path.iterdir())


def test_newest_checkpoint_that_loads_is_taken(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for update in (5, 10):
        AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / f"update-{update:06d}.ckpt")
    damaged = tmp_path / "update-000015.ckpt"
    damaged.write_bytes((tmp_path / "update-000010.ckpt").read_bytes()[:300])
    (tmp_path / ".update-000020.ckpt.partial").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"skipping the checkpoint .*update-000015.ckpt, which does not load"):
        assert latest_checkpoint(tmp_path) == (10, tmp_path / "update-000010.ckpt")


def test_zeros_in_the_middle_of_a_checkpoint_are_found(tmp_path: Path) -> None:
    big = {**STATE, "state_dict": {"x": torch.rand(10_000)}}
    for update in (1, 2):
        AtomicCheckpointIO().save_checkpoint(big, tmp_path / f"update-{update:06d}.ckpt")
    with open(tmp_path / "update-000002.ckpt", "r+b") as file:
        file.seek(20_000)
        file.write(bytes(4096))
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "update-000002.ckpt")["global_step"] == 1  # torch does not
    with pytest.warns(UserWarning, match=r"update-000002.ckpt, which does not load: .*checksum of '.*data/0' is wrong"):
        assert latest_checkpoint(tmp_path) == (1, tmp_path / "update-000001.ckpt")


@pytest.mark.parametrize("key", list(STATE))
def test_a_checkpoint_without_what_a_resume_needs_is_skipped(tmp_path: Path, key: str) -> None:
    state = {name: value for name, value in STATE.items() if name != key}
    AtomicCheckpointIO().save_checkpoint(state, tmp_path / "update-000001.ckpt")
    with pytest.warns(UserWarning, match=rf"update-000001.ckpt has no {key}"):
        assert latest_checkpoint(tmp_path) is None


def test_halves_and_damaged_checkpoints_do_not_count(tiny_world_model, data, trainer, tmp_path) -> None:
    folder = tmp_path / "run"

    def model():
        return tiny_world_model(action_dim=3, reward=True)

    fit(model(), data, trainer, folder, 4)
    whole = (folder / "update-000004.ckpt").read_bytes()
    (folder / "update-000001.ckpt").write_bytes(whole[:300])  # older than what the run starts from
    (folder / "update-000003.ckpt").write_bytes(whole[:300])
    (folder / "update-000999.ckpt").write_bytes(whole[:300])
    (folder / ".update-000777.ckpt.partial").write_bytes(b"half")
    (folder / ".update-000778.ckpt.partial").mkdir()
    with pytest.warns(UserWarning, match="the checkpoint .*which does not load"):
        fit(model(), data, trainer, folder, 7, resume=True)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["update-000006.ckpt", "update-000007.ckpt", "update-000999.ckpt.unused"]


def test_a_checkpoint_that_does_not_say_where_the_data_stood_is_told(tiny_world_model, data, trainer, tmp_path) -> None:
    fit(tiny_world_model(action_dim=3, reward=True), data, trainer, tmp_path / "run", 2)
    path = tmp_path / "run" / "update-000002.ckpt"
    state = AtomicCheckpointIO().load_checkpoint(path)
    del state["VideoDataModule"]
    AtomicCheckpointIO().save_checkpoint(state, path)
    with pytest.warns(UserWarning, match="does not say where VideoDataModule stood: its clips begin anew"):
        fit(tiny_world_model(action_dim=3, reward=True), data, trainer, tmp_path / "run", 3, resume=True)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**STATE, "evil": Evil()}, tmp_path / "update-000001.ckpt")
    (tmp_path / "update-000002.ckpt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.warns(UserWarning, match="skipping the checkpoint"):
        assert latest_checkpoint(tmp_path) is None
    assert not (tmp_path / "ran").exists()


def fit(model, data, trainer, folder: Path, updates: int, resume: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(1 + resume)  # the state of the generators at the start must not matter
    module = TransformerModule(model.transformer, model.tokenizer, model.reward_head, learning_rate=1e-2,
                               warmup_updates=2)  # fmt: skip
    attention: Any = module.transformer.layers[0].self_attn
    attention.dropout = 0.3
    callbacks = [SeededUpdates(7), Checkpoints(every_n_updates=2, folder=str(folder))]
    found = latest_checkpoint(folder) if resume else None
    assert (found is not None) is resume
    run = trainer(max_steps=updates, callbacks=callbacks, enable_checkpointing=True, val_check_interval=3,
                  check_val_every_n_epoch=None)  # fmt: skip
    run.fit(module, datamodule=data(epoch_batches=4), ckpt_path=found and found[1], weights_only=True)
    assert run.global_step == updates
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumed_training_equals_one_that_never_stopped(tiny_world_model, data, trainer, tmp_path, stop) -> None:
    class StopError(Exception):
        pass

    def model():
        return tiny_world_model(action_dim=3, reward=True)

    straight = fit(model(), data, trainer, tmp_path / "straight", 7)
    files = sorted(path.name for path in (tmp_path / "straight").iterdir())
    assert files == ["update-000006.ckpt", "update-000007.ckpt"]
    broken = TransformerModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == stop:
            raise StopError
        return broken(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerModule, "training_step", training_step)
        with pytest.raises(StopError):
            fit(model(), data, trainer, tmp_path / "broken", 7)
    resumed = fit(model(), data, trainer, tmp_path / "broken", 7, resume=True)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_metrics_csv_goes_on_where_the_resumed_run_does(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    log.log_metrics({"train/loss": 3.0}, 0)
    log.log_metrics({"train/loss": 2.0}, 5)
    log.log_metrics({"val/loss": float(torch.tensor(2.5))}, 5)
    log.log_metrics({"train/loss": 1.0}, 10)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("11")  # a kill in the middle of a row
    log = MetricsCSV(tmp_path, resume_step=8)
    log.log_metrics({"train/loss": 1.5}, 10)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows] == [
        ("0", "3", ""), ("5", "2", ""), ("5", "", "2.5"), ("10", "1.5", ""),
    ]  # fmt: skip


def test_remaining_time_counts_this_start_only() -> None:
    assert remaining_seconds(start=900, done=900, total=1000, elapsed=0.0) is None
    assert remaining_seconds(start=900, done=910, total=1000, elapsed=20.0) == pytest.approx(180.0)
    assert [format_seconds(value) for value in (None, 5.4, 3661.0)] == ["?", "0:00:05", "1:01:01"]


@pytest.mark.parametrize("settings", [{"every_n_updates": 0}, {"keep": 0}])
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Checkpoints(**settings)
