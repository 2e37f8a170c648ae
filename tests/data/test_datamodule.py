"""The data module: batches, exact resume, splits over ranks and workers, validation sets, bad records."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from ivideogpt.data import Episode, ShardError, ShardSet, VideoDataModule

Sets = Callable[..., Path]


def clips_of(module: VideoDataModule, count: int | None = None) -> list[dict[str, Any]]:
    """The first batches of the training loader, transferred."""
    batches = []
    for batch in module.train_dataloader():
        batches.append(module.on_after_batch_transfer(batch))
        if len(batches) == count:
            break
    return batches


def module_of(train: Any, **options: Any) -> VideoDataModule:
    defaults: dict[str, Any] = {"segment_length": 5, "resolution": 16, "batch_size": 2, "num_workers": 0}
    module = VideoDataModule(train, **(defaults | options))
    module.setup()
    return module


def test_batch(make_set: Sets) -> None:
    module = module_of(str(make_set(episodes=4)), augment=False)
    raw = next(iter(module.train_dataloader()))
    assert raw["video"].dtype == torch.uint8  # frames travel as bytes
    batch = module.on_after_batch_transfer(raw)
    assert batch["video"].shape == (2, 5, 3, 16, 16)
    assert batch["video"].dtype == torch.float32
    assert torch.equal(batch["video"], raw["video"] / 255)
    assert (batch["actions"].shape, batch["actions"].dtype) == ((2, 5, 4), torch.float32)
    assert (batch["rewards"].shape, batch["rewards"].dtype) == ((2, 5), torch.float32)
    assert batch["clip"].tolist() == [0, 1]
    assert len(batch["key"]) == 2
    assert (module.action_dim, module.has_rewards, module.resolution) == (4, True, 16)


def test_frames_actions_and_rewards_belong_together(make_set: Sets) -> None:
    folder = make_set(episodes=6)
    shards = ShardSet(folder)
    episodes = {shards.key(i): shards.episode(i) for i in range(len(shards))}
    module = module_of(str(folder), augment=False, stride=2)
    for batch in clips_of(module):
        for i, key in enumerate(batch["key"]):
            episode = episodes[key]
            assert episode is not None
            numbers = (batch["video"][i, :, 0, 0, 0] * 255).round().int().numpy()  # the frame's number is in its corner
            assert (np.diff(numbers) == 2).all()
            np.testing.assert_array_equal(batch["actions"][i], episode.actions[numbers])  # type: ignore[index]
            np.testing.assert_array_equal(batch["rewards"][i], episode.rewards[numbers])  # type: ignore[index]


def test_same_seed_same_clips(make_set: Sets) -> None:
    folder = str(make_set(episodes=6))
    runs = [clips_of(module_of(folder, seed=seed, horizon=8, shuffle_frames=True)) for seed in (1, 1, 2)]
    for one, two in zip(runs[0], runs[1], strict=True):
        assert one["key"] == two["key"]
        assert torch.equal(one["video"], two["video"])
    assert [batch["key"] for batch in runs[0]] != [batch["key"] for batch in runs[2]]


def test_augmentation_is_of_the_clip(make_set: Sets) -> None:
    """Clip number 3 looks the same whatever batch it is in; validation clips are left alone."""
    folder = str(make_set(episodes=8))
    module = module_of(folder, val=folder)
    one = module.on_after_batch_transfer(next(iter(module.train_dataloader())))["video"][1]
    wider = module_of(folder, batch_size=4)
    assert torch.equal(one, wider.on_after_batch_transfer(next(iter(wider.train_dataloader())))["video"][1])
    plain = module_of(folder, augment=False)
    assert not torch.equal(one, clips_of(plain, 1)[0]["video"][1])
    raw = next(iter(module.val_dataloader()))
    assert torch.equal(module.on_after_batch_transfer(raw)["video"], raw["video"] / 255)


def test_goal_and_resize(make_set: Sets) -> None:
    module = module_of(str(make_set()), goal=True, resolution=8, augment=False)
    batch = clips_of(module, 1)[0]
    assert batch["video"].shape == (2, 5, 3, 8, 8)
    assert torch.equal(batch["video"][:, 0], batch["video"][:, -1])
    assert (batch["actions"][:, 0] == 0).all()


def test_validation_is_exact(make_set: Sets) -> None:
    folders = [str(make_set(name, episodes=3)) for name in ("a", "b")]
    module = module_of(folders[0], val=folders, val_batch_size=4)
    keys = [key for batch in module.val_dataloader() for key in batch["key"]]
    assert sorted(keys) == sorted(f"{name}-00{i}" for name in "ab" for i in range(3))
    again = [batch["video"] for batch in module_of(folders[0], val=folders, val_batch_size=4).val_dataloader()]
    assert all(torch.equal(x["video"], y) for x, y in zip(module.val_dataloader(), again, strict=True))
    several = module_of(folders[0], val=folders[0], val_clips_per_episode=3, val_segment_length=4)
    batches = list(several.val_dataloader())
    assert sum(len(batch["key"]) for batch in batches) == 9
    assert batches[0]["video"].shape[1] == 4
    starts = torch.cat([batch["video"][:, 0, 0, 0, 0] for batch in batches]).tolist()
    assert starts == [0, 4, 8, 0, 4, 9, 0, 5, 10]


def test_holdout(make_set: Sets) -> None:
    module = module_of(str(make_set(episodes=10)), holdout_every=4, batch_size=8)
    held = [key for batch in module.val_dataloader() for key in batch["key"]]
    assert held == ["set-003", "set-007"]
    assert set(clips_of(module)[0]["key"]) == {f"set-00{i}" for i in range(10)} - set(held)


def test_weighted_mixture(make_set: Sets) -> None:
    weights = {str(make_set("a", episodes=4)): 1.0, str(make_set("b", episodes=4)): 9.0}
    module = module_of(weights, batch_size=50, epoch_batches=6, augment=False)
    keys = [key for batch in clips_of(module) for key in batch["key"]]
    assert len(keys) == 300
    assert sum(key.startswith("b") for key in keys) / 300 == pytest.approx(0.9, abs=0.05)


class Recorder(lightning.LightningModule):
    """Notes what it is trained and validated on; saves a checkpoint after `save_at` batches, or dies in a batch."""

    def __init__(self, save_at: int | None = None, path: Path | None = None, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.save_at, self.path, self.fail_at = save_at, path, fail_at
        self.seen: list[tuple[list[int], float]] = []
        self.validated: list[str] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.fail_at == len(self.seen):
            raise KeyboardInterrupt
        self.seen.append((batch["clip"].tolist(), float(batch["video"].sum())))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated += batch["key"]

    def on_train_batch_end(self, *args: Any) -> None:
        if self.save_at == len(self.seen):
            self.trainer.save_checkpoint(self.path)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(model: Recorder, module: VideoDataModule, steps: int, checkpoint: Path | None = None) -> None:
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=module, ckpt_path=checkpoint, weights_only=True)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about the number of workers
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_it_would_have_seen(make_set: Sets, tmp_path: Path, workers: int) -> None:
    """Three batches make an epoch: the checkpoints lie in the middle of one, at its end and in a later one."""
    folder = str(make_set(episodes=7))
    options: dict[str, Any] = {"val": folder, "num_workers": workers}
    whole = Recorder()
    module = module_of(folder, **options)
    fit(whole, module, 8)
    assert module.position == 16
    assert [clip for clips, _ in whole.seen for clip in clips] == list(range(16))
    assert sorted(set(whole.validated)) == [f"set-00{i}" for i in range(7)]
    for done in (2, 3, 5) if workers == 0 else (5,):
        path = tmp_path / f"{done}.ckpt"
        fit(Recorder(done, path), module_of(folder, **options), 8)
        state = torch.load(path, weights_only=True)["VideoDataModule"]
        assert (state["position"], state["seed"]) == (2 * done, 0)
        rest, module = Recorder(), module_of(folder, **options)
        fit(rest, module, 8, path)
        assert rest.seen == whole.seen[done:]
        assert module.position == 16


@pytest.mark.filterwarnings("ignore")
def test_a_batch_without_its_update_comes_again(make_set: Sets, tmp_path: Path) -> None:
    """A checkpoint written while a batch is in flight, as on an exception, does not count that batch."""
    folder = str(make_set(episodes=7))

    class Saver(lightning.Callback):
        def on_exception(self, trainer: lightning.Trainer, model: lightning.LightningModule, error: Any) -> None:
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    model, module = Recorder(fail_at=4), module_of(folder)
    trainer = lightning.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Saver()],
    )  # fmt: skip
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(model, datamodule=module)
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["VideoDataModule"]["position"] == 8


def test_another_seed_is_not_a_continuation(make_set: Sets) -> None:
    module = module_of(str(make_set()), seed=3)
    with pytest.raises(ValueError, match="data seed 4, this run has 3"):
        module.load_state_dict({"position": 8, "seed": 4})


def test_position_outlives_another_batch_size(make_set: Sets) -> None:
    module = module_of(str(make_set(episodes=8)), batch_size=3)
    module.load_state_dict({"position": 4, "seed": 0})
    assert clips_of(module, 1)[0]["clip"].tolist() == [4, 5, 6]


RANKS = """
import json, sys
import lightning, torch
from ivideogpt.data.datamodule import VideoDataModule

class Recorder(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch["clip"].tolist())
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["key"]

    def on_fit_end(self):
        json.dump([self.trained, self.validated], open(f"{sys.argv[2]}-{self.global_rank}.json", "w"))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)

torch.set_num_threads(1)
module = VideoDataModule(
    sys.argv[1], val=sys.argv[1], segment_length=5, resolution=16, batch_size=2, num_workers=2
)
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", devices=2, strategy="ddp_fork", num_sanity_val_steps=0, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Recorder(), datamodule=module)
"""


def test_two_processes_with_two_workers(make_set: Sets, tmp_path: Path) -> None:
    """No clip is lost and none comes twice, in training and in validation (13 clips do not divide by 2)."""
    (tmp_path / "ranks.py").write_text(RANKS)
    folder = make_set(episodes=13, lengths=[12])
    command = [sys.executable, str(tmp_path / "ranks.py"), str(folder), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert result.returncode == 0, result.stderr
    (batches_0, keys_0), (batches_1, keys_1) = (json.loads((tmp_path / f"out-{i}.json").read_text()) for i in (0, 1))
    assert batches_0 == [[0, 1], [4, 5], [8, 9]]
    assert batches_1 == [[2, 3], [6, 7], [10, 11]]
    assert len(keys_0) + len(keys_1) == 13
    assert sorted(keys_0 + keys_1) == [f"set-{i:03d}" for i in range(13)]


def spoil(folder: Path, index: int) -> None:
    """Flips a byte in the middle of an episode's image blocks."""
    path, offset, size = ShardSet(folder).place(index)
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:episode set-")
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_record(make_set: Sets, workers: int) -> None:
    folder = make_set(episodes=6, lengths=[8])  # one block an episode, so that every clip meets the bad byte
    spoil(folder, 2)
    with pytest.raises(ShardError, match="set-002: bad image block"):
        clips_of(module_of(str(folder), num_workers=workers))
    module = module_of(str(folder), val=str(folder), policy="skip", num_workers=workers)
    keys = [key for batch in clips_of(module) for key in batch["key"]]
    held = [key for batch in module.val_dataloader() for key in batch["key"]]
    assert len(keys) == 6
    assert "set-002" not in keys
    assert held == [f"set-00{i}" for i in (0, 1, 3, 4, 5)]
    assert module.skipped == 2  # once when the validation set was checked, once in training


@pytest.mark.filterwarnings("ignore:episode set-")
def test_everything_is_bad(make_set: Sets) -> None:
    folder = make_set(episodes=2, lengths=[8])
    for i in range(2):
        spoil(folder, i)
    with pytest.raises(RuntimeError, match="every episode of the training set is bad"):
        clips_of(module_of(str(folder), policy="skip"))
    with pytest.raises(ValueError, match="every clip of the validation set is bad"):
        module_of(str(folder), val=str(folder), policy="skip")


def test_action_widths_that_differ(make_set: Sets) -> None:
    folders = [str(make_set(name, episodes=2, action_dim=dim)) for name, dim in (("a", 4), ("b", 5), ("c", None))]
    with pytest.raises(ValueError, match=r"action_dim is 4 \(a-000 of .*, 5 \(b-000 .* use_actions=False"):
        module_of(folders[:2])
    with pytest.raises(ValueError, match="action_dim is 4 .* None"):
        module_of(folders[0], val=folders[2])
    module = module_of(folders, use_actions=False)
    assert module.action_dim is None
    assert "actions" not in clips_of(module, 1)[0]


def test_sets_without_rewards(make_set: Sets) -> None:
    module = module_of(str(make_set(rewards=None)))
    assert module.has_rewards is False
    assert "rewards" not in clips_of(module, 1)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_length": 2, "context_length": 2}, "segment_length 2 must exceed context_length 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"global_batch_size": -2}, "global_batch_size must be at least 1, got -2"),
        ({"batch_size": 4, "global_batch_size": 8}, "batch_size 4 and global_batch_size 8 were both given"),
        ({"holdout_every": 1}, "holdout_every is 1"),
        ({"holdout_every": 2, "val": "embedded:heldout"}, "needs val=None"),
        ({"seed": -1}, "seed must not be negative"),
        ({"horizon": 3}, "horizon 3 is shorter than the 12 frames"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoDataModule(**options)


def test_train_may_not_run_commands() -> None:
    with pytest.raises(ShardError, match="pipe: runs a command"):
        VideoDataModule("pipe:id").setup()
    with pytest.raises(ValueError, match="one or more different shard sets"):
        VideoDataModule([]).setup()


def test_embedded_by_default(make_episode: Callable[..., Episode]) -> None:
    module = VideoDataModule(val="embedded:heldout", num_workers=0, batch_size=2)
    module.setup()
    assert (module.action_dim, module.has_rewards, module.resolution) == (4, True, 64)
    assert next(iter(module.train_dataloader()))["video"].shape == (2, 12, 3, 64, 64)
