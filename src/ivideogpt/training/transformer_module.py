"""TransformerModule: trains a transformer, and a reward head with it, on the tokens of a frozen tokenizer.

Batches hold the clips' ``video`` (B, T, C, H, W), or their ``tokens`` (B, L) where they were tokenized before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import PearsonCorrCoef

from ivideogpt.models.action_layers import ActionLayers
from ivideogpt.models.compiling import compiled
from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer, next_token_loss
from ivideogpt.rollout.engine import rollout
from ivideogpt.training.actions import (
    by_space,
    check_spaces,
    embed_batch_actions,
    fit_statistics,
    keep_action_layers_alone,
    prepare_actions,
)
from ivideogpt.training.embedding_seeds import seed_embeddings as codebook_embeddings
from ivideogpt.training.frozen_tokenizer import FrozenTokenizer, Precision, check_precision
from ivideogpt.training.lora import LoRA, add_lora, merged, trains_lora
from ivideogpt.training.module import TrainingModule
from ivideogpt.training.optim import Schedule
from ivideogpt.training.token_data import check_length, check_token_data


@dataclass
class TeacherForced:
    """Teacher-forced predictions for a clip with F future frames.

    Attributes:
        logits: (B, S, V) of the S positions from the first dynamics slot on, the only ones that have labels.
        labels: (B, S), not shifted.
        reward_hidden: (B, F, D), hidden states at the reward positions.
    """

    logits: Tensor
    labels: Tensor
    reward_hidden: Tensor


class TransformerModule(TrainingModule):
    """Next-token training of the transformer; jointly, symlog-reward regression by the reward head.

    loss = next_token_loss + reward_weight * MSE(reward head, transformed reward).

    Args:
        transformer: the model that is trained.
        tokenizer: frozen; its ``context_length`` says how many frames of a clip are context.
        reward_head: trained jointly where there is one; the batches then need rewards.
        learning_rate: peak learning rate.
        schedule: ``"cosine"`` or ``"constant"``.
        warmup_updates: updates of linear warm-up.
        weight_decay: decay of matrices (not of embeddings, norms, biases).
        betas: AdamW's.
        gradient_clip: largest gradient norm.
        reward_weight: weight of the reward loss.
        freeze: names of parts that stay as they are, of ``"transformer"``, ``"reward_head"`` and submodules of them
            such as ``"transformer.embed_tokens"``.
        action_mean: subtracted from the actions (A,); 0 if None.
        action_std: what the actions are divided by (A,); 1 if None.
        action_statistics_from_data: takes both from the training data; they are saved with the model.
        action_warmup_updates: first updates that train the action layer alone, where a fresh one meets a trained model.
        action_spaces: size of an action by the source of the data (a name or pattern), for one model of several
            embodiments: each gets an action layer of its own. The data then need ``pad_actions``.
        seed_embeddings: starts a fresh transformer with embeddings made of the codebooks
            (:func:`ivideogpt.training.embedding_seeds.seed_embeddings`); a trained one would lose its own.
        activation_checkpointing: computes each block again in the backward pass, for the memory that it saves.
        compile: compiles the blocks, the head and the frozen tokenizer (``torch.compile``): the first update takes
            minutes. On a CPU attention with dropout is faster without it.
        tokenizer_precision: of the frozen tokenizer, where batches hold pixels: ``"trainer"`` as the trainer says,
            ``"bfloat16"`` in bfloat16 whatever it says: faster, and as in bf16-mixed some ids are not float32's (4 % of
            the embedded model's for held-out recordings, `benchmarks/results/train-cpu.json`).
        residual_precision: of what the blocks hand on to each other: ``"trainer"`` as the trainer says, which is
            float32 in bf16-mixed, ``"bfloat16"`` in bfloat16 (with bf16-mixed; as FullyShardedStrategy does there),
            which halves the memory traffic between the matrix products. Weights stay float32.
        max_bad_updates: updates in a row with a loss that is not finite that are left out before the training stops.
        loss_limit: a larger loss counts as one that is not finite.
        lora: trains small matrices beside the transformer's weights, which are frozen, and its action layer.
    """

    action_mean: Tensor
    action_std: Tensor
    action_layers: ActionLayers | None

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: CompressiveTokenizer,
        reward_head: RewardHead | None = None,
        learning_rate: float = 1e-4,
        schedule: Schedule = "cosine",
        warmup_updates: int = 5000,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_clip: float | None = 1.0,
        reward_weight: float = 1.0,
        freeze: Sequence[str] = (),
        action_mean: Sequence[float] | None = None,
        action_std: Sequence[float] | None = None,
        action_statistics_from_data: bool = False,
        action_warmup_updates: int = 0,
        action_spaces: dict[str, int] | None = None,
        seed_embeddings: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002
        tokenizer_precision: Precision = "trainer",
        residual_precision: Precision = "trainer",
        max_bad_updates: int = 0,
        loss_limit: float | None = None,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__(
            learning_rate, schedule, warmup_updates, weight_decay, betas, gradient_clip, max_bad_updates, loss_limit
        )
        if tokenizer.config.vocab_size != transformer.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.config.vocab_size} token ids (slots included) and the transformer a "
                f"vocabulary of {transformer.config.vocab_size}: they do not belong together"
            )
        self.transformer = transformer
        self.transformer.recomputes = activation_checkpointing
        self.tokenizer = tokenizer
        self.reward_head = reward_head
        self.reward_weight = reward_weight
        self.layout = tokenizer.layout
        self.freeze_part("tokenizer")
        self._encode = FrozenTokenizer(tokenizer, tokenizer_precision, compile)
        self.residual_precision = check_precision("residual_precision", residual_precision)
        if compile:
            transformer.compile_blocks()
        if seed_embeddings:
            codebook_embeddings(transformer, tokenizer)
        self.lora = LoRA(**lora) if isinstance(lora, Mapping) else lora  # a recipe's is a mapping
        for name in add_lora(transformer, self.lora) if self.lora is not None else ():
            self.freeze_part(f"transformer.{name}")
        for name in freeze:
            self.freeze_by_name(name, ("transformer", "reward_head"))
        self.normalizes = action_mean is not None or action_statistics_from_data
        self.action_statistics_from_data, self.action_warmup_updates = (
            action_statistics_from_data,
            action_warmup_updates,
        )
        prepare_actions(self, action_mean, action_std, action_spaces)
        if self.lora is not None and (seed_embeddings or action_spaces or not trains_lora(transformer)):
            raise ValueError(
                f"lora does not go with seed_embeddings {seed_embeddings}, action_spaces {action_spaces} and freeze "
                f"{list(freeze)}"
            )
        self.reward_correlation = PearsonCorrCoef()

    def setup(self, stage: str) -> None:
        """Refuses token sets that were not made for this model (here, for later the weights may be of low precision).

        Raises:
            ValueError: naming what differs.
        """
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit":
            self.check_data(data)
        else:
            check_token_data(data, self.tokenizer, self.transformer)

    def check_data(self, data: Any) -> None:
        """Refuses data that the model cannot be trained on; takes the statistics of the actions from them.

        Raises:
            ValueError: naming what differs.
        """
        check_token_data(data, self.tokenizer, self.transformer)
        if getattr(data, "segment_length", None) is not None:
            check_length(data.segment_length, self.layout, self.transformer)
        if self.action_layers is not None:
            check_spaces(self.action_layers, data)
        if self.action_statistics_from_data:
            fit_statistics(self, data)

    @property
    def needs_rewards(self) -> bool:
        """Whether the data must have rewards."""
        return self.reward_head is not None

    def check_shardable(self) -> None:
        """Layers of several action spaces are not spread over processes."""
        if self.action_layers is not None:
            raise ValueError("several action spaces need whole weights on each process: use strategy=ddp")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leaves the rest as it is while a fresh action layer is warmed up."""
        if self.global_step < self.action_warmup_updates:
            keep_action_layers_alone(self)

    @torch.no_grad()
    def tokenize(self, batch: dict[str, Any]) -> Tensor:
        """Tokens (B, L) of the clips in ``batch``: its own, or those of its video by the frozen tokenizer.

        Raises:
            ValueError: if the clips are longer than the transformer's positions.
        """
        tokens = batch.get("tokens")
        frames = batch["video"].shape[1] if tokens is None else self.layout.num_frames(tokens.shape[1])
        check_length(frames, self.layout, self.transformer)
        return self._encode(batch["video"]) if tokens is None else tokens

    def predict_clip(self, batch: dict[str, Any]) -> TeacherForced:
        """Teacher-forced forward of the clips in ``batch``; logits only where there are labels.

        Raises:
            ValueError: if the transformer takes actions and the batch has none, or of another width.
        """
        layout, transformer = self.layout, self.transformer
        tokens = self.tokenize(batch)
        future = layout.num_frames(tokens.shape[1]) - layout.context_length
        embeddings = transformer.embed(tokens)
        added = embed_batch_actions(self, batch, future)
        if added is not None:
            positions = layout.slot_positions(future, tokens.device)
            embeddings = embeddings.index_add(1, positions, added.to(embeddings.dtype))
        if self.residual_precision == "bfloat16":
            embeddings = embeddings.to(torch.bfloat16)
        start = layout.context_span  # the first dynamics slot, which predicts the first label
        hidden = transformer.backbone(embeddings, start=start)
        return TeacherForced(
            logits=transformer.logits(hidden),
            labels=layout.labels(tokens)[:, start:],
            reward_hidden=hidden[:, layout.reward_positions(future, tokens.device) - start],
        )

    def reward_loss(self, predicted: Tensor, batch: dict[str, Any]) -> Tensor:
        """Mean squared error of transformed rewards ``predicted`` (B, F).

        Raises:
            ValueError: if the batch has no rewards.
        """
        assert self.reward_head is not None
        if "rewards" not in batch:
            raise ValueError("a reward head is trained, but the data have no rewards: leave reward_head out")
        target = self.reward_head.transform(self.layout.future_rewards(batch["rewards"]))
        return F.mse_loss(predicted.float(), target.float())

    def losses(self, out: TeacherForced, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Named loss terms, ``loss`` their weighted sum."""
        compiles = self.transformer.compiles and torch.is_grad_enabled()
        token_loss = compiled(next_token_loss) if compiles else next_token_loss
        terms = {"token_loss": token_loss(out.logits, out.labels)}
        terms["loss"] = terms["token_loss"]
        if self.reward_head is not None:
            terms["reward_loss"] = self.reward_loss(self.reward_head(out.reward_hidden), batch)
            terms["loss"] = terms["loss"] + self.reward_weight * terms["reward_loss"]
        return terms

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """One update."""
        terms = self.losses(self.predict_clip(batch), batch)
        self.note_loss(terms["loss"], batch)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items() if name != "loss"})
        self.log("train/loss", terms["loss"].detach(), prog_bar=True)
        return terms["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Teacher-forced metrics of held-out clips."""
        out = self.predict_clip(batch)
        logs = {f"val/{name}": value for name, value in self.losses(out, batch).items()}
        logs["val/token_accuracy"] = (out.logits[:, :-1].argmax(-1) == out.labels[:, 1:]).float().mean()
        self.log_validation(logs, batch)
        if self.reward_head is not None:
            if batch.get("key", True):  # empty in a process for which there is no clip
                rewards = self.layout.future_rewards(batch["rewards"]).float()
                self.reward_correlation.update(self.reward_head.predict(out.reward_hidden).flatten(), rewards.flatten())
            self.log("val/reward_correlation", self.reward_correlation, on_step=False, on_epoch=True)

    def imagine(self, batch: dict[str, Any], temperature: float = 1.0, top_k: int | None = 100) -> Tensor:
        """Rollouts of the clips in ``batch`` from their context, (B, T, C, H, W) in [0, 1]; the same seed each time."""
        video = batch["video"]
        transformer = self.transformer if self.lora is None else merged(self.transformer)
        generator = torch.Generator(video.device).manual_seed(0)

        def imagined(rows: Any, model: Transformer, actions: Tensor | None) -> Tensor:
            start = self.layout.context_length
            return rollout(
                self.tokenizer, model, None, video[rows, :start], actions, horizon=video.shape[1] - start,
                temperature=temperature, top_k=top_k, generator=generator,
            ).video  # fmt: skip

        if self.action_layers is None:
            takes_actions = transformer.config.action_dim is not None
            return imagined(
                slice(None), transformer, self.normalize_actions(batch["actions"]) if takes_actions else None
            )
        out = torch.empty_like(video)
        for rows, model, actions in by_space(self.action_layers, transformer, batch):
            out[rows] = imagined(rows, model, actions).to(out.dtype)
        return out

    @property
    def action_statistics(self) -> dict[str, list[float]]:
        """The normalisation as the side file of a world model holds it; empty where there is none."""
        if not self.normalizes or self.action_layers is not None:  # which hold their own
            return {}
        return {"action_mean": self.action_mean.tolist(), "action_std": self.action_std.tolist()}

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """Recorded ``actions`` (B, T, A) as the transformer gets them."""
        return (actions - self.action_mean) / self.action_std
