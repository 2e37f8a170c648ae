"""Tests of the callbacks: strips, codebook usage, throughput, and what the display prints."""

from __future__ import annotations

import io

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import img_mime_type_detector

from ivideogpt.training import EvaluationModule, TokenizerModule, TransformerModule
from ivideogpt.training.callbacks import CodebookUsage, RolloutStrips, Throughput
from ivideogpt.training.progress import UpdateProgress
from ivideogpt.zoo.published import read_json


def test_callbacks_of_a_tokenizer(tiny_world_model, data, trainer, tmp_path, capsys) -> None:
    module = TokenizerModule(tiny_world_model().tokenizer, perceptual_weight=0.0)
    run = trainer(
        max_steps=4, val_check_interval=2, log_every_n_steps=2, enable_progress_bar=True,
        callbacks=[RolloutStrips(num_clips=2, keep=1), CodebookUsage(), Throughput(), UpdateProgress("tok", 0.0)],
        logger=TensorBoardLogger(tmp_path, name="", version="tensorboard"),
    )  # fmt: skip
    run.fit(module, datamodule=data(epoch_batches=4))
    assert sorted(path.name for path in (tmp_path / "strips").iterdir()) == ["update-000004.gif", "update-000004.png"]
    with Image.open(tmp_path / "strips" / "update-000004.gif") as gif:
        assert gif.n_frames > 1
    metrics = run.callback_metrics
    assert 1 <= metrics["val/context_perplexity"] <= 32
    assert 0 < metrics["val/dynamics_used"] <= 1
    assert metrics["train/frames_per_second"] > 0
    assert metrics["train/tokens_per_second"] > metrics["train/frames_per_second"]
    printed = capsys.readouterr().out
    assert "tok: 4 updates" in printed
    assert "tok: 4/4 updates" in printed
    assert "ETA 0:00:00" in printed
    assert "val/psnr" in printed
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = events.Images("val/rollouts")
    assert [image.step for image in shown] == [2, 4]
    assert img_mime_type_detector.from_bytes(shown[-1].encoded_image_string) == "image/gif"  # as TensorBoard serves it
    with Image.open(io.BytesIO(shown[-1].encoded_image_string)) as gif:
        assert gif.n_frames > 1 and gif.size == (shown[-1].width, shown[-1].height)


def test_strips_of_a_transformer_are_rollouts(tiny_world_model, data, trainer, tmp_path) -> None:
    model = tiny_world_model(action_dim=3)
    module = TransformerModule(model.transformer, model.tokenizer)
    trainer(max_steps=1, val_check_interval=1, callbacks=[RolloutStrips(1)]).fit(module, datamodule=data())
    with Image.open(tmp_path / "strips" / "update-000001.png") as picture:
        assert picture.width > picture.height
    assert module.transformer.training  # modes are given back


@pytest.mark.parametrize("settings", [{"num_clips": 0}, {"keep": 0}])
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        RolloutStrips(**settings)


def test_evaluation_writes_results_and_examples(tiny_world_model, data, trainer, tmp_path, capsys) -> None:
    model = tiny_world_model(action_dim=3, reward=True)
    module = EvaluationModule(model, horizon=2, name="tiny", num_examples=2, temperature=0.0)
    run = trainer(limit_test_batches=2)
    run.test(module, datamodule=data(), verbose=False)
    results = read_json(tmp_path / "results.json")
    assert results["overall"]["clips"] == 4
    assert results["protocol"]["horizon"] == 2
    assert results["model"] == "tiny"
    assert run.callback_metrics["test/psnr"] == pytest.approx(results["overall"]["model"]["psnr"])
    assert {path.name for path in tmp_path.iterdir()} >= {"examples.png", "examples.gif"}
    assert "tiny" in capsys.readouterr().out
