"""Training from tokens: equal to training from pixels, resumable bit for bit, refused where it does not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from ivideogpt import recipes
from ivideogpt.data import Episode, ShardSetWriter, TokenDataModule, TokenSet, VideoDataModule
from ivideogpt.training import EvaluationModule, RewardModule, TokenizerModule, TransformerModule
from ivideogpt.training.callbacks import CodebookUsage, RolloutStrips, SeededUpdates, Throughput
from ivideogpt.training.tokenization import tokenize_clips

LENGTH = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven episodes of exactly one clip, so that the clips of pixels and of tokens are the same ones."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    rng = np.random.default_rng(1)
    with ShardSetWriter(folder) as writer:
        for index in range(7):
            video = rng.integers(0, 255, (LENGTH, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
            actions = rng.uniform(-1, 1, (LENGTH, 3)).astype(np.float32)
            rewards = np.concatenate([[0], rng.uniform(0, 3, LENGTH - 1)]).astype(np.float32)
            writer.write(f"one-{index}", Episode(video, actions, rewards, fps=5.0, source="test/one"))
    return folder


@pytest.fixture
def build(tiny_world_model) -> Callable[..., Any]:
    """``build()`` gives the same random world model each time."""
    return lambda **changes: tiny_world_model(action_dim=3, reward=True, **changes)


@pytest.fixture
def tokens(build, whole: Path, tmp_path: Path) -> Callable[..., str]:
    """``tokens(**changes)`` tokenizes the set and gives the folder."""

    def make(name: str = "tokens", seed: int = 0, length: int = LENGTH, **changes: Any) -> str:
        tokenize_clips(build(seed=seed).tokenizer, [str(whole)], tmp_path / name, length, shard_clips=3, **changes)
        return str(tmp_path / name)

    return make


def module_of(kind: str, model: Any) -> TransformerModule:
    if kind == "reward":
        return RewardModule(model.reward_head, model.transformer, model.tokenizer, learning_rate=1e-2)
    return TransformerModule(model.transformer, model.tokenizer, model.reward_head, 1e-2, warmup_updates=0)


class Losses(Callback):
    """Notes the loss and the keys of every update, and saves a checkpoint behind one of them."""

    def __init__(self, save_at: int | None = None, path: Path | None = None) -> None:
        self.save_at, self.path = save_at, path
        self.losses: list[float] = []
        self.keys: list[list[str]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.keys.append(batch["key"])
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["transformer", "reward"])
def test_updates_equal_those_from_pixels(kind: str, build, tokens, whole: Path, trainer) -> None:
    """Three updates, the same clips in the same order: the same losses, weights, and validation metrics."""
    pixels = VideoDataModule(str(whole), str(whole), LENGTH, resolution=32, batch_size=2, num_workers=0, augment=False)
    folder = tokens()
    from_tokens = TokenDataModule(folder, folder, batch_size=2, num_workers=0)
    seen = []
    for data in (pixels, from_tokens):
        losses, model = Losses(), build()
        run = trainer(max_steps=3, val_check_interval=3, limit_val_batches=4, callbacks=[SeededUpdates(0), losses])
        run.fit(module_of(kind, model), datamodule=data)
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        seen.append((losses, metrics, {name: value.detach() for name, value in model.named_parameters()}))
    (one, metrics, weights), (two, other_metrics, other_weights) = seen
    assert len(one.losses) == 3 and one.keys == two.keys
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    assert metrics == pytest.approx(other_metrics, rel=1e-4)
    assert {"val/loss", "val/token_accuracy", "val/reward_correlation"} <= metrics.keys()
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=1e-4, atol=1e-5)


def test_batch_and_labels(build, tokens, whole: Path) -> None:
    model, folder = build(), tokens()
    data = TokenDataModule(folder, batch_size=3, num_workers=0)
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())))
    assert set(batch) == {"tokens", "actions", "rewards", "clip", "key"}
    assert (batch["tokens"].dtype, tuple(batch["tokens"].shape)) == (torch.int64, (3, model.layout.sequence_length(4)))
    assert batch["clip"].tolist() == [0, 1, 2] and data.position == 3
    pixels = VideoDataModule(str(whole), None, LENGTH, resolution=32, batch_size=3, num_workers=0, augment=False)
    pixels.setup()
    videos = pixels.on_after_batch_transfer(next(iter(pixels.train_dataloader())))
    expected, labels = model.tokenizer.tokenize(videos["video"])
    assert batch["key"] == videos["key"]
    assert torch.equal(batch["tokens"], expected)
    module = module_of("transformer", model).eval()
    out = module.predict_clip(batch)
    assert torch.equal(out.labels, labels[:, model.layout.prompt_length - 1 :])
    assert torch.equal(batch["actions"], videos["actions"]) and torch.equal(batch["rewards"], videos["rewards"])
    without = TokenDataModule(folder, batch_size=3, num_workers=0, use_actions=False, use_rewards=False)
    assert set(next(iter(without.train_dataloader()))) == {"tokens", "clip", "key"}
    assert (without.action_dim, without.has_rewards, without.segment_length) == (None, False, LENGTH)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_one_that_never_stopped(workers: int, build, tokens, trainer, tmp_path: Path) -> None:
    """Bit for bit; three batches make an epoch and the checkpoint lies in the middle of the second."""
    folder, path = tokens(), tmp_path / "five.ckpt"

    def fit(losses: Losses, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        model = build(attention_dropout=0.0)
        data = TokenDataModule(folder, batch_size=2, num_workers=workers, seed=7)
        run = trainer(max_steps=8, limit_val_batches=0, callbacks=[SeededUpdates(0), losses])
        run.fit(module_of("transformer", model), datamodule=data, ckpt_path=checkpoint, weights_only=True)
        assert data.position == 16
        return {name: value.detach() for name, value in model.named_parameters()}

    whole_run, rest = Losses(5, path), Losses()
    expected = fit(whole_run)
    state = torch.load(path, weights_only=True)["TokenDataModule"]
    assert (state["position"], state["seed"], state["processes"], state["batch_size"]) == (10, 7, 1, 2)
    weights = fit(rest, path)
    assert rest.losses == whole_run.losses[5:] and rest.keys == whole_run.keys[5:]
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    passes = sorted(key for keys in whole_run.keys for key in keys)
    assert len(set(passes)) == 7 and all(passes.count(key) >= 2 for key in set(passes))  # 16 clips of 7: two passes


def test_weights_and_several_sets(build, tokens) -> None:
    one, two = tokens("one"), tokens("two", draws=2)
    assert (len(TokenSet(one)), len(TokenSet(two))) == (7, 14)
    both = TokenDataModule([one, two], batch_size=21, num_workers=0)
    batch = next(iter(both.train_dataloader()))
    assert sorted(batch["key"]) == sorted(f"one-{i}" for i in range(7) for _ in range(3))
    weighted = TokenDataModule({one: 9.0, two: 1.0}, batch_size=200, num_workers=0, epoch_batches=1)
    weighted.setup()
    assert weighted._train_clips is not None
    plain = {TokenSet(one)[i]["tokens"].numpy().tobytes() for i in range(7)}
    drawn = [clip["tokens"].numpy().tobytes() in plain for clip in map(weighted._train_clips.__getitem__, range(300))]
    assert sum(drawn) / 300 == pytest.approx(0.9, abs=0.06)
    with pytest.raises(ValueError, match="weights do not fit|must be a positive number"):
        TokenDataModule({one: 0.0}).setup()


@pytest.mark.parametrize("kind", ["transformer", "reward"])
def test_what_does_not_fit_is_refused_before_the_first_update(kind: str, build, tokens, trainer) -> None:
    folder = tokens()

    def refused(model: Any, data: TokenDataModule, message: str) -> None:
        losses = Losses()
        with pytest.raises(ValueError, match=message):
            trainer(max_steps=1, callbacks=[losses]).fit(module_of(kind, model), datamodule=data)
        assert losses.losses == []

    data = TokenDataModule(folder, batch_size=2, num_workers=0)
    refused(build(seed=1), data, r"another tokenizer: its hash is [0-9a-f]{64}, this model's is [0-9a-f]{64}")
    shorter = build()
    shorter.tokenizer.set_context_length(1)
    refused(shorter, data, "made with context_length 2, the tokenizer has 1")
    refused(build(), TokenDataModule(folder, segment_length=5), "clips of segment_length 4, wanted are 5")
    refused(build(), TokenDataModule(folder, context_length=1), "clips of context_length 2, wanted are 1")
    refused(build(), TokenDataModule(folder, use_actions=False), "actions of size 3, those of the tokens are None")
    long = TokenDataModule(tokens("long", length=40), batch_size=2, num_workers=0)
    refused(build(), long, "40 frames takes 319 positions, the transformer has 256")
    refused(build(), TokenDataModule([folder, tokens("other", seed=1)]), "do not go together: tokenizer_hash is")
    with pytest.raises(ValueError, match="no whole clip"):
        module_of(kind, build()).predict_clip({"tokens": torch.zeros(2, 100, dtype=torch.int64)})


def test_weights_of_low_precision_are_hashed_before_they_are_rounded(build, tokens, trainer) -> None:
    losses, data = Losses(), TokenDataModule(tokens(), batch_size=2, num_workers=0)
    run = trainer(max_steps=1, precision="bf16-true", limit_val_batches=0, callbacks=[losses])
    run.fit(module_of("transformer", build()), datamodule=data)
    assert len(losses.losses) == 1


def test_validation_with_pixels_or_without(build, tokens, whole: Path, trainer, tmp_path: Path) -> None:
    folder = tokens()
    run = trainer(max_steps=2, val_check_interval=2, log_every_n_steps=1,
                  callbacks=[RolloutStrips(num_clips=2), CodebookUsage(), Throughput()])  # fmt: skip
    data = TokenDataModule(folder, str(whole), batch_size=2, num_workers=0)
    run.fit(module_of("transformer", build()), datamodule=data)
    assert (tmp_path / "strips" / "update-000002.png").is_file()
    assert run.callback_metrics["train/tokens_per_second"] > 0
    with pytest.warns(UserWarning, match="no strips: the validation clips are tokens"):
        trainer(max_steps=1, val_check_interval=1, callbacks=[RolloutStrips()]).fit(
            module_of("transformer", build()), datamodule=TokenDataModule(folder, folder, batch_size=2, num_workers=0)
        )
    with pytest.raises(ValueError, match="an evaluation compares pixels"):
        trainer().test(EvaluationModule(build(), horizon=2), TokenDataModule(folder, folder, num_workers=0))
    with pytest.raises(ValueError, match="val mixes token sets and shard sets"):
        TokenDataModule(folder, [folder, str(whole)]).setup()


RANKS = """
import json, sys
import torch
from lightning.pytorch import LightningModule, Trainer
from ivideogpt.data import TokenDataModule

class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained += batch["clip"].tolist()
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["key"]

    def on_fit_end(self):
        json.dump([self.trained, self.validated], open(f"{sys.argv[2]}-{self.global_rank}.json", "w"))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)

torch.set_num_threads(1)
trainer = Trainer(
    max_steps=3, accelerator="cpu", devices=2, strategy="ddp_fork", num_sanity_val_steps=0, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, val_check_interval=3,
    check_val_every_n_epoch=None,
)
data = TokenDataModule(sys.argv[1], sys.argv[1], batch_size=2, num_workers=2, epoch_batches=3)
trainer.fit(Recorder(), datamodule=data)
"""


def test_two_ranks_share_the_clips(tokens, tmp_path: Path) -> None:
    import json

    command = [sys.executable, "-c", RANKS, tokens(), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert result.returncode == 0, result.stderr
    (clips_0, keys_0), (clips_1, keys_1) = (json.loads((tmp_path / f"out-{i}.json").read_text()) for i in (0, 1))
    assert (clips_0, clips_1) == ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])
    assert sorted(keys_0 + keys_1) == [f"one-{i}" for i in range(7)]


def test_a_recipe_refuses_a_tokenizer_that_learns_from_tokens(build, tokens) -> None:
    from ivideogpt.recipes.stage import check_fit

    folder = tokens()
    with pytest.raises(ValueError, match=r"stages\.first: a tokenizer is trained on pixels, the data are tokens"):
        check_fit(TokenizerModule(build().tokenizer, perceptual_weight=0.0), TokenDataModule(folder), "first")
    check_fit(module_of("transformer", build()), TokenDataModule(folder), "second")
    with pytest.raises(ValueError, match="no class 'TokensDataModule'"):
        recipes.load("debug", ["transformer.data.class_path=ivideogpt.data.TokensDataModule"])
