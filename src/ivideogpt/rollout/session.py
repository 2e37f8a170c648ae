"""Session: a rollout that is driven one action at a time, and can be forked and rewound.

B clips, t0 context frames, n tokens of a future frame, A action size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.cache import KVCache
from ivideogpt.rollout.engine import (
    decode_context,
    decode_future,
    encode_context,
    evaluation_mode,
    prefill,
    sample_frame,
)
from ivideogpt.rollout.inputs import check_actions, check_context_frames
from ivideogpt.rollout.sampling import check_sampling, copy_generator, sample_token


@dataclass(frozen=True)
class _Step:
    """One step taken: tokens (B, n + 1), frame (B, C, H, W), reward (B,), the generator's state in front of it."""

    tokens: Tensor
    frame: Tensor
    reward: Tensor | None
    generator_state: Tensor


class Session:
    """An imagined episode with one key/value cache for its whole life.

    Stepping n times gives what a rollout of n frames gives with the same seed. A fork continues with a copy of the
    generator's state, so that a session and its fork, fed the same actions, see the same future; rewinding puts the
    generator back too, so that repeating an action repeats its frame. Either is exactly as if a fresh session had
    been fed the same actions. For another future from the same point, rewind and take another action, or start a
    session with another seed.

    An error leaves the session as it was.

    Args:
        tokenizer: with the context length that ``context_frames`` have.
        transformer: over the tokenizer's ids.
        reward_head: reads rewards, if there is one.
        context_frames: (B, t0, C, H, W) float in [0, 1].
        temperature: 0 is argmax.
        top_k: likeliest tokens that are sampled from; None for all.
        generator: on the model's device. The session works on a copy of its state and does not advance it. If None,
            one is seeded from torch's global generator.
        normalize_actions: maps the actions (B, 1, A) of a step to what the transformer was trained on.

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
        generator: torch.Generator | None = None,
        normalize_actions: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_context_frames(context_frames, tokenizer)
        check_sampling(temperature, top_k)
        self._tokenizer, self._transformer, self._reward_head = tokenizer, transformer, reward_head
        self._layout = tokenizer.layout
        self._temperature, self._top_k = temperature, top_k
        self._normalize_actions = normalize_actions
        self._device = transformer.lm_head.weight.device
        self._generator = copy_generator(generator, self._device)
        self._batch = context_frames.shape[0]
        self._max_steps = self._layout.max_horizon(transformer.config.max_positions)
        self._steps: list[_Step] = []
        capacity = self._layout.context_span + self._layout.frame_stride * self._max_steps
        cache = KVCache(transformer.config.num_layers, capacity, self._device)
        with torch.inference_mode(), evaluation_mode(tokenizer, transformer):
            indices = encode_context(tokenizer, context_frames)
            self._context_tokens = self._layout.prompt(indices)[:, :-1]
            prefill(transformer, self._context_tokens, cache)
            self._context_frames, self._features = decode_context(tokenizer, indices)
            slot = self._context_tokens.new_full((self._batch, 1), self._layout.dynamics_slot_id)
            self._slot = slot
            self._slot_embedding = transformer.embed(slot)  # (B, 1, D)
        self._cache: KVCache | None = cache

    def step(self, action: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Imagines the frame that follows ``action``, taken at the latest frame.

        Args:
            action: (B, A); None for a model without actions.

        Returns:
            The frame (B, C, H, W) in [0, 1] and the reward (B,) on arriving at it, None without a reward head.

        Raises:
            ValueError: if the action does not fit, no positions are left, or the session is closed.
        """
        cache = self._open_cache()
        if self.horizon_left == 0:
            raise ValueError(
                f"no frame is left: the model's {self._transformer.config.max_positions} positions hold "
                f"{self._max_steps} future frames and all were used; rewind(), or start a session from the last "
                f"{self._layout.context_length} of .frames"
            )
        actions = check_actions(action, self._transformer, (self._batch,), self._device)
        state, length = self._generator.get_state(), cache.length
        try:
            with torch.inference_mode(), evaluation_mode(self._tokenizer, self._transformer, self._reward_head):
                step = self._imagine(cache, actions, state)
        except BaseException:  # an interrupted step is one that was not taken
            cache.length = length
            self._generator.set_state(state)
            raise
        self._steps.append(step)
        return step.frame.clone(), None if step.reward is None else step.reward.clone()

    def _imagine(self, cache: KVCache, actions: Tensor | None, state: Tensor) -> _Step:
        embedding = self._slot_embedding
        if actions is not None:
            slot_actions = actions[:, None]  # (B, 1, A)
            if self._normalize_actions is not None:
                slot_actions = self._normalize_actions(slot_actions)
            embedding = embedding + self._transformer.embed_actions(slot_actions)
        sampler = partial(sample_token, temperature=self._temperature, top_k=self._top_k, generator=self._generator)
        count = self._layout.dynamics_tokens_per_frame
        tokens, hidden = sample_frame(self._transformer, cache, embedding, count, sampler)
        tokens = torch.cat([self._slot, tokens], dim=1)
        indices = self._layout.split(torch.cat([self._context_tokens, tokens], dim=1))[1]  # (B, 1, n)
        frame = decode_future(self._tokenizer, indices, self._features)[:, 0]
        reward = None if self._reward_head is None else self._reward_head.predict(hidden)[:, 0]
        return _Step(tokens, frame, reward, state)

    def fork(self) -> Session:
        """An independent session that continues from here: its own cache and its own copy of the generator."""
        cache = self._open_cache()
        branch = copy.copy(self)  # model, context and past frames are shared: nobody changes them
        branch._generator = copy_generator(self._generator, self._device)
        branch._steps = list(self._steps)
        with torch.inference_mode():
            branch._cache = cache.fork()
        return branch

    def rewind(self, steps: int = 1) -> None:
        """Takes back the last ``steps`` steps, the draws of the generator included.

        Raises:
            ValueError: if there are not so many, or the session is closed.
        """
        cache = self._open_cache()
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= len(self._steps):
            raise ValueError(
                f"cannot rewind {steps!r} steps: {len(self._steps)} were taken, give 0..{len(self._steps)}"
            )
        if steps == 0:
            return
        self._generator.set_state(self._steps[-steps].generator_state)
        del self._steps[-steps:]
        cache.length = self._layout.context_span + self._layout.frame_stride * len(self._steps)

    def close(self) -> None:
        """Frees the cache; frames, tokens and rewards stay readable. Closing twice is fine."""
        self._cache = None
        self._features = []

    @property
    def closed(self) -> bool:
        return self._cache is None

    @property
    def horizon_left(self) -> int:
        """How many more steps the transformer's positions allow."""
        return self._max_steps - len(self._steps)

    @property
    def frames(self) -> Tensor:
        """Video (B, t0 + steps, C, H, W) in [0, 1]: the reconstructed context, then what was imagined."""
        return torch.cat([self._context_frames, *(step.frame[:, None] for step in self._steps)], dim=1)

    @property
    def tokens(self) -> Tensor:
        """Tokens (B, L) of :attr:`frames`."""
        return torch.cat([self._context_tokens, *(step.tokens for step in self._steps)], dim=1)

    @property
    def rewards(self) -> Tensor | None:
        """Rewards (B, steps), None without a reward head."""
        if self._reward_head is None:
            return None
        rewards = [step.reward for step in self._steps if step.reward is not None]
        return torch.stack(rewards, dim=1) if rewards else torch.zeros(self._batch, 0, device=self._device)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_cache(self) -> KVCache:
        if self._cache is None:
            raise ValueError("this session is closed: start another one")
        return self._cache
