"""One decode step as the benchmark of the kernels takes it apart: the launches of each part, and torch in their place.

R rows, D embed_dim, H query heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ivideogpt.models.transformer import Transformer, rotate
from ivideogpt.rollout.fused import attend
from ivideogpt.rollout.graphs import GraphDecoder
from ivideogpt.rollout.sampling import Sampling, sample_token

SAMPLING = Sampling(1.0, 100)
COLD = ("weight", "prefix_keys", "prefix_values", "keys", "values")
"""Arguments of which a chain uses so many copies that none is still in the last cache when its turn comes again."""
PARTS = {
    "qkv_rows": "qkv", "attend_prefix": "attend", "attend_rows": "attend", "gate_up_rows": "gate_up",
    "head_rows": "head", "sample": "sample", "join": "attend", "qkv_scatter": "scatter", "gated": "gated",
}  # fmt: skip
"""What is timed together, by kernel. ``residual_rows`` is ``out`` or ``down``, ``add_norm`` counts where it adds."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel as the decoder made it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.args, strict=False))

    @property
    def part(self) -> str | None:
        """What it is timed as, None if it is not."""
        name = self.kernel.__name__
        if name == "residual_rows":
            return "out" if self.named["SPLITS"] else "down"
        if name == "add_norm":
            return "add_norm" if self.named["ADD"] else None
        return PARTS.get(name)

    def copied(self, copies: dict[int, Tensor]) -> Launch:
        """The same launch on copies of its cold arguments; ``copies`` holds those that were made, by their original."""
        args = list(self.args)
        for index, name in enumerate(self.kernel.arg_names[: len(args)]):
            if name in COLD:
                original = args[index]
                args[index] = copies.setdefault(id(original), original.clone())
        return Launch(self.kernel, self.grid, tuple(args), self.options)

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of all kernels that are called inside, which run as ever."""
    from ivideogpt.rollout.gpu import attention, draw, products

    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                launches.append(Launch(self.kernel, grid, args, options))
                launches[-1].run()

            return launch

    kernels = [
        (module, name, kernel)
        for module in (attention, draw, products)
        for name, kernel in vars(module).items()
        if hasattr(kernel, "arg_names") and not name.startswith("_") and not name.startswith("gdc")
    ]
    for module, name, kernel in kernels:
        setattr(module, name, Recorder(kernel))
    try:
        yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


class Step:
    """One decode step of R rows behind one context, by the kernels: what a frame's graph consists of."""

    def __init__(self, transformer: Transformer, precision: str, rows: int, prefix: int, capacity: int) -> None:
        from ivideogpt.rollout.gpu.decoder import TritonDecoder

        self.decoder = TritonDecoder(transformer, precision)
        self.plain = GraphDecoder(transformer, precision)
        device, vocab = self.decoder.device, transformer.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        context = torch.randint(vocab, (1, prefix), generator=generator).to(device)
        self.overlaps = bool(self.decoder._pdl)
        branch = self.decoder.branch(self.decoder.prefill(context), rows, capacity)
        self.cache = branch.workspace.cache
        filled = torch.randint(vocab, (rows, capacity // 2), generator=generator).to(device)
        self.decoder.feed(branch, filled)
        self.start = torch.full((), capacity // 2, dtype=torch.int64, device=device)
        self.positions = capacity // 2 + 1
        self.tokens = torch.randint(vocab, (rows, 1), generator=generator).to(device)
        self.chance = torch.rand(rows, 1, generator=generator).to(device)

    def ours(self, overlap: int) -> Callable[[], Tensor]:
        """The step by the kernels; gives the normed hidden states (R, D)."""
        decoder, rows = self.decoder, len(self.tokens)
        scratch = decoder._scratch(self.cache, rows, 1)
        vocab = decoder.config.vocab_size
        logits = torch.empty(rows, -(-vocab // 16) * 16, device=decoder.device)[:, :vocab]
        hidden = torch.empty(rows, decoder.config.embed_dim, device=decoder.device)
        drawn = torch.empty_like(self.tokens)

        def work() -> Tensor:
            if self.overlaps:
                decoder._pdl, decoder._options = overlap, {"launch_pdl": True} if overlap else {}
            decoder._embed_into(scratch.x, self.tokens, None, 0)
            x = decoder._layers_of(self.cache, scratch, self.start, 0, 1)
            decoder._add_norm(x, None, decoder._norm, hidden)
            decoder._logits(x, logits, SAMPLING, 1)
            decoder._sample(logits, self.chance[:, 0], drawn[:, 0], SAMPLING, scratch.x)
            return hidden

        return work

    def torch(self) -> Callable[[], Tensor]:
        """The step by torch operations, in the same buffers."""

        def work() -> Tensor:
            hidden = self.plain.feed_at(self.cache, self.tokens, self.start)[:, -1]
            sample_token(self.plain.logits(hidden, SAMPLING), self.chance[:, 0], SAMPLING)
            return hidden

        return work

    def check(self) -> float:
        """Mean absolute difference of the hidden states, which are of size 1, of both sides.

        Raises:
            RuntimeError: if it is more than rounding.
        """
        difference = float((self.ours(1)() - self.torch()()).abs().mean())
        bound = 1e-4 if self.decoder.precision == "float32" else 0.05
        if not difference < bound:
            raise RuntimeError(f"the kernels and torch differ by {difference:.2g} on average (bound {bound:g})")
        return difference

    def instances(self, overlap: int) -> dict[str, list[list[Launch]]]:
        """By part, the launches of each layer."""
        with recorded() as launches:
            self.ours(overlap)()
        found: dict[str, list[list[Launch]]] = {}
        for part, group in groupby(launches, key=lambda launch: launch.part):
            if part is not None:
                found.setdefault(part, []).append(list(group))
        return found

    def plain_part(self, part: str, launches: list[Launch]) -> Callable[[], Any]:
        """What torch does in place of a part's ``launches``, on their own tensors."""
        named = {name: value for launch in launches for name, value in launch.named.items()}
        decoder, cache, dtype = self.plain, self.cache, self.plain._dtype
        heads, kv_heads, dim = decoder._heads, decoder._kv_heads, decoder._dim
        weight: Any = named.get("weight")
        norm: Any = named.get("norm")
        own = self.start + torch.arange(1, device=self.start.device)
        mask = torch.arange(cache.capacity, device=own.device) <= own[:, None]
        cos, sin = (table[own + cache.prefix.length].to(dtype) for table in decoder._rope)
        rows = len(self.tokens)

        def like(*shape: int) -> Tensor:
            return torch.randn(rows, 1, *shape, device=own.device).to(dtype)

        x, inner = like(decoder.config.embed_dim), like(decoder.config.mlp_dim)
        attended, both = like(heads * dim), like(2 * decoder.config.mlp_dim)
        split = like((heads + 2 * kv_heads) * dim)

        def scattered(qkv: Tensor) -> Tensor:
            qkv = qkv.unflatten(-1, (-1, dim)).transpose(1, 2)
            q, k = rotate(qkv[:, : heads + kv_heads], cos, sin).split([heads, kv_heads], dim=1)
            named["keys"].index_copy_(2, own, k)
            named["values"].index_copy_(2, own, qkv[:, heads + kv_heads :])
            return q

        def attention() -> Tensor:
            shared, mine = (named["prefix_keys"], named["prefix_values"]), (named["keys"], named["values"])
            return attend(attended.view(rows, heads, 1, dim), shared, mine, mask, cache.samples)

        def gated(gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return F.silu(gate) * up

        def draw() -> Tensor:
            return F.embedding(sample_token(named["logits"], self.chance[:, 0], SAMPLING), decoder._embedding)

        return {
            "qkv": lambda: scattered(F.linear(decoder._rms_norm(x, norm), weight)),
            "scatter": lambda: scattered(split),
            "attend": attention,
            "out": lambda: x + F.linear(attended, weight),
            "gate_up": lambda: gated(F.linear(decoder._rms_norm(x, norm), weight)),
            "gated": lambda: gated(both),
            "down": lambda: x + F.linear(inner, weight),
            "add_norm": lambda: decoder._rms_norm(x + x, norm),
            "head": lambda: F.linear(decoder._rms_norm(x, norm), weight).float(),
            "sample": draw,
        }[part]

    def bytes_of(self, part: str) -> int:
        """The least that a launch must read and write: weights, keys and values that are seen, and activations."""
        c, rows, width = self.decoder.config, len(self.tokens), self.decoder._dtype.itemsize
        heads, kv_heads, dim = self.decoder._heads, self.decoder._kv_heads, self.decoder._dim
        stream, qkv = 4 * c.embed_dim, (heads + 2 * kv_heads) * dim
        position = 2 * kv_heads * dim * width
        weights, activations = {
            "qkv": (qkv * c.embed_dim, stream + qkv * width),
            "scatter": (0, 2 * qkv * width),
            "attend": (0, 2 * heads * dim * width + self.positions * position),
            "out": (heads * dim * c.embed_dim, heads * dim * width + 2 * stream),
            "gate_up": (2 * c.mlp_dim * c.embed_dim, stream + c.mlp_dim * width),
            "gated": (0, 3 * c.mlp_dim * width),
            "down": (c.mlp_dim * c.embed_dim, c.mlp_dim * width + 2 * stream),
            "add_norm": (0, 2 * stream + 2 * c.embed_dim * width),
            "head": (c.vocab_size * c.embed_dim, stream + 4 * c.vocab_size),
            "sample": (0, 4 * c.vocab_size + stream),
            "step": (self.decoder.bytes_per_step // width, c.num_layers * self.positions * position),
        }[part]
        shared = {"attend": 1, "step": c.num_layers}.get(part, 0) * self.cache.prefix.length * position
        return weights * width + shared + rows * activations
