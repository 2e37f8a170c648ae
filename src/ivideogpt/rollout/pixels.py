"""The pixel half of a rollout: context frames to indices, sampled indices to frames.

What a clip's future frames need of its context is computed once, and shared by all of its samples: the keys and values
of every cross-attention. Decoding a frame then is that frame's work only, in the form that the machine is fast
with: tiled convolutions on a CPU (see ``cpu/winograd.py``), bf16, channels last and CUDA graphs on a GPU.

B clips, t0 context frames, M frames of a clip (of one future or of several), N and n tokens of a context and a future
frame, C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeVar
from warnings import warn

import torch
from torch import Tensor, nn

from ivideogpt.models.conditional import KeysValues
from ivideogpt.models.tokenizer import CompressiveTokenizer, entries_to_grid, patches_to_grid
from ivideogpt.rollout.capture import GRAPHS, Captured, Recorder, on
from ivideogpt.rollout.cpu import why_unavailable, winograd
from ivideogpt.rollout.cpu.encoder import tiled_encoder_for
from ivideogpt.rollout.encoder import graph_encoder_for
from ivideogpt.rollout.gpu import no_kernels
from ivideogpt.rollout.memory import SHARE, free_memory, is_out_of_memory
from ivideogpt.rollout.weights import Kept

DECODE_PIXELS = 2**18
"""Pixels that go through the tokenizer at once (64 frames of 64 px, 4 of 256 px); fewer where memory is short."""

LIVE_MAPS = 6
"""Feature maps of the last level's size that are in memory at once; an upper estimate."""

Result = TypeVar("Result")
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class ContextFeatures:
    """What the future frames of B clips need of their context; never written to, so that many may share it.

    Attributes:
        keys_values: of each cross-attention of the conditional decoder, (B, heads, t0 hw, C / heads) each.
        decoder: that made it, and is the only one that may use it.
        last: (B*t0, c, h, w), how far the context frames were decoded for that.
        key: equal to that of no other context.
    """

    keys_values: tuple[KeysValues, ...]
    decoder: PixelDecoder
    last: Tensor
    key: object = field(default_factory=object)

    @property
    def clips(self) -> int:
        return self.keys_values[0][0].shape[0]

    @cached_property
    def frames(self) -> Tensor:
        """The reconstructed context (B, t0, C, H, W), float32 in [0, 1]; decoded when it is first asked for."""
        return self.decoder.context_frames(self.last).unflatten(0, (self.clips, -1))

    def select(self, clips: slice | Tensor) -> ContextFeatures:
        """Those of some of the clips: without a copy for a slice, in any order and repeated for indices."""
        keys_values = tuple((k[clips], v[clips]) for k, v in self.keys_values)
        last = self.last.unflatten(0, (self.clips, -1))[clips].flatten(0, 1)
        key = (self.key, clips.start, clips.stop) if isinstance(clips, slice) else object()
        selected = ContextFeatures(keys_values, self.decoder, last, key)
        if "frames" in self.__dict__:
            selected.__dict__["frames"] = self.frames[clips]
        return selected


@dataclass
class _Graph:
    """A captured decoding of one shape: inputs that are copied into, frames that are copied out of, its last use.

    ``source`` tells which context's keys and values are in it, and of which of its clips.
    """

    graph: torch.cuda.CUDAGraph
    indices: Tensor
    keys_values: tuple[KeysValues, ...]
    frames: Tensor
    used: torch.cuda.Event
    source: object = None

    def look_at(self, keys_values: tuple[KeysValues, ...], source: object) -> None:
        """Copies ``keys_values`` in, unless those of ``source`` are what was copied last."""
        if source == self.source:
            return
        for (k, v), (new_k, new_v) in zip(self.keys_values, keys_values, strict=True):
            k.copy_(new_k)
            v.copy_(new_v)
        self.source = source


def usual_dtype(device: torch.device) -> torch.dtype:
    """What frames are decoded in where nothing else is asked for."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class PixelDecoder:
    """Decodes indices with a copy of the tokenizer's weights as they are now.

    It holds nothing of a rollout, runs in eval mode whatever mode the tokenizer is in, and may be used by several
    threads at once. The frames have no gradient.

    Args:
        tokenizer: with the context length that the contexts will have.
        dtype: of weights and features; None is bf16 on a GPU, float32 elsewhere.
        compile: decode with ``torch.compile``, which takes its time at each new shape, in place of the tiled
            convolutions.
        graphs: capture CUDA graphs on a GPU: of a shape of batch that comes a second time.
        products: what tiled convolutions multiply, float32 or bfloat16; features are float32 all the same.
    """

    def __init__(
        self,
        tokenizer: CompressiveTokenizer,
        dtype: torch.dtype | None = None,
        compile: bool = False,  # noqa: A002
        graphs: bool = True,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.device = tokenizer.post_quant_linear.weight.device
        self.dtype = dtype or usual_dtype(self.device)
        self.config = tokenizer.config
        self._lock = threading.Lock()
        self._graphs: dict[torch.Size, _Graph | None] | None = {} if graphs and self.device.type == "cuda" else None
        self._recorder = Recorder(self.device)
        with torch.inference_mode(False), torch.no_grad():
            self._codebook = self._copy(tokenizer.quantize)
            self._to_latents = self._copy(tokenizer.post_quant_conv)
            self._context = self._copy(tokenizer.decoder)
            self._dynamics_codebook = self._copy(tokenizer.dynamics_quantize)
            self._to_patches = self._copy(tokenizer.post_quant_linear)
            self._future = self._copy(tokenizer.cond_decoder)
            self._to_context_frames: Callable[[Tensor], Tensor] = self._context.to_frames
            self._to_future_frames: Callable[[Tensor], Tensor] = self._future.to_frames
            self.tiled = self.device.type == "cpu" and self.dtype == torch.float32 and not compile
            self.tiled = self.tiled and why_unavailable() is None
            if self.tiled:
                grid_size = self.config.grid_size
                self._to_context_frames = winograd.use_tiles(self._context, grid_size, products)
                self._to_future_frames = winograd.use_tiles(self._future, grid_size, products)
            elif not compile and no_kernels(self.device) is None:
                from ivideogpt.rollout.gpu.norm import use_kernels

                use_kernels(self._context)
                use_kernels(self._future)
        self._captured_features = Captured(self._flat_features, "the context's features")
        self._compiled = torch.compile(self._decode, dynamic=False) if compile else None

    def _copy(self, module: AnyModule) -> AnyModule:
        copied = copy.deepcopy(module).eval().requires_grad_(False)
        return copied.to(self.dtype).to(memory_format=torch.channels_last)

    def context(self, context_indices: Tensor) -> ContextFeatures:
        """What the future frames need of their context, from its ``context_indices`` (B, t0, N).

        The context's own pixels are not decoded before they are asked for.
        """
        length = self.config.context_length
        assert context_indices.shape[1] == length, (context_indices.shape, length)

        def run(at_once: int) -> ContextFeatures:
            parts = [self._nested_features(part) for part in context_indices.split(max(1, at_once // length))]
            levels = zip(*(keys_values for keys_values, _ in parts), strict=True)
            keys_values = [tuple(torch.cat(tensors) for tensors in zip(*level, strict=True)) for level in levels]
            return ContextFeatures(tuple((k, v) for k, v in keys_values), self, torch.cat([last for _, last in parts]))

        return self._fitting(context_indices.shape[0] * length, run)

    def context_frames(self, last: Tensor) -> Tensor:
        """Frames (B*t0, C, H, W), float32 in [0, 1], from how far :meth:`context` went."""

        def run(at_once: int) -> Tensor:
            frames = []
            for part in last.split(at_once):
                for stage in self._context.stages[self._future.feature_levels[-1] + 1 :]:
                    part = stage(part)
                frames.append(to_unit_range(self._to_context_frames(part)))
            return torch.cat(frames)

        return self._fitting(last.shape[0], run)

    def decode(self, dynamics_indices: Tensor, context: ContextFeatures) -> Tensor:
        """Frames (B, M, C, H, W), float32 in [0, 1], of ``dynamics_indices`` (B, M, n).

        The M frames of a clip may be of several sampled futures: they look at the same keys and values.
        """
        clips, frames, _ = dynamics_indices.shape
        assert clips == context.clips and context.decoder is self, (clips, context.clips)
        config = self.config

        def run(at_once: int) -> Tensor:
            shape = (clips, frames, config.out_channels, config.resolution, config.resolution)
            video = torch.empty(shape, device=self.device, dtype=torch.float32)
            frame_step = min(max(1, frames), at_once)
            clip_step = max(1, at_once // frame_step)
            for start in range(0, clips, clip_step):
                rows = slice(start, start + clip_step)
                seen = tuple((k[rows], v[rows]) for k, v in context.keys_values)
                for first in range(0, frames, frame_step):
                    part = dynamics_indices[rows, first : first + frame_step]
                    video[rows, first : first + frame_step] = self._decode_part(part, seen, (context.key, start))
            return video

        return self._fitting(clips * frames, run)

    def _features(self, context_indices: Tensor) -> tuple[list[KeysValues], Tensor]:
        """Keys and values, and the features where decoding stopped, of one batch of contexts."""
        entries = self._codebook.embedding(context_indices.flatten(0, 1))
        x = self._to_latents(entries_to_grid(entries, self.config.grid_size))
        x = x.contiguous(memory_format=torch.channels_last)
        features, levels = [], self._future.feature_levels
        for level, stage in enumerate(self._context.stages[: levels[-1] + 1]):
            x = stage(x)
            if level in levels:
                features.append(x)
        return [(k.contiguous(), v.contiguous()) for k, v in self._future.keys_values(features)], x

    def _nested_features(self, context_indices: Tensor) -> tuple[list[KeysValues], Tensor]:
        """What :meth:`_features` gives, by a graph if the clips are few."""
        if self._graphs is None:
            return self._features(context_indices)
        *flat, last = self._captured_features(context_indices)
        return list(zip(flat[::2], flat[1::2], strict=True)), last

    def _flat_features(self, context_indices: Tensor) -> list[Tensor]:
        keys_values, last = self._features(context_indices)
        return [*(x for pair in keys_values for x in pair), last]

    def _run(self, indices: Tensor, keys_values: tuple[KeysValues, ...]) -> Tensor:
        return (self._compiled or self._decode)(indices, keys_values)

    def _decode(self, dynamics_indices: Tensor, keys_values: tuple[KeysValues, ...]) -> Tensor:
        """Frames (B, M, C, H, W) of one batch."""
        entries = self._dynamics_codebook.embedding(dynamics_indices.flatten(0, 1))
        latents = patches_to_grid(self._to_patches(entries), self.config.patch_size, self.config.grid_size)
        latents = latents.contiguous(memory_format=torch.channels_last)
        frames = self._to_future_frames(self._future.last_features(latents, list(keys_values)))
        return to_unit_range(frames).unflatten(0, dynamics_indices.shape[:2])

    def _decode_part(self, indices: Tensor, keys_values: tuple[KeysValues, ...], source: object) -> Tensor:
        with self._lock if self._graphs is not None else nullcontext():
            graph = self._graph_of(indices, keys_values)
            if graph is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(graph.used)  # another thread may have been here on another stream
                graph.indices.copy_(indices)
                graph.look_at(keys_values, source)
                graph.graph.replay()
                frames = graph.frames.clone()
                graph.used.record(stream)
                return frames
        return self._run(indices, keys_values)

    def _graph_of(self, indices: Tensor, keys_values: tuple[KeysValues, ...]) -> _Graph | None:
        """The graph of batches of this shape, None if they run op by op, as they do the first time."""
        if self._graphs is None:
            return None
        if indices.shape not in self._graphs:
            if len(self._graphs) < GRAPHS:
                self._graphs[indices.shape] = None
            return None
        graph = self._graphs[indices.shape]
        if graph is None:
            graph = self._capture(indices, keys_values)
            if graph is None:
                self._graphs = None
            else:
                self._graphs[indices.shape] = graph
        return graph

    def _capture(self, indices: Tensor, keys_values: tuple[KeysValues, ...]) -> _Graph | None:
        """A graph of decoding such a batch, None if it cannot be captured."""
        try:
            # ordinary tensors, which may be written to in and out of inference mode
            with self._recorder.held(), torch.inference_mode(False), torch.no_grad():
                indices = indices.clone()
                keys_values = tuple((k.clone(), v.clone()) for k, v in keys_values)
                self._recorder.warm_up(lambda: self._run(indices, keys_values))
                graph = torch.cuda.CUDAGraph()
                with self._recorder.recording(graph):
                    frames = self._run(indices, keys_values)
                return _Graph(graph, indices, keys_values, frames, torch.cuda.Event())
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            warn(f"the CUDA graph of decoding could not be captured, it runs op by op: {error}", stacklevel=2)
            return None

    def _fitting(self, frames: int, run: Callable[[int], Result]) -> Result:
        """What ``run`` gives with as many frames at once as there is memory for."""
        config = self.config
        at_once = max(1, DECODE_PIXELS // config.resolution**2)
        if frames > 1:
            one = LIVE_MAPS * config.resolution**2 * max(config.block_channels[:2]) * self.dtype.itemsize
            free = free_memory(self.device)
            at_once = at_once if free is None else max(1, min(at_once, int(free * SHARE) // one))
        at_once = min(at_once, max(1, frames))
        first = at_once
        while True:
            try:
                with on(self.device), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    return run(at_once)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or at_once == 1:
                    raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if at_once == first:
                warn(f"out of memory with {first} frames at once: decoding goes on in smaller batches", stacklevel=3)
            at_once //= 2


_decoders: Kept[PixelDecoder] = Kept()


def pixel_decoder_for(
    tokenizer: CompressiveTokenizer,
    dtype: torch.dtype | None = None,
    compile: bool = False,  # noqa: A002
    products: torch.dtype = torch.float32,
) -> PixelDecoder:
    """A :class:`PixelDecoder` of the tokenizer's weights as they are now; one that is at hand if there is one."""
    dtype = dtype or usual_dtype(tokenizer.post_quant_linear.weight.device)
    make = partial(PixelDecoder, tokenizer, dtype, compile, products=products)
    return _decoders.get(tokenizer, (dtype, compile, products), make)


def encode_context(tokenizer: CompressiveTokenizer, context_frames: Tensor) -> Tensor:
    """Indices (B, t0, N) of ``context_frames`` (B, t0, C, H, W), in batches bounded in memory."""
    weight = next(tokenizer.parameters())
    at_once = max(1, DECODE_PIXELS // (tokenizer.config.resolution**2 * context_frames.shape[1]))
    encoder = tiled_encoder_for(tokenizer) or graph_encoder_for(tokenizer)
    indices = []
    for part in context_frames.split(at_once):
        part = part.to(weight.device, weight.dtype)
        if encoder is None:
            indices.append(tokenizer.encode_context(part)[0])
        else:
            indices.append(encoder.indices(part.flatten(0, 1)).unflatten(0, part.shape[:2]))
    return torch.cat(indices)


def to_unit_range(frames: Tensor) -> Tensor:
    """Decoded frames as float32 clamped to [0, 1]."""
    return frames.float().clamp_(0.0, 1.0)
