"""TokenLayout: the only place that knows where a clip's tokens, slots, labels, actions and rewards stand.

Notation: B batch, T frames, t0 context frames, F = T - t0 future frames, N context tokens a frame (256 on the
published 16 x 16 grid), n dynamics tokens a frame (16), L sequence length, A action size.

    [N ids] ctx-slot [N ids] ... ctx-slot [N ids] | dyn-slot [n ids] | dyn-slot [n ids] | ...

The slot in front of the very first frame is left out, so L = (N+1) t0 - 1 + (n+1) F. Ids 0..codebook_size-1 are
context ids, the next dynamics_codebook_size are dynamics ids, then the context slot and the dynamics slot.
Source: arXiv 2405.15223, section 3, and the layout of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that no loss is computed for (the default of ``torch.nn.functional.cross_entropy``)."""


@dataclass(frozen=True)
class TokenLayout:
    """Token arithmetic of one model.

    Args:
        context_length: context frames t0 of a clip (the goal frame counted in, where there is one).
        context_tokens_per_frame: N, tokens of a context frame.
        dynamics_tokens_per_frame: n, tokens of a future frame.
        codebook_size: entries of the context codebook.
        dynamics_codebook_size: entries of the dynamics codebook.
    """

    context_length: int
    context_tokens_per_frame: int
    dynamics_tokens_per_frame: int
    codebook_size: int
    dynamics_codebook_size: int

    @property
    def context_slot_id(self) -> int:
        return self.codebook_size + self.dynamics_codebook_size

    @property
    def dynamics_slot_id(self) -> int:
        return self.context_slot_id + 1

    @property
    def vocab_size(self) -> int:
        return self.dynamics_slot_id + 1

    @property
    def frame_stride(self) -> int:
        """Positions of one future frame: its slot and its n ids."""
        return self.dynamics_tokens_per_frame + 1

    @property
    def context_span(self) -> int:
        """Positions of all context frames, the missing first slot taken off."""
        return self.context_length * (self.context_tokens_per_frame + 1) - 1

    @property
    def prompt_length(self) -> int:
        """Positions of a rollout's prompt: the context and the first dynamics slot."""
        return self.context_span + 1

    def sequence_length(self, num_frames: int) -> int:
        """Length L of a clip of ``num_frames`` frames (context included)."""
        if num_frames < self.context_length:
            raise ValueError(f"a clip of {num_frames} frames is shorter than the context of {self.context_length}")
        return self.context_span + self.frame_stride * (num_frames - self.context_length)

    def num_frames(self, sequence_length: int) -> int:
        """Number of frames T of a sequence, the inverse of :meth:`sequence_length`."""
        future, rest = divmod(sequence_length - self.context_span, self.frame_stride)
        if future < 0 or rest:
            raise ValueError(
                f"a sequence of {sequence_length} tokens is no whole clip: expected {self.context_span} "
                f"+ {self.frame_stride} per future frame (context_length {self.context_length})"
            )
        return self.context_length + future

    def max_horizon(self, max_positions: int) -> int:
        """Largest number of future frames whose tokens all fit into ``max_positions``."""
        return max((max_positions - self.context_span) // self.frame_stride, 0)

    def slot_positions(self, num_future: int, device: torch.device | None = None) -> Tensor:
        """Positions (F,) of the dynamics slots."""
        return self.context_span + self.frame_stride * torch.arange(num_future, device=device)

    def reward_positions(self, num_future: int, device: torch.device | None = None) -> Tensor:
        """Positions (F,) of the last dynamics token of each future frame, where the reward is read."""
        return self.slot_positions(num_future, device) + self.dynamics_tokens_per_frame

    def slot_actions(self, actions: Tensor, num_future: int) -> Tensor:
        """Actions (B, F, A) that lead to the future frames, out of ``actions`` (B, T, A) taken at each frame."""
        start = self.context_length - 1
        if actions.shape[1] < start + num_future:
            raise ValueError(
                f"{num_future} future frames after {self.context_length} context frames need at least "
                f"{start + num_future} actions (from the first context frame on), got {actions.shape[1]}"
            )
        return actions[:, start : start + num_future]

    def future_rewards(self, rewards: Tensor) -> Tensor:
        """Rewards (B, F) received on arriving at the future frames, out of ``rewards`` (B, T)."""
        return rewards[:, self.context_length :]

    def prompt(self, context_indices: Tensor) -> Tensor:
        """Prompt (B, prompt_length) of a rollout from ``context_indices`` (B, t0, N)."""
        batch = context_indices.shape[0]
        slot = context_indices.new_full((batch, self.context_length, 1), self.context_slot_id)
        context = torch.cat([slot, context_indices], dim=2).flatten(1)[:, 1:]
        return torch.cat([context, context.new_full((batch, 1), self.dynamics_slot_id)], dim=1)

    def assemble(self, context_indices: Tensor, dynamics_indices: Tensor) -> Tensor:
        """Tokens (B, L) from codebook indices ``context_indices`` (B, t0, N) and ``dynamics_indices`` (B, F, n)."""
        batch, future = dynamics_indices.shape[:2]
        slot = dynamics_indices.new_full((batch, future, 1), self.dynamics_slot_id)
        dynamics = torch.cat([slot, dynamics_indices + self.codebook_size], dim=2).flatten(1)
        return torch.cat([self.prompt(context_indices)[:, :-1], dynamics], dim=1)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook indices (B, t0, N) and (B, F, n) of ``tokens`` (B, L), slots ignored.

        Ids outside of their codebook, which a sampled sequence may hold, are clamped into it.
        """
        batch = tokens.shape[0]
        future = self.num_frames(tokens.shape[1]) - self.context_length
        padded = torch.cat([tokens[:, :1], tokens], dim=1)  # a stand-in for the slot that is left out
        context = padded[:, : self.context_span + 1].reshape(batch, self.context_length, -1)[:, :, 1:]
        dynamics = tokens[:, self.context_span :].reshape(batch, future, self.frame_stride)[:, :, 1:]
        return context.clamp(0, self.codebook_size - 1), self.dynamics_indices(dynamics)

    def dynamics_indices(self, tokens: Tensor) -> Tensor:
        """Codebook indices of a future frame's ids ``tokens``, of any shape; ids of others are clamped into it."""
        return (tokens - self.codebook_size).clamp(0, self.dynamics_codebook_size - 1)

    def labels(self, tokens: Tensor) -> Tensor:
        """Labels (B, L): ``tokens`` with -100 on the context and on the first dynamics slot (shifted in the loss)."""
        labels = tokens.clone()
        labels[:, : self.prompt_length] = IGNORE_INDEX
        return labels
