"""Rollouts: the context goes through the transformer once, then each future frame is sampled token by token.

B clips, S samples a clip, R = B*S rows, t0 context frames, F future frames, N and n tokens of a context and a future
frame, D embed_dim, A action size, L sequence length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ivideogpt.layout import TokenLayout
from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.choice import decoder_for
from ivideogpt.rollout.cpu import pixels_dtype
from ivideogpt.rollout.decoder import Decoder
from ivideogpt.rollout.frame import Drawing, FrameState, feed_unfed, next_frame
from ivideogpt.rollout.inputs import (
    check_actions,
    check_context_frames,
    check_frame_precision,
    check_horizon,
    check_num_samples,
    check_return_frames,
)
from ivideogpt.rollout.memory import SHARE, Span, clip_bytes, free_memory, row_bytes, rows_that_fit, run_in_spans
from ivideogpt.rollout.overlap import FrameStream
from ivideogpt.rollout.pixels import encode_context, pixel_decoder_for
from ivideogpt.rollout.precision import resolve_precision
from ivideogpt.rollout.sampling import Generators, Sampling, check_generator, copy_generator, draw_uniforms
from ivideogpt.rollout.speculation import Speculation

OVERLAPPING = ("cuda",)
"""Devices on which frames are decoded while the next ones' tokens are drawn."""


@dataclass(frozen=True)
class Rollout:
    """What was imagined; row b*S + s is sample s of clip b.

    Attributes:
        frames: :attr:`video`, None if no frames were asked for.
        tokens: (B*S, L), what ``video`` was decoded from.
        rewards: (B*S, F) on arriving at each predicted frame, in the simulator's units; None without a reward head.
    """

    frames: Tensor | None
    tokens: Tensor
    rewards: Tensor | None

    @property
    def video(self) -> Tensor:
        """Float32 in [0, 1]: the reconstructed context, then the predicted frames (B*S, t0 + F, C, H, W).

        Or only the last of them, (B*S, t0 + 1, C, H, W), where that was asked for.

        Raises:
            ValueError: if the rollout was asked for no frames.
        """
        if self.frames is None:
            raise ValueError("nothing was decoded: this rollout was asked for with return_frames=None")
        return self.frames


_in_use: dict[nn.Module, int] = {}
"""Modules that were put into eval mode, and by how many rollouts that are under way."""

_modes = threading.Lock()


@contextmanager
def imagining(device: torch.device, *modules: nn.Module | None) -> Iterator[None]:
    """Inference mode, no autocast, and eval mode for the modules while inside.

    Those that were in training mode get it back when the last thread that is inside leaves.
    """
    mine: list[nn.Module] = []
    with _modes:
        for child in (child for module in modules if module is not None for child in module.modules()):
            if child.training or child in _in_use:
                child.training = False
                _in_use[child] = _in_use.get(child, 0) + 1
                mine.append(child)
    try:
        # kernels of our own are launched on the current device
        here: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with here, torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _modes:
            for child in mine:
                _in_use[child] -= 1
                if not _in_use[child]:
                    del _in_use[child]
                    child.training = True


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
    generator: Generators = None,
    force_slots: bool = True,
    return_frames: str | None = "all",
    precision: str | None = None,
    dynamics_ids_only: bool = False,
    speculation: Speculation | None = None,
    frame_precision: str | None = None,
) -> Rollout:
    """Predicts the frames, and rewards, that follow ``context_frames``.

    The context is tokenized, put through the transformer and decoded once for the B clips, and shared by their
    samples. A future frame then costs n decode steps; where rewards are read, the last frame costs one more. Rows that
    do not fit into memory at once run one after another, with the same result. The modules' weights are copied into
    the decoder's own form when they have changed since the last rollout. The outputs are ordinary tensors without a
    gradient.

    The video begins with the context as the tokenizer reconstructs it, not with the pixels that were given: all frames
    went through the same decoder, as in the original's ``detokenize``.

    Args:
        tokenizer: with the context length that ``context_frames`` have.
        transformer: over the tokenizer's ids.
        reward_head: reads rewards, if there is one.
        context_frames: (B, t0, C, H, W) float in [0, 1].
        actions: (B, T, A), normalised as in training, ``actions[:, t]`` taken at frame t, from the first context
            frame on; or (B*S, T, A), each sample's own. T is at least t0 - 1 + horizon; more are not used.
        horizon: F. None makes the video as long as ``actions``, or as long as the positions allow without actions.
        temperature: 0 is argmax.
        top_k: likeliest tokens that are sampled from; None for all.
        num_samples: S, futures a clip.
        generator: on the model's device, or on a CPU, whose numbers are the same for every device; it is advanced.
            The same state gives the same video. If None, one is seeded from torch's global generator. A list has one
            for each of the B*S rows, whose future then does not depend on its place in a batch.
        force_slots: put a slot token in front of each frame. If False each position is sampled freely, as the
            original's action-free generation does, and decoding ignores what stands at the slots.
        return_frames: ``"all"``, ``"last"`` or None: what is decoded to pixels.
        precision: of the transformer's weights: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"int8"``, or
            ``"auto"`` for the fastest whose argmax ids are those of float32 (:mod:`ivideogpt.rollout.precision`). None
            is the precision that the weights are in. All but ``"float32"`` put the context through the transformer in
            products by 16-bit integers where a CPU has instructions for them.
        dynamics_ids_only: draw a frame's tokens among the dynamics ids only. It is exact as long as the model gives
            no other id a chance.
        speculation: draw several tokens at a time.
        frame_precision: that frames are decoded in, ``"float32"`` or ``"bfloat16"``. None is bfloat16 on a GPU, and
            float32 on a CPU, but with products of bfloat16 where ``precision`` is ``"bfloat16"`` or ``"int8"`` and the
            CPU has such instructions.

    Raises:
        ValueError: if an argument does not fit the model.
    """
    device = transformer.lm_head.weight.device
    layout = tokenizer.layout
    check_context_frames(context_frames, tokenizer)
    check_num_samples(num_samples)
    batch = context_frames.shape[0]
    total = batch * num_samples
    actions = check_actions(actions, transformer, (None, None), device, rows=(batch, total))
    horizon = check_horizon(horizon, actions, tokenizer, transformer)
    drawing = Drawing(Sampling(temperature, top_k), force_slots, dynamics_ids_only, speculation)
    check_generator(generator, device, total)
    check_return_frames(return_frames)
    frame_dtype = check_frame_precision(frame_precision, device)

    with imagining(device, tokenizer, transformer, reward_head):
        context_indices = encode_context(tokenizer, context_frames)
        context_tokens = layout.prompt(context_indices)[:, :-1]
        slot_actions = None if actions is None else layout.slot_actions(actions, horizon)
        precision = resolve_precision(precision, transformer, layout, context_tokens, slot_actions)
        decoder = decoder_for(transformer, precision)
        if generator is None:
            generator = copy_generator(None, device)
        chance = [
            draw_uniforms(generator, total, drawing.draws(layout, first=index == 0), device) for index in range(horizon)
        ]
        tokens = context_tokens.new_empty(total, layout.frame_stride * horizon)
        states = None
        if reward_head is not None:
            shape = (total, horizon, transformer.config.embed_dim)
            states = torch.empty(shape, device=device, dtype=torch.float32)
        pixels = features = stream = None
        if return_frames is not None:
            products = pixels_dtype(decoder.precision) if frame_precision is None else torch.float32
            pixels = pixel_decoder_for(tokenizer, frame_dtype, products=products)
            features = pixels.context(context_indices)
            if return_frames == "all" and device.type in OVERLAPPING:
                stream = FrameStream(pixels, features, layout, num_samples, horizon)
        prefixes: dict[tuple[int, int], object] = {}  # of the clips of the latest span: its samples may follow

        def run(span: Span) -> None:
            clips = (span.first, span.last)
            if clips not in prefixes:
                prefixes.clear()
                prefixes[clips] = decoder.prefill(context_tokens[slice(*clips)])
            rows = span.rows(num_samples, device)
            lead = None
            if slot_actions is not None:
                per_row = len(slot_actions) == total
                lead = slot_actions[rows] if per_row else slot_actions[rows // num_samples]
            numbers = [uniforms[rows] for uniforms in chance]
            watch = None if stream is None else partial(stream.take, span, rows)
            drawn, hidden = _imagine(
                decoder, layout, prefixes[clips], span.samples, lead, numbers, drawing, states is not None, watch
            )
            tokens[rows] = drawn
            if states is not None and hidden is not None:
                states[rows] = hidden

        sizes = transformer.config, layout.frame_stride * horizon, layout.context_span
        memory = free_memory(device)
        rows = None
        if memory is not None:
            rows = rows_that_fit(
                int((memory + decoder.idle_bytes) * SHARE), num_samples, row_bytes(*sizes), clip_bytes(*sizes[::2])
            )
        run_in_spans(batch, num_samples, rows, run)
        prefixes.clear()

        rewards = None if reward_head is None or states is None else reward_head.predict(states)
        video = None
        all_tokens = torch.cat([context_tokens.repeat_interleave(num_samples, dim=0), tokens], dim=1)
        if pixels is not None and features is not None:
            if stream is not None:
                frames = stream.frames()
            else:
                indices = layout.split(all_tokens)[1][:, -1 if return_frames == "last" else 0 :]  # (R, F or 1, n)
                frames = pixels.decode(indices.unflatten(0, (batch, num_samples)).flatten(1, 2), features)
                frames = frames.unflatten(1, (num_samples, -1)).flatten(0, 1)  # (R, F or 1, C, H, W)
            video = torch.cat([features.frames.repeat_interleave(num_samples, dim=0), frames], dim=1)

    # cloned outside of inference mode, so that a training loop may use them
    return Rollout(
        None if video is None else video.clone(), all_tokens.clone(), None if rewards is None else rewards.clone()
    )


def _imagine(
    decoder: Decoder,
    layout: TokenLayout,
    prefix: object,
    samples: int,
    slot_actions: Tensor | None,
    chance: list[Tensor],
    drawing: Drawing,
    rewards: bool,
    watch: Callable[[int, Tensor], None] | None,
) -> tuple[Tensor, Tensor | None]:
    """Tokens (R, F (n + 1)) of rows that run together, and the hidden states (R, F, D) that rewards are read from.

    ``watch`` is shown each frame's number and tokens (R, n) as soon as they are drawn.
    """
    branch = decoder.branch(prefix, samples, layout.frame_stride * len(chance))
    state = FrameState.start(branch.rows, chance[0].device)
    tokens: list[Tensor] = []
    hidden: list[Tensor] = []
    for index, uniforms in enumerate(chance):
        action = None if slot_actions is None else slot_actions[:, index]
        frame = next_frame(decoder, branch, layout, state, action, uniforms, drawing)
        state = frame.state
        tokens.append(frame.tokens)
        if watch is not None:
            watch(index, frame.tokens[:, 1:])
        if rewards and frame.previous_hidden is not None:
            hidden.append(frame.previous_hidden)
    if not rewards:
        return torch.cat(tokens, dim=1), None
    hidden.append(feed_unfed(decoder, branch, state)[0])
    return torch.cat(tokens, dim=1), torch.stack(hidden, dim=1)
