"""GRPOModule: reinforcement learning of a world model with rewards that can be checked (RLVR-World, arXiv 2505.13934).

B clips, G futures a clip, R = B*G rows, F future frames, n tokens of a frame, S = F*(n+1) positions behind the context,
V ids. A row's own positions begin at the first dynamics slot; what lies in front of them is the same for all futures
of a clip, and goes through the transformer once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ivideogpt.metrics.lpips import LPIPS
from ivideogpt.metrics.video import mse, psnr
from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.engine import Rollout, rollout
from ivideogpt.training.optim import Schedule
from ivideogpt.training.transformer_module import TransformerModule

ADVANTAGE_EPS = 1e-6


class SharedPrefix:
    """Keys and values of the clips' contexts, with their gradient, for the rows that continue from them.

    Args:
        samples: G, rows of a clip.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.complete = False

    def update(self, layer: int, input_pos: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the context's keys and values (B, K, P, d); then puts them in front of a row's own (R, K, S, d)."""
        if not self.complete:
            self.layers.append((keys, values))
            return keys, values
        shared = (one.repeat_interleave(self.samples, dim=0) for one in self.layers[layer])
        first, second = (torch.cat(pair, dim=2) for pair in zip(shared, (keys, values), strict=True))
        return first, second


class GRPOModule(TransformerModule):
    """Group-relative policy optimisation of a transformer's rollouts.

    G futures of each clip are sampled by the rollout engine from one shared context. A future's reward is how close its
    decoded frames are to the recorded ones; its advantage is that reward normalised in its group. The loss of a sampled
    token is the clipped ratio of GRPO, plus the divergence from the model at the start (the estimator
    ``exp(d) - d - 1`` of the log-ratio d, as in GRPO), averaged over all sampled tokens. Slots are not sampled.

    Args:
        transformer: the policy.
        tokenizer: frozen.
        reward_head: frozen; with ``reward_error_weight`` its error counts.
        group_size: G.
        inner_updates: updates on the futures of one batch.
        clip_range: of the ratio.
        kl_weight: weight of the divergence; 0 does without the second model.
        l1_weight: of the frames' mean absolute error in the reward.
        perceptual_weight: of their LPIPS, which needs VGG's weights.
        reward_error_weight: of the predicted rewards' mean absolute error.
        temperature: of the sampling, and of the probabilities in the loss.
        learning_rate: peak learning rate.
        schedule: ``"constant"`` or ``"cosine"``.
        warmup_updates: updates of linear warm-up.
        weight_decay: decay of matrices.
        gradient_clip: largest gradient norm.
        action_mean: subtracted from the actions (A,); 0 if None.
        action_std: what the actions are divided by (A,); 1 if None.
        max_bad_updates: updates in a row with a loss that is not finite that are left out before the training stops.

    Raises:
        ValueError: if a group has one future only, or nothing is rewarded.
    """

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: CompressiveTokenizer,
        reward_head: RewardHead | None = None,
        group_size: int = 8,
        inner_updates: int = 1,
        clip_range: float = 0.2,
        kl_weight: float = 0.001,
        l1_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        reward_error_weight: float = 0.0,
        temperature: float = 1.0,
        learning_rate: float = 1e-5,
        schedule: Schedule = "constant",
        warmup_updates: int = 0,
        weight_decay: float = 0.0,
        gradient_clip: float | None = 1.0,
        action_mean: Sequence[float] | None = None,
        action_std: Sequence[float] | None = None,
        max_bad_updates: int = 0,
    ) -> None:
        super().__init__(
            transformer, tokenizer, reward_head, learning_rate, schedule, warmup_updates, weight_decay,
            gradient_clip=gradient_clip, freeze=() if reward_head is None else ("reward_head",),
            action_mean=action_mean, action_std=action_std, max_bad_updates=max_bad_updates,
        )  # fmt: skip
        if group_size < 2 or inner_updates < 1:
            raise ValueError(f"group_size {group_size} must be at least 2, inner_updates {inner_updates} at least 1")
        if min(clip_range, temperature) <= 0 or kl_weight < 0:
            raise ValueError(
                f"clip_range {clip_range} and temperature {temperature} must be positive, kl_weight {kl_weight} not "
                f"negative"
            )
        weights = {"l1": l1_weight, "perceptual": perceptual_weight, "reward_error": reward_error_weight}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"a future must be rewarded for something, the weights are {weights}")
        if reward_error_weight and reward_head is None:
            raise ValueError(f"reward_error_weight is {reward_error_weight}, but the model has no reward head")
        self.automatic_optimization = False
        self.group_size, self.inner_updates = group_size, inner_updates
        self.clip_range, self.kl_weight, self.weights = clip_range, kl_weight, weights
        self.temperature = temperature
        self.reference: Transformer | None = None
        if kl_weight:
            self.reference = copy.deepcopy(transformer)
            self.freeze_part("reference")

    @property
    def needs_rewards(self) -> bool:
        """Whether the error of predicted rewards counts."""
        return bool(self.weights["reward_error"])

    @property
    def uses_perceptual_network(self) -> bool:
        """Whether futures are judged by LPIPS."""
        return bool(self.weights["perceptual"])

    def configure_model(self) -> None:
        """Loads the perceptual network where it counts."""
        if self.weights["perceptual"] and not hasattr(self, "perceptual"):
            self.perceptual = LPIPS.pretrained()
            self.freeze_part("perceptual")
        super().configure_model()

    def check_shardable(self) -> None:
        """Refuses weights that are spread over processes: the rollout engine needs them whole."""
        raise ValueError("GRPO rolls the model out at each update and needs whole weights: use strategy=ddp")

    def train(self, mode: bool = True) -> GRPOModule:
        """Stays without dropout: the probabilities are those that were sampled from."""
        super().train(mode)
        self.transformer.eval()
        return self

    def futures(self, batch: dict[str, Any], samples: int, generator: torch.Generator | None = None) -> Rollout:
        """``samples`` sampled futures of each clip in ``batch``, as long as the clip."""
        video, actions = batch["video"], None
        if self.transformer.config.action_dim is not None:
            actions = self.normalize_actions(batch["actions"])
        context_length = self.layout.context_length
        return rollout(
            self.tokenizer, self.transformer, self.reward_head, video[:, :context_length], actions,
            horizon=video.shape[1] - context_length, temperature=self.temperature, top_k=None, num_samples=samples,
            generator=generator,
        )  # fmt: skip

    @torch.no_grad()
    def judge(self, imagined: Rollout, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Errors (R,) of futures by name, and ``reward``, their weighted sum with the sign turned."""
        context_length = self.layout.context_length
        samples = len(imagined.tokens) // len(batch["video"])
        truth = batch["video"][:, context_length:].repeat_interleave(samples, dim=0)  # (R, F, C, H, W)
        frames = imagined.video[:, context_length:]
        errors = {"l1": (frames - truth).abs().mean(dim=(1, 2, 3, 4))}
        if self.weights["perceptual"]:
            distances = self.perceptual(frames.flatten(0, 1), truth.flatten(0, 1))
            errors["perceptual"] = distances.reshape(truth.shape[:2]).mean(dim=1)
        if self.weights["reward_error"]:
            assert imagined.rewards is not None
            rewards = self.layout.future_rewards(batch["rewards"]).repeat_interleave(samples, dim=0)
            errors["reward_error"] = (imagined.rewards - rewards).abs().mean(dim=1)
        total = torch.stack([self.weights[name] * error for name, error in errors.items()]).sum(dim=0)
        return errors | {"reward": -total}

    def log_probabilities(self, transformer: Transformer, tokens: Tensor, batch: dict[str, Any]) -> Tensor:
        """Log-probability (R, F, n) of each sampled token, from ``tokens`` (R, L) of the futures of ``batch``."""
        layout, clips = self.layout, len(batch["video"])
        samples, span = len(tokens) // clips, layout.context_span
        future = layout.num_frames(tokens.shape[1]) - layout.context_length
        prefix = SharedPrefix(samples)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        transformer.backbone(transformer.embed(tokens[::samples, :span]), positions[:span], prefix)
        prefix.complete = True
        own = tokens[:, span:]  # slot, n ids, slot, n ids, ...
        embeddings = transformer.embed(own)
        if transformer.config.action_dim is not None:
            added = transformer.embed_actions(
                layout.slot_actions(self.normalize_actions(batch["actions"]), future)
            ).repeat_interleave(samples, dim=0)  # (R, F, D)
            slots = torch.arange(future, device=tokens.device) * layout.frame_stride
            embeddings = embeddings.index_add(1, slots, added.to(embeddings.dtype))
        hidden = transformer.backbone(embeddings, positions[span:], prefix)
        hidden = hidden.unflatten(1, (future, layout.frame_stride))[
            :, :, :-1
        ]  # what sees a frame's last id is not asked
        logits = transformer.lm_head(hidden).float() / self.temperature
        drawn = own.unflatten(1, (future, layout.frame_stride))[:, :, 1:]
        return logits.log_softmax(dim=-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)

    def policy_losses(self, new: Tensor, old: Tensor, start: Tensor | None, advantages: Tensor) -> dict[str, Tensor]:
        """Terms of the loss, of log-probabilities (R, F, n) now, when sampled and at the start, and advantages (R,)."""
        ratio, gain = (new - old).exp(), advantages[:, None, None]
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        terms = {"policy_loss": -torch.minimum(ratio * gain, clipped * gain).mean()}
        terms["clipped"] = (ratio != clipped).float().mean().detach()
        terms["loss"] = terms["policy_loss"]
        if start is not None:
            difference = start - new
            terms["kl"] = (difference.exp() - difference - 1).mean()
            terms["loss"] = terms["loss"] + self.kl_weight * terms["kl"]
        return terms

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Samples groups, judges them, and makes ``inner_updates`` updates on them."""
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        imagined = self.futures(batch, self.group_size)
        judged = self.judge(imagined, batch)
        groups = judged["reward"].unflatten(0, (-1, self.group_size))  # (B, G)
        spread = groups.std(dim=1, keepdim=True)
        advantages = ((groups - groups.mean(dim=1, keepdim=True)) / (spread + ADVANTAGE_EPS)).flatten()
        with torch.no_grad():
            start = None
            if self.reference is not None:
                start = self.log_probabilities(self.reference, imagined.tokens, batch)
        old: Tensor | None = None
        for _ in range(self.inner_updates):
            new = self.log_probabilities(self.transformer, imagined.tokens, batch)
            old = new.detach() if old is None else old
            terms = self.policy_losses(new, old, start, advantages)
            self.note_loss(terms["loss"], batch)
            optimizer.zero_grad()
            self.manual_backward(terms["loss"])
            self.configure_gradient_clipping(optimizer.optimizer)
            optimizer.step()
            schedule.step()
        logs = {name: value.mean() for name, value in judged.items()} | {"reward_spread": spread.mean()}
        logs |= {name: value.detach() for name, value in terms.items() if name != "loss"}
        self.log_dict({f"train/{name}": value for name, value in logs.items()})
        self.log("train/loss", terms["loss"].detach(), prog_bar=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Errors of one sampled future of each held-out clip, drawn with the same random numbers each time."""
        generator = torch.Generator(batch["video"].device).manual_seed(batch_idx)
        imagined = self.futures(batch, 1, generator)
        context_length = self.layout.context_length
        frames, truth = imagined.video[:, context_length:], batch["video"][:, context_length:]
        logs = {name: value.mean() for name, value in self.judge(imagined, batch).items()}
        logs |= {"psnr": psnr(frames, truth).mean(), "mse": mse(frames, truth).mean()}
        self.log_validation({f"val/{name}": value for name, value in logs.items()}, batch)
