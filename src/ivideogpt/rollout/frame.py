"""One future frame of R rows: what a rollout and a session do between two frames.

R rows, n tokens of a frame, A action size, D embed_dim, p tokens that are drawn and not fed yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ivideogpt.layout import TokenLayout
from ivideogpt.rollout.decoder import Branch, Decoder
from ivideogpt.rollout.sampling import Sampling
from ivideogpt.rollout.speculation import Speculation, sample_approximate, sample_checked


@dataclass(frozen=True)
class Drawing:
    """How frames are drawn.

    Attributes:
        sampling: of a token.
        force_slots: put a slot token in front of each frame. If False each position is sampled freely, as the
            original's action-free generation does.
        dynamics_ids_only: a frame's tokens are drawn among the ids of the dynamics codebook only.
        speculation: draw several tokens at a time.
    """

    sampling: Sampling
    force_slots: bool = True
    dynamics_ids_only: bool = False
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        if self.speculation is not None and not isinstance(self.speculation, Speculation):
            raise ValueError(f"speculation must be a Speculation or None, got {self.speculation!r}")

    def frame_sampling(self, layout: TokenLayout) -> Sampling:
        """Sampling of a token inside a frame."""
        if not self.dynamics_ids_only:
            return self.sampling
        return replace(self.sampling, first_id=layout.codebook_size, last_id=layout.context_slot_id - 1)

    def draws(self, layout: TokenLayout, first: bool) -> int:
        """Random numbers of a frame; the ``first`` frame's slot is part of the prompt."""
        return layout.dynamics_tokens_per_frame + (0 if first or self.force_slots else 1)


@dataclass(frozen=True)
class FrameState:
    """Where R rows stand between two frames. It changes nothing to go back to an earlier one.

    Attributes:
        length: own positions of the branch that are filled: all frames so far, but for the unfed tokens.
        unfed: (R, p) last tokens of the frame before, fed in front of the next slot; p may be 0.
        previous: (R, n) tokens of the frame before, None in front of the first.
    """

    length: int
    unfed: Tensor
    previous: Tensor | None = None

    @staticmethod
    def start(rows: int, device: torch.device) -> FrameState:
        """In front of the first frame."""
        return FrameState(0, torch.empty(rows, 0, dtype=torch.int64, device=device))


@dataclass(frozen=True)
class FrameTokens:
    """One frame that was drawn.

    Attributes:
        tokens: (R, n + 1), the slot in front.
        state: behind it.
        previous_hidden: (R, D) at the last token of the frame before, where its reward is read, if it was fed now.
    """

    tokens: Tensor
    state: FrameState
    previous_hidden: Tensor | None


def next_frame(
    decoder: Decoder,
    branch: Branch,
    layout: TokenLayout,
    state: FrameState,
    actions: Tensor | None,
    uniforms: Tensor,
    drawing: Drawing,
) -> FrameTokens:
    """Draws one frame of all rows.

    Args:
        decoder: runs the transformer.
        branch: the rows' keys and values, at least up to ``state``; what lies behind is overwritten.
        layout: token arithmetic of the model.
        state: where the rows stand.
        actions: (R, A), normalised, that lead to the frame; None for a model without actions.
        uniforms: (R, ``drawing.draws(...)``).
        drawing: how it is drawn.
    """
    branch.length = state.length
    previous_hidden = None
    if state.previous is None or drawing.force_slots:
        lead = F.pad(state.unfed, (0, 1), value=layout.dynamics_slot_id)
        slot = lead[:, -1:]
    else:
        drawn = decoder.sample(branch, state.unfed, None, uniforms[:, :1], drawing.sampling)
        previous_hidden = drawn.hidden[:, -1]
        lead = slot = drawn.tokens
        uniforms = uniforms[:, 1:]

    sampling, speculation, guess = drawing.frame_sampling(layout), drawing.speculation, state.previous
    unfed = 1
    if speculation is None or guess is None:
        sampled = decoder.sample(branch, lead, actions, uniforms, sampling)
    elif speculation.exact:
        sampled = sample_checked(decoder, branch, lead, actions, uniforms, sampling, guess, speculation.window)
    else:
        sampled = sample_approximate(decoder, branch, lead, actions, uniforms, sampling, guess, speculation)
        unfed = guess.shape[1]
    if previous_hidden is None and lead.shape[1] > 1:
        previous_hidden = sampled.hidden[:, -2]
    after = FrameState(branch.length, sampled.tokens[:, -unfed:], sampled.tokens)
    return FrameTokens(torch.cat([slot, sampled.tokens], dim=1), after, previous_hidden)


def feed_unfed(decoder: Decoder, branch: Branch, state: FrameState) -> tuple[Tensor, FrameState]:
    """Hidden states (R, D) at the last token of the frame before, and the state with that token fed."""
    branch.length = state.length
    hidden = decoder.feed(branch, state.unfed)[:, -1]
    return hidden, FrameState(branch.length, state.unfed[:, :0], state.previous)
