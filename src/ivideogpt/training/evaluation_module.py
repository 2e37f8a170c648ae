"""EvaluationModule: rolls a world model out on held-out clips and writes what was measured to results.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.progress import track

from ivideogpt.drawing import save_comparison, save_png, strip
from ivideogpt.metrics.evaluation import evaluate_rollouts, format_table, write_results
from ivideogpt.world_model import WorldModel

RESULTS = "results.json"


class EvaluationModule(LightningModule):
    """Autoregressive evaluation, per task and overall (see :func:`ivideogpt.metrics.evaluation.evaluate_rollouts`).

    It has nothing to train: ``trainer.test`` runs it, on one device.

    Args:
        world_model: the model.
        horizon: future frames.
        num_samples: futures a clip, of which the best counts.
        temperature: of the sampling; 0 is argmax.
        top_k: of the sampling.
        seed: of the sampling.
        num_examples: clips that are drawn as PNG and GIF.
        name: of the model, for the results.
        output_folder: where ``results.json`` goes; the trainer's root folder if None.
    """

    def __init__(
        self,
        world_model: WorldModel,
        horizon: int = 10,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = 100,
        seed: int = 0,
        num_examples: int = 4,
        name: str | None = None,
        output_folder: str | None = None,
    ) -> None:
        super().__init__()
        self.world_model = world_model
        self.settings: dict[str, Any] = {
            "horizon": horizon, "num_samples": num_samples, "temperature": temperature, "top_k": top_k,
        }  # fmt: skip
        self.seed = seed
        self.num_examples = num_examples
        self.name = name
        self.output_folder = output_folder
        self.results: dict[str, Any] | None = None
        self._batches: list[dict[str, Any]] = []

    def setup(self, stage: str) -> None:
        """Refuses what the evaluation cannot do.

        Raises:
            ValueError: in a distributed run.
        """
        if self.trainer.world_size > 1:
            raise ValueError(f"the evaluation runs on one device, got {self.trainer.world_size}: set trainer.devices=1")
        self._batches = []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collects the clips, as bytes.

        Raises:
            ValueError: if the clips are tokens.
        """
        if "video" not in batch:
            raise ValueError("an evaluation compares pixels, the clips are tokens: give the data a shard set as `val`")
        self._batches.append({**batch, "video": (batch["video"] * 255).round().byte().cpu()})

    def on_test_epoch_end(self) -> None:
        """Rolls out, writes and prints the results."""
        if not self._batches:
            raise ValueError("there is no held-out clip: give the data a `val` set or `holdout_every`")
        folder = Path(self.output_folder or self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.world_model
        self.results = evaluate_rollouts(model, self._clips(), seed=self.seed, name=self.name, **self.settings)
        write_results(self.results, folder / RESULTS)
        self._draw(folder)
        Console().print(format_table(self.results))
        overall = self.results["overall"]["model"]
        self.log_dict({f"test/{name}": float(value) for name, value in overall.items()})

    def _clips(self) -> Iterator[dict[str, Any]]:
        yield from track(self._batches, "evaluate", console=Console(), disable=not Console().is_terminal)

    def _draw(self, folder: Path) -> None:
        if self.num_examples < 1:
            return
        batch, model = self._batches[0], self.world_model
        length = model.config.context_length + self.settings["horizon"]
        video = batch["video"][: self.num_examples, :length].to(self.device).float() / 255
        actions = None
        if model.config.action_dim is not None:
            actions = batch["actions"][: self.num_examples, :length].to(self.device)
        settings = {**self.settings, "num_samples": 1, "generator": torch.Generator(self.device).manual_seed(self.seed)}
        prediction = model.rollout(video[:, : model.config.context_length], actions, **settings).video
        save_png(folder / "examples.png", strip(video, prediction, model.config.context_length))
        save_comparison(folder / "examples.gif", video, prediction, model.config.context_length)
