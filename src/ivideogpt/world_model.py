"""WorldModel: the public face, composed of a tokenizer, a transformer and, where there is one, a reward head.

B clips, T frames, t0 context frames, F = T - t0 future frames, A action size, L sequence length.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivideogpt.config import WorldModelConfig
from ivideogpt.layout import TokenLayout
from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer, next_token_loss
from ivideogpt.rollout import Rollout, Session, Speculation
from ivideogpt.rollout import rollout as roll_out
from ivideogpt.rollout.inputs import check_actions
from ivideogpt.rollout.sampling import Generators
from ivideogpt.zoo.checkpoint import Parts, load_parts, save_parts
from ivideogpt.zoo.published import Published
from ivideogpt.zoo.side_file import check_extras

if TYPE_CHECKING:
    from ivideogpt.zoo.push import Evidence, Publication


@dataclass
class WorldModelOutput:
    """Teacher-forced outputs.

    Attributes:
        logits: (B, L, vocab_size).
        loss: scalar next-token cross-entropy against the labels, None without labels.
        rewards: (B, F) on arriving at each future frame, in the simulator's units; None without a reward head.
    """

    logits: Tensor
    loss: Tensor | None
    rewards: Tensor | None


class WorldModel(nn.Module):
    """Predicts a video's future frames, and rewards, from its first frames and actions.

    ``WorldModel(config)`` has random weights; :func:`from_pretrained` loads some, :meth:`from_parts` composes modules.
    Actions that a user gives are raw, as in the recordings; where the model has action statistics they are normalised
    here and nowhere else.

    Attributes:
        tokenizer: pixels <-> tokens.
        transformer: over tokens.
        reward_head: None where the model predicts no rewards.
        extras: what the published files cannot hold, see :data:`ivideogpt.zoo.side_file.KNOWN`.
    """

    tokenizer: CompressiveTokenizer
    transformer: Transformer
    reward_head: RewardHead | None

    def __init__(self, config: WorldModelConfig, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        head = RewardHead(config.reward_head) if config.reward_head is not None else None
        self._compose(
            Parts(CompressiveTokenizer(config.tokenizer), Transformer(config.transformer), head, extras or {})
        )

    @classmethod
    def from_parts(
        cls,
        tokenizer: CompressiveTokenizer,
        transformer: Transformer,
        reward_head: RewardHead | None = None,
        extras: dict[str, Any] | None = None,
        published: Published | None = None,
    ) -> WorldModel:
        """Composes a world model of modules, which it shares and does not copy.

        Args:
            tokenizer: pixels <-> tokens.
            transformer: over the tokenizer's ids.
            reward_head: reads rewards from the transformer's hidden states.
            extras: fields of the side file, see :data:`ivideogpt.zoo.side_file.KNOWN`.
            published: what the published files of the parts held, where they were loaded from some.

        Raises:
            ValueError: if the parts do not fit each other, or the extras hold an unknown field or a wrong value.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._compose(Parts(tokenizer, transformer, reward_head, extras or {}, published or Published()))
        return model

    def _compose(self, parts: Parts) -> None:
        check_extras(parts.extras, "extras", parts.config.action_dim)  # parts.config checks that the parts fit
        self.tokenizer = parts.tokenizer
        self.transformer = parts.transformer
        self.reward_head = parts.reward_head
        self.extras = parts.extras
        self.published = parts.published

    @property
    def parts(self) -> Parts:
        """The parts as ``ivideogpt.zoo`` handles them."""
        return Parts(self.tokenizer, self.transformer, self.reward_head, self.extras, self.published)

    @property
    def config(self) -> WorldModelConfig:
        return self.parts.config

    @property
    def layout(self) -> TokenLayout:
        return self.tokenizer.layout

    @property
    def device(self) -> torch.device:
        return self.transformer.lm_head.weight.device

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """What the transformer is given for raw ``actions`` (..., A): (actions - mean) / std, or just the actions.

        Raises:
            ValueError: if the model has action statistics and ``actions`` are of another size.
        """
        if "action_mean" not in self.extras:
            return actions
        mean, std = (actions.new_tensor(self.extras[name]) for name in ("action_mean", "action_std"))
        if actions.shape[-1] != len(mean):
            raise ValueError(f"actions must be of size {len(mean)} for this model, got shape {tuple(actions.shape)}")
        return (actions - mean) / std

    def forward(self, tokens: Tensor, actions: Tensor | None = None, labels: Tensor | None = None) -> WorldModelOutput:
        """Teacher-forced logits of a clip's tokens, with the loss if ``labels`` are given.

        Args:
            tokens: (B, L) int64, as ``tokenizer.tokenize`` gives them.
            actions: (B, T, A), ``actions[:, t]`` taken at frame t, from the first context frame on. The last one leads
                out of the clip and may be left out.
            labels: (B, L) int64, -100 where no loss is computed.

        Raises:
            ValueError: if an argument does not fit the model.
        """
        layout = self.layout
        tokens = self._checked_ids("tokens", tokens, 0).to(self.device)
        num_frames = layout.num_frames(tokens.shape[1])
        num_future = num_frames - layout.context_length
        longest = self.transformer.config.max_positions
        if tokens.shape[1] > longest:
            raise ValueError(f"tokens of length {tokens.shape[1]} are beyond the model's {longest} positions")
        actions = check_actions(actions, self.transformer, (tokens.shape[0], None), self.device)
        slot_actions = None
        if actions is not None:
            if not num_frames - 1 <= actions.shape[1] <= num_frames:
                raise ValueError(
                    f"tokens of {num_frames} frames need {num_frames} actions, or {num_frames - 1} without the last "
                    f"one, got {actions.shape[1]}"
                )
            slot_actions = layout.slot_actions(self.normalize_actions(actions), num_future)
        out = self.transformer(tokens, slot_actions, layout.slot_positions(num_future, self.device))
        loss = rewards = None
        if labels is not None:
            labels = self._checked_ids("labels", labels, -100).to(self.device)
            if labels.shape != tokens.shape:
                raise ValueError(f"labels {tuple(labels.shape)} and tokens {tuple(tokens.shape)} differ in shape")
            loss = next_token_loss(out.logits, labels)
        if self.reward_head is not None:
            rewards = self.reward_head.predict(out.hidden[:, layout.reward_positions(num_future, self.device)])
        return WorldModelOutput(out.logits, loss, rewards)

    def _checked_ids(self, name: str, ids: Tensor, lowest: int) -> Tensor:
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype != torch.int64:
            given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"{name} must be int64 of shape (B, L), got {given}")
        if ids.numel():
            low, high = (int(value) for value in ids.aminmax())
            if low < lowest or high >= self.layout.vocab_size:
                raise ValueError(
                    f"{name} must lie in {lowest}..{self.layout.vocab_size - 1} for this model, got {low} to {high}"
                )
        return ids

    def rollout(
        self,
        context_frames: Tensor,
        actions: Tensor | None = None,
        horizon: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = 100,
        num_samples: int = 1,
        generator: Generators = None,
        force_slots: bool = True,
        return_frames: str | None = "all",
        precision: str | None = None,
        dynamics_ids_only: bool = False,
        speculation: Speculation | None = None,
        frame_precision: str | None = None,
    ) -> Rollout:
        """Predicts the frames, and rewards, that follow ``context_frames``.

        Args:
            context_frames: (B, t0, C, H, W) float in [0, 1]; exactly the model's context length, no more.
            actions: (B, T, A) raw, ``actions[:, t]`` taken at frame t, from the first context frame on. Frame t0 + i
                needs ``actions[:, t0 - 1 + i]``. Or (B * num_samples, T, A), each sample's own: a planner's candidates.
            horizon: number of frames to predict. None makes the video as long as ``actions``, or as long as the
                positions allow without actions.
            temperature: 0 is argmax.
            top_k: likeliest tokens that are sampled from; None for all.
            num_samples: futures a clip; row ``b * num_samples + s`` of the result is sample s of clip b.
            generator: on the model's device, or on a CPU, whose numbers are the same for every device; the same state
                gives the same video. A list has one for each row.
            force_slots: put a slot token in front of each frame; False samples every position freely.
            return_frames: ``"all"``, ``"last"`` for the context and the last predicted frame, or None for no video.
            precision: of the transformer's weights in the rollout: ``"float32"``, ``"bfloat16"``, ``"float16"``,
                ``"int8"``, or ``"auto"``: the fastest on this machine whose argmax ids are those of float32 on a short
                probe. None leaves them as they are.
            dynamics_ids_only: sample among the ids of future frames only, which is a little faster.
            speculation: draw several tokens at a time, guessed from the frame before.
            frame_precision: that frames are decoded in, ``"float32"`` or ``"bfloat16"``; None is what the device is
                fast with, bfloat16 on a GPU.

        Raises:
            ValueError: if an argument does not fit the model.
        """
        if actions is not None and "action_mean" in self.extras:
            actions = check_actions(actions, self.transformer, (None, None), self.device)
            assert actions is not None
            actions = self.normalize_actions(actions)
        return roll_out(
            self.tokenizer,
            self.transformer,
            self.reward_head,
            context_frames,
            actions=actions,
            horizon=horizon,
            temperature=temperature,
            top_k=top_k,
            num_samples=num_samples,
            generator=generator,
            force_slots=force_slots,
            return_frames=return_frames,
            precision=precision,
            dynamics_ids_only=dynamics_ids_only,
            speculation=speculation,
            frame_precision=frame_precision,
        )

    def session(
        self,
        context_frames: Tensor,
        temperature: float = 1.0,
        top_k: int | None = 100,
        generator: Generators = None,
        precision: str | None = None,
        dynamics_ids_only: bool = False,
        speculation: Speculation | None = None,
        anchor_every: int | None = None,
    ) -> Session:
        """Starts an interactive rollout after ``context_frames`` (B, t0, C, H, W), float in [0, 1].

        ``session.step(action)`` takes raw actions (B, A). Where the positions end, and every ``anchor_every`` steps if
        that is given, the latest frames become the new context. The other arguments are those of :meth:`rollout`.

        Raises:
            ValueError: if an argument does not fit the model.
        """
        return Session(
            self.tokenizer,
            self.transformer,
            self.reward_head,
            context_frames,
            temperature=temperature,
            top_k=top_k,
            generator=generator,
            normalize_actions=self.normalize_actions,
            precision=precision,
            dynamics_ids_only=dynamics_ids_only,
            speculation=speculation,
            anchor_every=anchor_every,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        context_length: int | None = None,
        action_dim: int | None = None,
        action_space: str | None = None,
    ) -> WorldModel:
        """Loads a world model, in eval mode.

        Args:
            name_or_folder: a zoo name (:func:`ivideogpt.list_models`), a folder, or a Hub id.
            revision: branch, tag or commit on the Hub.
            device: where the model goes, the CPU if None.
            dtype: what the weights are converted to, for example ``"bfloat16"``. None is float32, also where the files
                hold bfloat16; saving the model unchanged gives bfloat16 files again.
            context_length: shortens the context that the tokenizer conditions on, keeping its last frames.
            action_dim: size of the actions that will be given. A checkpoint without actions, or with another size,
                gets a fresh action layer, which adds nothing until it is trained; a warning says so.
            action_space: of a model of several embodiments, the one whose actions will be given.

        Raises:
            ValueError: if nothing that can be loaded is found (:class:`ivideogpt.zoo.hub.ModelNotFoundError`), if a
                file is not what it should be, or if an argument does not fit.
        """
        from ivideogpt.zoo.hub import resolve

        folder = resolve(name_or_folder, revision)
        parts = load_parts(folder, device, dtype, context_length, action_dim, action_space)
        if parts.action_layers is not None:
            spaces = ", ".join(map(repr, parts.action_layers.spaces))
            raise ValueError(
                f"{os.fspath(name_or_folder)} has several action spaces: give action_space, one of {spaces}"
            )
        model = cls.from_parts(parts.tokenizer, parts.transformer, parts.reward_head, parts.extras, parts.published)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | str | None = None) -> Path:
        """Writes the model to ``folder`` in the published layout, with the side file ``ivideogpt.json``.

        A save that fails or is killed leaves what was in the folder before.

        Args:
            folder: made if it does not exist.
            dtype: what the weights are converted to; None keeps them.

        Returns:
            The folder.

        Raises:
            OSError: if something cannot be written.
            ValueError: if :attr:`extras` hold an unknown field or a wrong value.
        """
        return save_parts(Path(folder), self.parts, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        tag: str | None = None,
        commit_message: str | None = None,
        card: str | None = None,
        evidence: Evidence | None = None,
        token: str | bool | None = None,
        dry_run: bool = False,
    ) -> Publication:
        """Uploads the model to the Hub as one commit; see :func:`ivideogpt.zoo.push.push_parts` for the arguments."""
        from ivideogpt.zoo.push import push_parts

        return push_parts(
            self.parts,
            repo_id,
            evidence=evidence,
            private=private,
            revision=revision,
            tag=tag,
            commit_message=commit_message,
            card=card,
            token=token,
            dry_run=dry_run,
        )


from_pretrained = WorldModel.from_pretrained
"""``ivideogpt.from_pretrained``: see :meth:`WorldModel.from_pretrained`."""
