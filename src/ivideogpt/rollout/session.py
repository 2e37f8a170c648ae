"""Session: a rollout that is driven one action at a time, can be forked and rewound, and never ends.

B clips, t0 context frames, n tokens of a future frame, A action size, P positions of the context.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.choice import decoder_for
from ivideogpt.rollout.cpu import pixels_dtype
from ivideogpt.rollout.decoder import Decoder
from ivideogpt.rollout.engine import imagining
from ivideogpt.rollout.frame import Drawing, FrameState, feed_unfed, next_frame
from ivideogpt.rollout.inputs import check_actions, check_anchor_every, check_context_frames
from ivideogpt.rollout.pixels import ContextFeatures, PixelDecoder, encode_context, pixel_decoder_for
from ivideogpt.rollout.precision import resolve_precision
from ivideogpt.rollout.sampling import (
    Generators,
    Sampling,
    copy_generator,
    draw_uniforms,
    generator_states,
    set_generator_states,
)
from ivideogpt.rollout.speculation import Speculation

KEPT_SEGMENTS = 2
"""Segments that a session remembers: the one that runs, and the one before, which can be rewound into."""


@dataclass
class _Step:
    """One step taken: tokens (B, n + 1), where it left the rows, reward (B,), the generators' states in front of it.

    The frame (B, C, H, W) is None until somebody asks for it.
    """

    tokens: Tensor
    state: FrameState
    reward: Tensor | None
    generator_states: list[Tensor]
    frame: Tensor | None = None


@dataclass
class _Segment:
    """What follows one context: the context itself, the decoders as they were then, the rows' branch, and the steps."""

    decoder: Decoder
    pixels: PixelDecoder
    context_tokens: Tensor
    features: ContextFeatures
    branch: Any  # what the decoder gave; None in a closed session
    steps: list[_Step] = field(default_factory=list)

    def state(self) -> FrameState:
        """Where the rows stand."""
        return self.steps[-1].state if self.steps else FrameState.start(self.branch.rows, self.context_tokens.device)

    def fork(self) -> _Segment:
        """An independent segment from here on; context and past steps are shared: nobody changes them."""
        return replace(self, branch=self.branch.fork(), steps=list(self.steps))


class Session:
    """An imagined episode: one key/value cache from context to context, one decoded frame a step.

    Stepping n times gives what a rollout of n frames gives with the same seed. A fork continues with a copy of the
    generator's state, so that a session and its fork, fed the same actions, see the same future; rewinding puts the
    generator back too, so that repeating an action repeats its frame. Either is exactly as if a fresh session had
    been fed the same actions. For another future from the same point, rewind and take another action, or start a
    session with another seed.

    Where the model's positions end, and every ``anchor_every`` steps if that is given, the latest frames become the
    new context: the session is anchored anew, and goes on for as long as anybody drives it, in bounded memory. The
    steps since the last context and those since the one before it are kept.

    An error leaves the session as it was. Several sessions of one model may run in several threads.

    Args:
        tokenizer: with the context length that ``context_frames`` have.
        transformer: over the tokenizer's ids.
        reward_head: reads rewards, if there is one.
        context_frames: (B, t0, C, H, W) float in [0, 1].
        temperature: 0 is argmax.
        top_k: likeliest tokens that are sampled from; None for all.
        generator: on the model's device or on a CPU. The session works on a copy of its state and does not advance it.
            If None, one is seeded from torch's global generator. A list has one for each of the B rows, whose future
            then does not depend on the other rows.
        normalize_actions: maps the actions (B, 1, A) of a step to what the transformer was trained on.
        precision: as in :func:`ivideogpt.rollout.engine.rollout`.
        dynamics_ids_only: likewise.
        speculation: likewise.
        anchor_every: steps after which the latest frames become the context; None is as late as possible.

    Raises:
        ValueError: if an argument does not fit the model.
    """

    def __init__(
        self,
        tokenizer: CompressiveTokenizer,
        transformer: Transformer,
        reward_head: RewardHead | None,
        context_frames: Tensor,
        temperature: float = 1.0,
        top_k: int | None = 100,
        generator: Generators = None,
        normalize_actions: Callable[[Tensor], Tensor] | None = None,
        precision: str | None = None,
        dynamics_ids_only: bool = False,
        speculation: Speculation | None = None,
        anchor_every: int | None = None,
    ) -> None:
        check_context_frames(context_frames, tokenizer)
        self._tokenizer, self._transformer, self._reward_head = tokenizer, transformer, reward_head
        self._layout = tokenizer.layout
        self._drawing = Drawing(Sampling(temperature, top_k), True, dynamics_ids_only, speculation)
        self._normalize_actions = normalize_actions
        self._device = transformer.lm_head.weight.device
        self._batch = context_frames.shape[0]
        self._generator = copy_generator(generator, self._device, self._batch)
        longest = self._layout.max_horizon(transformer.config.max_positions)
        self._segment_steps = check_anchor_every(anchor_every, longest, transformer)
        self._precision = precision
        self._taken = 0
        self._closed = False
        with imagining(self._device, tokenizer, transformer):
            self._segments = [self._segment(context_frames)]

    def _segment(self, context_frames: Tensor) -> _Segment:
        """A segment that starts from ``context_frames`` (B, t0, C, H, W)."""
        indices = encode_context(self._tokenizer, context_frames)
        tokens = self._layout.prompt(indices)[:, :-1]
        self._precision = resolve_precision(self._precision, self._transformer, self._layout, tokens)
        decoder = decoder_for(self._transformer, self._precision)
        pixels = pixel_decoder_for(self._tokenizer, products=pixels_dtype(decoder.precision))
        branch = decoder.branch(decoder.prefill(tokens), 1, self._layout.frame_stride * self._segment_steps)
        return _Segment(decoder, pixels, tokens, pixels.context(indices), branch)

    def step(self, action: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Imagines the frame that follows ``action``, taken at the latest frame.

        Args:
            action: (B, A); None for a model without actions.

        Returns:
            The frame (B, C, H, W) in [0, 1] and the reward (B,) on arriving at it, None without a reward head.

        Raises:
            ValueError: if the action does not fit, or the session is closed.
        """
        step = self._advance(action, decode=True)
        return self._frame(self._segments[-1], step).clone(), None if step.reward is None else step.reward.clone()

    def advance(self, action: Tensor | None = None) -> Tensor | None:
        """As :meth:`step`, for who needs no pixels: the frame is decoded only if :attr:`frames` or an anchor asks."""
        step = self._advance(action, decode=False)
        return None if step.reward is None else step.reward.clone()

    def _advance(self, action: Tensor | None, decode: bool) -> _Step:
        segments = self._open_segments()
        actions = check_actions(action, self._transformer, (self._batch,), self._device)
        states = generator_states(self._generator)
        try:
            # decoders hold copies of the weights, in eval mode whatever mode the models are in
            with imagining(self._device, self._reward_head):
                if self.horizon_left == 0:
                    with imagining(self._device, self._tokenizer, self._transformer):
                        segments[-1].branch.rest()  # the new one takes its place
                        anchored = self._segment(self._latest_frames())
                    segments = [*segments, anchored][-KEPT_SEGMENTS:]
                step = self._imagine(segments[-1], actions, states)
                if decode:
                    self._frame(segments[-1], step)
        except BaseException:  # an interrupted step is one that was not taken
            set_generator_states(self._generator, states)
            raise
        segments[-1].steps.append(step)
        self._segments = segments
        self._taken += 1
        return step

    def _imagine(self, segment: _Segment, actions: Tensor | None, states: list[Tensor]) -> _Step:
        if actions is not None and self._normalize_actions is not None:
            actions = self._normalize_actions(actions[:, None])[:, 0]
        count = self._drawing.draws(self._layout, first=not segment.steps)
        uniforms = draw_uniforms(self._generator, self._batch, count, self._device)
        decoder, branch = segment.decoder, segment.branch
        drawn = next_frame(decoder, branch, self._layout, segment.state(), actions, uniforms, self._drawing)
        state, reward = drawn.state, None
        if self._reward_head is not None:
            hidden, state = feed_unfed(decoder, branch, state)
            reward = self._reward_head.predict(hidden[:, None])[:, 0]
        return _Step(drawn.tokens, state, reward, states)

    def _frame(self, segment: _Segment, step: _Step) -> Tensor:
        if step.frame is None:
            with torch.inference_mode():
                indices = self._layout.dynamics_indices(step.tokens[:, None, 1:])  # (B, 1, n)
                step.frame = segment.pixels.decode(indices, segment.features)[:, 0]
        return step.frame

    def _latest_frames(self) -> Tensor:
        """The frames (B, t0, C, H, W) that a new context is made of."""
        segment, count = self._segments[-1], self._layout.context_length
        steps = segment.steps[-count:]
        context = [segment.features.frames[:, len(steps) :]] if len(steps) < count else []
        return torch.cat([*context, *(self._frame(segment, step)[:, None] for step in steps)], dim=1)

    def fork(self) -> Session:
        """An independent session that continues from here, with its own copy of the generator.

        The context is shared; only the positions that the steps have added to it are copied.
        """
        segments = self._open_segments()
        branch = copy.copy(self)
        branch._generator = copy_generator(self._generator, self._device, self._batch)
        with torch.inference_mode():
            # the ones before are copied as a frame around what is shared: closing one session leaves the other's alone
            branch._segments = [*(replace(segment) for segment in segments[:-1]), segments[-1].fork()]
        return branch

    def rewind(self, steps: int = 1) -> None:
        """Takes back the last ``steps`` steps, the draws of the generator included.

        Raises:
            ValueError: if so many are not kept, or the session is closed.
        """
        segments = self._open_segments()
        kept = sum(len(segment.steps) for segment in segments)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= kept:
            raise ValueError(
                f"cannot rewind {steps!r} steps: {self._taken} were taken and {kept} are kept, give 0..{kept}"
            )
        if steps == 0:
            return
        left = list(segments)
        states = [step for segment in left for step in segment.steps][-steps].generator_states
        rest = steps
        while rest > len(left[-1].steps):
            rest -= len(left.pop().steps)
        if len(left) < len(segments):
            with torch.inference_mode():
                left[-1] = left[-1].fork()  # a fork of this session may stand on the same segment
        del left[-1].steps[len(left[-1].steps) - rest :]
        set_generator_states(self._generator, states)
        self._segments = left
        self._taken -= steps

    def close(self) -> None:
        """Frees the cache; frames, tokens and rewards stay readable. Closing twice is fine."""
        self._closed = True
        for segment in self._segments:
            segment.branch = None

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def precision(self) -> str:
        """Precision of the transformer's weights in this session."""
        return self._segments[-1].decoder.precision

    @property
    def steps(self) -> int:
        """Steps taken since the session began."""
        return self._taken

    @property
    def horizon_left(self) -> int:
        """How many more steps are taken before the latest frames become the context."""
        return self._segment_steps - len(self._open_segments()[-1].steps)

    @property
    def frames(self) -> Tensor:
        """Video (B, t0 + kept steps, C, H, W) in [0, 1]: the oldest kept context, reconstructed, and what followed."""
        segments = self._segments
        steps = [self._frame(segment, step)[:, None] for segment in segments for step in segment.steps]
        return torch.cat([segments[0].features.frames, *steps], dim=1)

    @property
    def tokens(self) -> Tensor:
        """Tokens (B, L) of the latest context and of the steps since."""
        segment = self._segments[-1]
        return torch.cat([segment.context_tokens, *(step.tokens for step in segment.steps)], dim=1)

    @property
    def rewards(self) -> Tensor | None:
        """Rewards (B, kept steps), None without a reward head."""
        if self._reward_head is None:
            return None
        steps = [step for segment in self._segments for step in segment.steps]
        rewards = [step.reward for step in steps if step.reward is not None]
        return torch.stack(rewards, dim=1) if rewards else torch.zeros(self._batch, 0, device=self._device)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_segments(self) -> list[_Segment]:
        if self._closed:
            raise ValueError("this session is closed: start another one")
        return self._segments
