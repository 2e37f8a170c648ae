"""TritonDecoder: the frames of a GraphDecoder by kernels that were written for them.

A step of torch operations is some thirty kernels a layer, and a small model spends its time between them. Here a layer
is five of them, each of which starts loading its weights before the one in front has ended.

B clips, S rows a clip, R = B*S rows, L tokens a row, M = R L, D embed_dim, H query heads, d head_dim, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from warnings import warn

import torch
import torch.nn.functional as F
from torch import Tensor

from ivideogpt.config import TransformerConfig
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.cache import KVCache
from ivideogpt.rollout.fused import FusedLayer
from ivideogpt.rollout.gpu import attention, draw, products
from ivideogpt.rollout.gpu.launch import INTERPRETED, OVERLAPPED_LAUNCHES, power_of_two
from ivideogpt.rollout.graphs import GraphDecoder
from ivideogpt.rollout.memory import is_out_of_memory
from ivideogpt.rollout.sampling import Sampling

ROWS = 4
"""Most rows whose products are made here; with more of them a library's products and kernels around them win."""

SHARED_ROWS = 8
"""Queries of one clip from which on they meet its prefix together."""

SPLIT = 64
"""Positions of a part of the attention, where few rows leave the device idle."""

SHAPES = {"qkv": (4, 1), "out": (16, 8), "gate_up": (2, 1), "down": (2, 8), "head": (8, 2)}
"""Of each product of a few rows, outputs (or pairs of them) of a program, and its warps; chosen on an H200."""

THREAD_BYTES, MOST_WARPS = 512, 16
"""Bytes of weights that a thread holds, half of its registers: wider models and wider numbers take more warps."""

ATTEND_WARPS, MANY_ATTEND_WARPS, SAMPLE_WARPS = 2, 4, 8
"""Warps of a part of the attention of few rows and of many, and of a draw."""

ALIGNED = 16
"""Rows of logits begin at a multiple of so many numbers, so that they are read in wide loads."""


@dataclass
class Scratch:
    """Buffers between the kernels of one way of feeding; made once for a graph.

    x (M, D) float32, query (M, H, d), gated (M, mlp_dim), and the parts of an attention: outputs (M, splits, H, d) and
    their log-sum-exp (M, splits, H), float32.
    """

    x: Tensor
    query: Tensor
    gated: Tensor
    outputs: Tensor
    lse: Tensor


class TritonDecoder(GraphDecoder):
    """Decoder of Triton kernels in a CUDA graph; see :func:`ivideogpt.rollout.gpu.why_unavailable` for which models.

    Args:
        transformer: whose weights are copied.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``: of weights, keys, values and what is multiplied.
            Products are summed in float32, and so is the residual stream.
    """

    def __init__(self, transformer: Transformer, precision: str) -> None:
        super().__init__(transformer, precision)
        self._pdl = int(
            OVERLAPPED_LAUNCHES and not INTERPRETED and torch.cuda.get_device_capability(self.device)[0] >= 9
        )
        self._options: dict[str, Any] = {"launch_pdl": True} if self._pdl else {}
        self._by_kernels = True
        self._layers = [
            replace(layer, attention_norm=layer.attention_norm.float(), mlp_norm=layer.mlp_norm.float())
            for layer in self._layers
        ]
        self._norm = self._norm.float()
        self._action = None if self._action is None else (self._action[0].float(), self._action[1].float())
        self._cos, self._sin = (table.contiguous() for table in self._rope)
        self._scale = self._dim**-0.5
        self._processors = 1 if INTERPRETED else torch.cuda.get_device_properties(self.device).multi_processor_count

    def draw(
        self,
        cache: KVCache,
        lead: Tensor,
        start: Tensor,
        actions: Tensor | None,
        action_at: int,
        uniforms: Tensor,
        sampling: Sampling,
        outputs: list[Tensor],
    ) -> Iterator[None]:
        """As :meth:`GraphDecoder.draw`, by the kernels."""
        if not self._by_kernels:
            yield from super().draw(cache, lead, start, actions, action_at, uniforms, sampling, outputs)
            return
        rows, length, count = *lead.shape, uniforms.shape[1]
        tokens = torch.empty(rows, count, dtype=torch.int64, device=lead.device)
        x = self._feed(cache, lead, start, actions, action_at)
        hidden = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        self._add_norm(x, None, self._norm, hidden)
        outputs += [hidden.unflatten(0, lead.shape), tokens]
        if not count:
            yield
            return
        ids = self.config.vocab_size if sampling.last_id is None else sampling.last_id + 1
        ids -= sampling.first_id
        aligned = -(-ids // ALIGNED) * ALIGNED
        logits = torch.empty(rows, aligned, dtype=torch.float32, device=lead.device)[:, :ids]
        scratch = self._scratch(cache, rows, 1)
        for index in range(count):
            if index:
                x = self._layers_of(cache, scratch, start, length + index - 1, 1)
            self._logits(x, logits, sampling, 1 if index else length)
            following = scratch.x if index + 1 < count else None
            self._sample(logits, uniforms[:, index], tokens[:, index], sampling, following)
            yield

    def _capture(self, draw: Callable[[], Iterator[None]], counts: list[int]) -> list[torch.cuda.CUDAGraph]:
        try:
            return super()._capture(draw, counts)
        except Exception as error:  # such as a kernel that needs more shared memory than this GPU has
            if is_out_of_memory(error) or not self._by_kernels:
                raise
            self._by_kernels = False
            warn(f"frames are drawn by torch operations, as Triton's kernels failed: {error}", stacklevel=2)
        return super()._capture(draw, counts)

    def _scratch(self, branch: KVCache, rows: int, length: int) -> Scratch:
        count, device = rows * length, self.device
        splits = self._splits(branch, rows, length)[-1]

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(count, *shape, dtype=dtype, device=device)

        return Scratch(
            empty(self.config.embed_dim),
            empty(self._heads, self._dim, dtype=self._dtype),
            empty(self.config.mlp_dim, dtype=self._dtype),
            empty(splits, self._heads, self._dim),
            empty(splits, self._heads),
        )

    def _splits(self, branch: KVCache, rows: int, length: int) -> tuple[bool, int, int, int, int]:
        """Whether queries meet the prefix together; positions and number of its parts; of the own ones; parts in all.

        Many rows fill the device anyway, so that their positions need not be split.
        """
        prefix, capacity = branch.prefix.length, branch.capacity
        queries = branch.samples * length * self._heads // self._kv_heads
        shared = queries >= SHARED_ROWS
        programs = rows * length * self._kv_heads
        most = max(1, 4 * self._processors // programs)
        own_chunk = -(-capacity // min(most, -(-capacity // SPLIT)))
        if shared:
            tiles = rows // branch.samples * -(-queries // self._tile(queries)) * self._kv_heads
            most = max(1, 2 * self._processors // tiles)
        chunk = -(-prefix // min(most, -(-prefix // SPLIT)))
        parts = -(-prefix // chunk)  # none of which is empty
        return shared, chunk, parts, own_chunk, parts + -(-capacity // own_chunk)

    @property
    def _wide(self) -> bool:
        """Whether keys take so much room that consumer GPUs have shared memory for half of the usual blocks only."""
        return self._dim * self._dtype.itemsize > 256

    def _tile(self, queries: int) -> int:
        return 16 if queries <= 16 else 32 if queries <= 32 or self._wide else 64

    def _shape(self, product: str, width: int, outs_of: int = 1) -> tuple[int, int]:
        """Outputs of a program and its warps, for inputs of ``width`` and ``outs_of`` rows of weights an output."""
        outs, warps = SHAPES[product]
        held = outs * outs_of * power_of_two(width) * self._dtype.itemsize
        while warps < MOST_WARPS and held > 32 * warps * THREAD_BYTES:
            warps *= 2
        return outs, warps

    def _feed(
        self,
        branch: KVCache,
        tokens: Tensor,
        start: Tensor,
        actions: Tensor | None,
        action_at: int,
    ) -> Tensor:
        """The residual stream (M, D) of ``tokens`` behind the last layer."""
        rows, length = tokens.shape
        scratch = self._scratch(branch, rows, length)
        self._embed_into(scratch.x, tokens, actions, action_at % length)
        return self._layers_of(branch, scratch, start, 0, length)

    def _layers_of(self, branch: KVCache, scratch: Scratch, start: Tensor, offset: int, length: int) -> Tensor:
        """Takes the residual stream in ``scratch`` through all layers."""
        count = len(scratch.x)
        added = None
        for index, layer in enumerate(self._layers):
            if count <= ROWS:
                self._layer_rows(branch, index, layer, scratch, start, offset, length)
            else:
                added = self._layer_library(branch, index, layer, scratch, start, offset, length, added)
        return scratch.x if added is None else scratch.x.add_(added)

    def _layer_rows(
        self, branch: KVCache, index: int, layer: FusedLayer, s: Scratch, start: Tensor, offset: int, length: int
    ) -> None:
        config, count = self.config, len(s.x)
        heads, kv_heads, dim, pdl = self._heads, self._kv_heads, self._dim, self._pdl
        width, block = config.embed_dim, power_of_two(config.embed_dim)
        half, warps = self._shape("qkv", width, 2)
        products.qkv_rows[((heads + 2 * kv_heads) * dim // 2 // half,)](
            s.x, layer.attention_norm, layer.qkv, self._cos, self._sin, start, s.query, branch.keys[index],
            branch.values[index], branch.capacity, branch.prefix.length, offset, self._eps,
            count, length, width, heads, kv_heads, dim, half, block, pdl, **self._options, num_warps=warps,
        )  # fmt: skip
        splits = self._attend(branch, index, s, start, offset, length)
        attended = heads * dim
        outs, warps = self._shape("out", attended)
        products.residual_rows[(-(-width // outs),)](
            s.x, s.outputs, s.lse, layer.out,
            count, attended, width, outs, power_of_two(attended), splits, heads, dim, pdl,
            **self._options, num_warps=warps,
        )  # fmt: skip
        outs, warps = self._shape("gate_up", width, 2)
        products.gate_up_rows[(-(-config.mlp_dim // outs),)](
            s.x, layer.mlp_norm, layer.gate_up, s.gated, self._eps,
            count, width, config.mlp_dim, outs, block, pdl, **self._options, num_warps=warps,
        )  # fmt: skip
        outs, warps = self._shape("down", config.mlp_dim)
        products.residual_rows[(-(-width // outs),)](
            s.x, s.gated, s.lse, layer.down,
            count, config.mlp_dim, width, outs, power_of_two(config.mlp_dim), 0, heads, dim, pdl,
            **self._options, num_warps=warps,
        )  # fmt: skip

    def _layer_library(
        self,
        branch: KVCache,
        index: int,
        layer: FusedLayer,
        s: Scratch,
        start: Tensor,
        offset: int,
        length: int,
        added: Tensor | None,
    ) -> Tensor:
        """What is still to be added to x; ``added`` is that of the layer in front."""
        config, count = self.config, len(s.x)
        heads, kv_heads, dim, pdl = self._heads, self._kv_heads, self._dim, self._pdl
        normed = torch.empty(count, config.embed_dim, dtype=self._dtype, device=s.x.device)
        self._add_norm(s.x, added, layer.attention_norm, normed)
        qkv = F.linear(normed, layer.qkv)
        products.qkv_scatter[(heads + 2 * kv_heads, -(-count // 16))](
            qkv, self._cos, self._sin, start, s.query, branch.keys[index], branch.values[index], branch.capacity,
            branch.prefix.length, offset, count, length, heads, kv_heads, dim, 16, pdl, **self._options,
        )  # fmt: skip
        joined = self._join(s, self._attend(branch, index, s, start, offset, length))
        self._add_norm(s.x, F.linear(joined, layer.out), layer.mlp_norm, normed)
        products.gated[(-(-s.gated.numel() // 1024),)](
            F.linear(normed, layer.gate_up), s.gated, s.gated.numel(), config.mlp_dim, 1024, pdl, **self._options
        )
        return F.linear(s.gated, layer.down)

    def _attend(self, branch: KVCache, index: int, s: Scratch, start: Tensor, offset: int, length: int) -> int:
        """The parts of a layer's attention; how many there are."""
        heads, kv_heads, dim = self._heads, self._kv_heads, self._dim
        rows, prefix = branch.rows, branch.prefix
        shared, chunk, parts, own_chunk, splits = self._splits(branch, rows, length)
        first = 0
        if shared:
            queries = branch.samples * length * (heads // kv_heads)
            tile = self._tile(queries)
            tiles = -(-queries // tile)
            attention.attend_prefix[(rows // branch.samples * tiles, kv_heads, parts)](
                s.query, prefix.keys[index], prefix.values[index], s.outputs, s.lse, prefix.length,
                self._scale, chunk, tiles, queries, heads, kv_heads, dim, tile, 32 if self._wide else 64, splits,
                self._pdl, **self._options,
            )  # fmt: skip
            first = parts
        longest = own_chunk if shared else max(chunk, own_chunk)
        block = min(SPLIT, power_of_two(longest))
        warps = ATTEND_WARPS if rows * length <= ROWS else MANY_ATTEND_WARPS
        attention.attend_rows[(rows * length * kv_heads, splits - first)](
            s.query, prefix.keys[index], prefix.values[index], branch.keys[index], branch.values[index], start,
            s.outputs, s.lse, prefix.length, branch.capacity, offset, self._scale, chunk, own_chunk,
            length, branch.samples, heads, kv_heads, dim, block, longest <= block, parts,
            splits, first, self._pdl, **self._options, num_warps=warps,
        )  # fmt: skip
        return splits

    def _join(self, s: Scratch, splits: int) -> Tensor:
        width = self._heads * self._dim
        out = torch.empty(len(s.x), width, dtype=self._dtype, device=s.x.device)
        products.join[(len(s.x),)](
            s.outputs, s.lse, out, splits, self._heads, self._dim, power_of_two(width), self._pdl,
            **self._options,
        )  # fmt: skip
        return out

    def _add_norm(
        self, x: Tensor, added: Tensor | None, norm: Tensor, out: Tensor, row_first: int = 0, row_step: int = 1
    ) -> None:
        width = self.config.embed_dim
        products.add_norm[(len(out),)](
            x, x if added is None else added, norm, out, self._eps, row_first, row_step,
            width, added is not None, power_of_two(width), self._pdl, **self._options,
        )  # fmt: skip

    def _embed_into(self, x: Tensor, tokens: Tensor, actions: Tensor | None, action_at: int) -> None:
        width = self.config.embed_dim
        weight, bias = self._action or (self._embedding, self._embedding)
        draw.embed[(tokens.numel(),)](
            tokens, self._embedding, tokens if actions is None else actions.float(), weight, bias, x,
            tokens.shape[1], width, 0 if actions is None else actions.shape[1], action_at, power_of_two(width),
            self._pdl, **self._options,
        )  # fmt: skip

    def _logits(self, x: Tensor, logits: Tensor, sampling: Sampling, length: int) -> None:
        """Logits of the last of each row's ``length`` tokens."""
        rows, ids = logits.shape
        width = self.config.embed_dim
        weight = self._head[sampling.first_id : sampling.first_id + ids]
        if rows <= ROWS:
            outs, warps = self._shape("head", width)
            products.head_rows[(-(-ids // outs),)](
                x, self._norm, weight, logits, self._eps, length - 1, length, ids, logits.stride(0),
                rows, width, outs, power_of_two(width), self._pdl, **self._options, num_warps=warps,
            )  # fmt: skip
            return
        normed = torch.empty(rows, width, dtype=self._dtype, device=x.device)
        self._add_norm(x, None, self._norm, normed, length - 1, length)
        logits.copy_(F.linear(normed, weight))

    def _sample(
        self, logits: Tensor, uniforms: Tensor, tokens: Tensor, sampling: Sampling, following: Tensor | None
    ) -> None:
        """Draws one token of each row; its embedding becomes the residual stream ``following`` (R, D), if given."""
        rows, ids = logits.shape
        width = 0 if following is None else self.config.embed_dim
        top_k = 0 if sampling.top_k is None or sampling.top_k >= ids else sampling.top_k
        block = power_of_two(ids + 1) // 2
        warps = max(1, min(SAMPLE_WARPS * max(1, block // 2**14), block // 512, 32))
        x = logits if following is None else following  # not touched if width is 0
        draw.sample[(rows,)](
            logits, uniforms, tokens, self._embedding, x, logits.stride(0), ids, sampling.first_id,
            1.0 if sampling.greedy else 1.0 / sampling.temperature, uniforms.stride(0),
            tokens.stride(0), sampling.greedy, top_k, block, power_of_two(max(ids - block, 1)), width,
            power_of_two(max(width, 1)), self._pdl, **self._options, num_warps=warps,
        )  # fmt: skip


def unsupported(config: TransformerConfig, precision: str) -> str | None:
    """Why these kernels cannot run a transformer of this shape, None if they can."""
    assert config.head_dim is not None
    if precision not in ("float32", "bfloat16", "float16"):
        return f"precision {precision} is not one of float32, bfloat16 and float16"
    if config.attention_bias or config.mlp_bias:
        return "its projections have biases"
    if config.head_dim not in (32, 64, 128):
        return f"its heads are {config.head_dim} wide, not 32, 64 or 128"
    widths = config.embed_dim, config.num_heads * config.head_dim, config.mlp_dim
    if max(widths) > 8192:
        return f"its layers are wider than 8192 ({', '.join(str(width) for width in widths)})"
    if config.vocab_size >= 2**17:
        return f"its vocabulary has {config.vocab_size} ids, not less than {2**17}"
    return None
