"""EvaluationModule: a recipe's stage that measures a world model on held-out clips and writes results.json."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console

from ivideogpt.data.clips import ClipSettings, FixedClips
from ivideogpt.data.datamodule import VideoDataModule
from ivideogpt.drawing import save_comparison, save_png, strip
from ivideogpt.metrics.clips import ClipSet
from ivideogpt.metrics.evaluation import evaluate
from ivideogpt.metrics.examples import gather
from ivideogpt.metrics.judges import judges_for
from ivideogpt.metrics.measuring import BATCH_SIZE, Work
from ivideogpt.metrics.protocols import CUSTOM, EvaluationProtocol, protocol_named
from ivideogpt.metrics.report import write_report
from ivideogpt.metrics.results import write_results
from ivideogpt.metrics.terminal import result_table, task_table, watching
from ivideogpt.world_model import WorldModel

RESULTS, REPORT = "results.json", "report.html"
NO_CLIP = "there is no held-out clip: give the data a `val` set or `holdout_every`"


class EvaluationModule(LightningModule):
    """Autoregressive evaluation, per task and overall (see :func:`ivideogpt.metrics.evaluation.evaluate`).

    It has nothing to train: ``trainer.test`` runs it, on any number of devices. A stage that was killed goes on with
    the video at which it stopped. What is None is as the protocol has it; anything else makes it a custom one.

    Args:
        world_model: the model.
        protocol: a preset of :mod:`ivideogpt.metrics.protocols`; ``custom`` takes the clips as the data have them.
        horizon: future frames.
        num_samples: futures a clip, of which the best counts.
        temperature: of the sampling; 0 is argmax.
        top_k: of the sampling.
        runs: how often all of it is done.
        seed: of the sampling.
        batch_size: samples that are rolled out at once.
        lpips_weights: file of the LPIPS backbone; None looks where it usually lies.
        fvd_weights: file of the FVD network; None looks where it usually lies.
        report: write ``report.html`` beside the results.
        num_examples: clips that are drawn as PNG and GIF.
        name: of the model, for the results.
        output_folder: where ``results.json`` goes; the trainer's root folder if None.
    """

    def __init__(
        self,
        world_model: WorldModel,
        protocol: str = CUSTOM,
        horizon: int | None = None,
        num_samples: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        runs: int | None = None,
        seed: int = 0,
        batch_size: int = BATCH_SIZE,
        lpips_weights: str | None = None,
        fvd_weights: str | None = None,
        report: bool = True,
        num_examples: int = 4,
        name: str | None = None,
        output_folder: str | None = None,
    ) -> None:
        super().__init__()
        self.world_model = world_model
        changes = {"horizon": horizon, "num_samples": num_samples, "temperature": temperature, "top_k": top_k,
                   "runs": runs}  # fmt: skip
        self.protocol = protocol_named(protocol).changed(**{k: v for k, v in changes.items() if v is not None})
        self.seed, self.batch_size = seed, batch_size
        self.weights = lpips_weights, fvd_weights
        self.report, self.num_examples = report, num_examples
        self.name = name
        self.output_folder = output_folder
        self.results: dict[str, Any] | None = None
        self._seen = 0

    def configure_model(self) -> None:
        """Keeps the whole model on each process, also with a strategy that would spread it."""

    def setup(self, stage: str) -> None:
        """Refuses, before anything is loaded, a protocol that is not for this model.

        Raises:
            ValueError: naming what does not fit.
        """
        self.protocol.settled(self.world_model.config)
        self._seen = 0

    def check_data(self, data: Any) -> None:
        """Refuses held-out episodes that cannot be measured by the protocol.

        Raises:
            ValueError: naming what does not fit.
        """
        self.protocol.settled(self.world_model.config)
        if isinstance(data, VideoDataModule):
            mixture = data.mixtures()[1]
            if mixture is None:
                raise ValueError(NO_CLIP)
            ClipSet(mixture, self._settled(data.val_settings, data))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Counts the clips that the trainer lets through.

        Raises:
            ValueError: if the clips are tokens.
        """
        if "video" not in batch:
            raise ValueError("an evaluation compares pixels, the clips are tokens: give the data a shard set as `val`")
        self._seen += len(batch["key"])

    def on_test_epoch_end(self) -> None:
        """Rolls out, writes and prints the results."""
        seen = int(self.trainer.strategy.reduce(torch.tensor(self._seen, device=self.device), reduce_op="sum"))
        if not seen:
            raise ValueError(NO_CLIP)
        folder = Path(self.output_folder or self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        journal, first = folder / f"{RESULTS}.journal", self.trainer.is_global_zero
        clips = self._clips(seen)
        judges = judges_for(clips.protocol, *self.weights, device=self.device)
        console = Console(quiet=not first)
        with watching(console if first and console.is_terminal else None) as watch:
            self.results = evaluate(
                self.world_model, clips, clips.protocol, judges=judges, seed=self.seed, batch_size=self.batch_size,
                name=self.name, journal=journal, keep_journal=True, watch=watch,
            )  # fmt: skip
        if self.results is None:
            return
        if self.report:
            work = Work(self.world_model, clips, clips.protocol, judges, self.seed, self.batch_size)
            write_report(self.results, gather(work, self.results), folder / REPORT)
        write_results(self.results, folder / RESULTS)
        shutil.rmtree(journal)
        self._draw(folder, clips)
        console.print(result_table(self.results))
        tasks = task_table(self.results)
        if tasks is not None:
            console.print(tasks)
        overall = self.results["overall"]["model"]
        self.log_dict({f"test/{name}": float(value) for name, value in overall.items()}, rank_zero_only=True)

    def _clips(self, seen: int) -> ClipSet:
        """The protocol's clips of the held-out episodes, at most as many as the trainer let through."""
        loader: Any = self.trainer.test_dataloaders
        dataset = getattr(loader, "dataset", None)
        if not isinstance(dataset, FixedClips):
            raise ValueError(f"an evaluation needs the fixed clips of a VideoDataModule, got {type(dataset).__name__}")
        data: Any = self.trainer
        return ClipSet(dataset.mixture, self._settled(dataset.settings, data.datamodule)).at_most(seen)

    def _settled(self, settings: ClipSettings, data: Any) -> EvaluationProtocol:
        """The protocol for this model; a custom one cuts clips as the data do."""
        protocol = self.protocol
        if protocol.name == CUSTOM and protocol.base is None:
            if settings.horizon is not None or settings.shuffle:
                raise ValueError("an evaluation needs consecutive frames: leave out `horizon` and `shuffle_frames`")
            protocol = protocol.changed(
                goal=settings.goal, stride=settings.stride, strides=settings.strides, target_rate=settings.target_rate,
                clips_per_episode=data.val_clips_per_episode,
            )  # fmt: skip
        return protocol.settled(self.world_model.config)

    def _draw(self, folder: Path, clips: ClipSet) -> None:
        if self.num_examples < 1:
            return
        batch, model, protocol = (
            clips.batch(range(min(self.num_examples, len(clips)))),
            self.world_model,
            clips.protocol,
        )
        video = batch["video"].to(self.device).float() / 255
        actions = batch["actions"].to(self.device) if protocol.actions else None
        prediction = model.rollout(
            video[:, : protocol.context_length], actions, horizon=protocol.horizon, temperature=protocol.temperature,
            top_k=protocol.top_k, generator=torch.Generator(self.device).manual_seed(self.seed),
        ).video  # fmt: skip
        save_png(folder / "examples.png", strip(video, prediction, model.config.context_length))
        save_comparison(folder / "examples.gif", video, prediction, model.config.context_length)
