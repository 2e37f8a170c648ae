"""Rollouts: the context goes through the transformer once, then each future frame is sampled token by token.

B clips, S samples a clip, R = B*S rows, t0 context frames, F future frames, N and n tokens of a context and a future
frame, D embed_dim, A action size, L sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.cache import KVCache
from ivideogpt.rollout.inputs import check_actions, check_context_frames, check_horizon, check_num_samples
from ivideogpt.rollout.sampling import check_generator, check_sampling, copy_generator, sample_token

DECODE_PIXELS = 2**18
"""Pixels that go through the tokenizer at once (64 frames of 64 px, 4 of 256 px): bounds the memory of a rollout."""

Sampler = Callable[[Tensor], Tensor]
"""Token ids (B,) from logits (B, V)."""


@dataclass(frozen=True)
class Rollout:
    """What was imagined; row b*S + s is sample s of clip b.

    Attributes:
        video: (B*S, t0 + F, C, H, W) float32 in [0, 1]: the reconstructed context, then the predicted frames.
        tokens: (B*S, L), what ``video`` was decoded from.
        rewards: (B*S, F) on arriving at each predicted frame, in the simulator's units; None without a reward head.
    """

    video: Tensor
    tokens: Tensor
    rewards: Tensor | None


@contextmanager
def evaluation_mode(*modules: nn.Module | None) -> Iterator[None]:
    """Eval mode for the modules while inside, so that dropout is off; each gets back the mode that it had."""
    training = [child for module in modules if module is not None for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


def prefill(transformer: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Final hidden states (B, L, D) of ``tokens`` (B, L), whose keys and values go into the empty ``cache``."""
    return decode_step(transformer, transformer.embed(tokens), cache)


def decode_step(transformer: Transformer, embeddings: Tensor, cache: KVCache) -> Tensor:
    """Final hidden states (B, L, D) of the next L embeddings (B, L, D); one token is L = 1."""
    return transformer.backbone(embeddings, cache.next_positions(embeddings.shape[1]), cache)


def sample_frame(
    transformer: Transformer, cache: KVCache, slot_embedding: Tensor, num_tokens: int, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """Samples one future frame in ``num_tokens + 1`` decode steps: its slot, then each of its tokens.

    The last token is fed too: the next frame attends to it, and its hidden state is where the reward is read.

    Args:
        transformer: with ``cache`` holding all positions in front of the slot.
        cache: grows by ``num_tokens + 1`` positions.
        slot_embedding: (B, 1, D), the slot token's embedding with the action added.
        num_tokens: n.
        sampler: draws the tokens.

    Returns:
        Token ids (B, n) and the hidden state (B, 1, D) of the last one.
    """
    tokens = []
    hidden = decode_step(transformer, slot_embedding, cache)
    for _ in range(num_tokens):
        token = sampler(transformer.lm_head(hidden[:, -1]))
        tokens.append(token)
        hidden = decode_step(transformer, transformer.embed(token[:, None]), cache)
    return torch.stack(tokens, dim=1), hidden


def rows_per_batch(tokenizer: CompressiveTokenizer, frames_per_row: int) -> int:
    """How many rows of so many frames go through the tokenizer at once (see ``DECODE_PIXELS``)."""
    return max(1, DECODE_PIXELS // (tokenizer.config.resolution**2 * frames_per_row))


def encode_context(tokenizer: CompressiveTokenizer, context_frames: Tensor) -> Tensor:
    """Indices (B, t0, N) of ``context_frames`` (B, t0, C, H, W), in batches bounded in memory."""
    weight = next(tokenizer.parameters())
    parts = context_frames.split(rows_per_batch(tokenizer, context_frames.shape[1]))
    return torch.cat([tokenizer.encode_context(part.to(weight.device, weight.dtype))[0] for part in parts])


def decode_context(tokenizer: CompressiveTokenizer, context_indices: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Frames (B, t0, C, H, W) in [0, 1] and decoder features of ``context_indices`` (B, t0, N), in such batches."""
    parts = context_indices.split(rows_per_batch(tokenizer, context_indices.shape[1]))
    decoded = [tokenizer.decode_context(part) for part in parts]
    frames = torch.cat([frames for frames, _ in decoded])
    features = [torch.cat(level) for level in zip(*(features for _, features in decoded), strict=True)]
    return to_unit_range(frames), features


def decode_future(tokenizer: CompressiveTokenizer, dynamics_indices: Tensor, features: list[Tensor]) -> Tensor:
    """Frames (B, M, C, H, W) in [0, 1] of ``dynamics_indices`` (B, M, n), in batches bounded in memory.

    The M frames of a clip may be of several sampled futures: they share the clip's context features.
    """
    clips, frames = dynamics_indices.shape[:2]
    per_clip = tokenizer.layout.context_length
    frames_at_once = min(frames, rows_per_batch(tokenizer, 1))
    clips_at_once = rows_per_batch(tokenizer, frames_at_once)
    decoded = []
    for start in range(0, clips, clips_at_once):
        end = min(start + clips_at_once, clips)
        seen = [level[start * per_clip : end * per_clip] for level in features]
        parts = dynamics_indices[start:end].split(frames_at_once, dim=1)
        decoded.append(to_unit_range(torch.cat([tokenizer.decode_future(part, seen) for part in parts], dim=1)))
    return torch.cat(decoded)


def to_unit_range(frames: Tensor) -> Tensor:
    """Decoded frames as float32 clamped to [0, 1]."""
    return frames.float().clamp_(0.0, 1.0)


def rollout(
    tokenizer: CompressiveTokenizer,
    transformer: Transformer,
    reward_head: RewardHead | None,
    context_frames: Tensor,
    actions: Tensor | None = None,
    horizon: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = 100,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    force_slots: bool = True,
) -> Rollout:
    """Predicts the frames, and rewards, that follow ``context_frames``.

    The context is tokenized and put through the transformer once for the B clips; the key/value cache is repeated for
    the samples after that. A future frame then costs n + 1 decode steps. Modules are run in eval mode and left in
    the mode they were in. The outputs are ordinary tensors without a gradient.

    The video begins with the context as the tokenizer reconstructs it, not with the pixels that were given: all frames
    went through the same decoder, as in the original's ``detokenize``.

    Args:
        tokenizer: with the context length that ``context_frames`` have.
        transformer: over the tokenizer's ids.
        reward_head: reads rewards, if there is one.
        context_frames: (B, t0, C, H, W) float in [0, 1].
        actions: (B, T, A), normalised as in training, ``actions[:, t]`` taken at frame t, from the first context
            frame on. T is at least t0 - 1 + horizon; more are not used.
        horizon: F. None makes the video as long as ``actions``, or as long as the positions allow without actions.
        temperature: 0 is argmax.
        top_k: likeliest tokens that are sampled from; None for all.
        num_samples: futures a clip.
        generator: on the model's device; it is advanced. The same state gives the same video. If None, one is
            seeded from torch's global generator.
        force_slots: put a slot token in front of each frame. If False each position is sampled freely, as the
            original's action-free generation does, and decoding ignores what stands at the slots.

    Raises:
        ValueError: if an argument does not fit the model.
    """
    device = transformer.lm_head.weight.device
    check_context_frames(context_frames, tokenizer)
    batch = context_frames.shape[0]
    actions = check_actions(actions, transformer, (batch, None), device)
    horizon = check_horizon(horizon, actions, tokenizer, transformer)
    check_sampling(temperature, top_k)
    check_num_samples(num_samples)
    check_generator(generator, device)
    if generator is None:
        generator = copy_generator(None, device)
    sampler = partial(sample_token, temperature=temperature, top_k=top_k, generator=generator)
    layout = tokenizer.layout

    with torch.inference_mode(), evaluation_mode(tokenizer, transformer, reward_head):
        context_indices = encode_context(tokenizer, context_frames)
        context_tokens = layout.prompt(context_indices)[:, :-1]
        capacity = layout.context_span + layout.frame_stride * horizon
        cache = KVCache(transformer.config.num_layers, capacity, device)
        prefill(transformer, context_tokens, cache)
        if num_samples > 1:
            cache = cache.fork(num_samples)
            context_tokens = context_tokens.repeat_interleave(num_samples, dim=0)

        slot = context_tokens.new_full((batch * num_samples,), layout.dynamics_slot_id)
        slot_actions = None  # (R, F, D)
        if actions is not None:
            slot_actions = transformer.embed_actions(layout.slot_actions(actions, horizon))
            slot_actions = slot_actions.repeat_interleave(num_samples, dim=0)
        tokens: list[Tensor] = [context_tokens]
        reward_states: list[Tensor] = []
        for index in range(horizon):
            if index > 0 and not force_slots:
                slot = sampler(transformer.lm_head(reward_states[-1][:, -1]))
            slot_embedding = transformer.embed(slot[:, None])
            if slot_actions is not None:
                slot_embedding = slot_embedding + slot_actions[:, index : index + 1]
            frame_tokens, hidden = sample_frame(
                transformer, cache, slot_embedding, layout.dynamics_tokens_per_frame, sampler
            )
            tokens += [slot[:, None], frame_tokens]
            reward_states.append(hidden)
        del cache

        all_tokens = torch.cat(tokens, dim=1)
        rewards = None if reward_head is None else reward_head.predict(torch.cat(reward_states, dim=1))
        context_video, features = decode_context(tokenizer, context_indices)
        dynamics_indices = layout.split(all_tokens)[1].unflatten(0, (batch, num_samples)).flatten(1, 2)  # (B, S*F, n)
        future_video = decode_future(tokenizer, dynamics_indices, features)
        future_video = future_video.unflatten(1, (num_samples, horizon)).flatten(0, 1)  # (R, F, C, H, W)
        video = torch.cat([context_video.repeat_interleave(num_samples, dim=0), future_video], dim=1)

    # cloned outside of inference mode, so that a training loop may use them
    return Rollout(video.clone(), all_tokens.clone(), None if rewards is None else rewards.clone())
