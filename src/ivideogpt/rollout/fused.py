"""TorchDecoder: the transformer in a rollout with fused weights, on any device that torch knows.

B clips, S rows a clip, R = B*S rows, L new positions, H query heads, K key/value heads, G = H/K, d head_dim,
P positions of the prefix, M own positions, D embed_dim, A action size, V ids that may be sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivideogpt.models.transformer import Attention, Block, SwiGLU, Transformer, rotate
from ivideogpt.rollout.cache import KVCache, Prefix
from ivideogpt.rollout.decoder import Sampled
from ivideogpt.rollout.sampling import Sampling, sample_token

AttentionFunction = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Output (R, H, L, d) of a layer's attention, from its index, query (R, H, L, d), key and value (R, K, L, d)."""

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64
}  # fmt: skip


@dataclass(frozen=True)
class FusedLayer:
    """Weights of one block: the projections that read the same input are one matrix."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def fuse(layer: nn.Module, dtype: torch.dtype) -> FusedLayer:
    """Copies of a block's weights, fused and converted."""
    assert isinstance(layer, Block)
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, Attention) and isinstance(mlp, SwiGLU)

    def stacked(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
        for linear in linears:
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"rollouts know nn.Linear, a layer is a {type(linear).__name__}: merge adapters into the weights"
                )
        weight = torch.cat([linear.weight.detach() for linear in linears]).to(dtype)
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        return weight, torch.cat(biases).to(dtype) if biases else None

    return FusedLayer(
        layer.input_layernorm.weight.detach().clone(),
        *stacked(attention.q_proj, attention.k_proj, attention.v_proj),
        *stacked(attention.o_proj),
        layer.post_attention_layernorm.weight.detach().clone(),
        *stacked(mlp.gate_proj, mlp.up_proj),
        *stacked(mlp.down_proj),
    )


def attend(
    query: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: Tensor | None, samples: int
) -> Tensor:
    """Attention over a clip's shared positions and a row's own ones, as one softmax over both.

    The two parts are computed apart, each against its own maximum, and joined by their weights (the log-sum-exp
    identity). All rows of a clip meet its prefix in one product, so neither its memory nor its reads grow with them.

    Args:
        query: (R, H, L, d).
        prefix: keys and values (B, K, P, d).
        own: keys and values (R, K, M, d), the new positions included.
        mask: (L, M), True where a position may be seen; None if all may be.
        samples: S.

    Returns:
        (R, H, L, d).
    """
    rows, heads, length, dim = query.shape
    kv_heads = prefix[0].shape[1]
    groups = heads // kv_heads
    query = query.reshape(rows, kv_heads, groups * length, dim) * dim**-0.5

    def part(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scores = (q @ keys.transpose(-1, -2)).float()
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        highest = scores.amax(dim=-1, keepdim=True)
        weights = (scores - highest).exp()
        return (weights.to(values.dtype) @ values).float(), weights.sum(dim=-1, keepdim=True), highest

    def by_clip(x: Tensor) -> Tensor:  # (R, K, GL, *) -> (B, K, S GL, *)
        return x.unflatten(0, (-1, samples)).transpose(1, 2).flatten(2, 3)

    def by_row(x: Tensor) -> Tensor:  # and back
        return x.unflatten(2, (samples, -1)).transpose(1, 2).flatten(0, 1)

    hidden = None if mask is None else ~mask.repeat(groups, 1)  # (GL, M)
    shared = part(query if samples == 1 else by_clip(query), *prefix, None)
    if samples > 1:
        shared = tuple(by_row(x) for x in shared)  # type: ignore[assignment]
    recent = part(query, *own, hidden)
    highest = torch.maximum(shared[2], recent[2])
    factors = [(x[2] - highest).exp() for x in (shared, recent)]
    total = factors[0] * shared[1] + factors[1] * recent[1]
    joined = (factors[0] * shared[0] + factors[1] * recent[0]) / total
    return joined.to(query.dtype).reshape(rows, heads, length, dim)


class TorchDecoder:
    """Decoder of torch operations: the fallback on a CPU, and what a CUDA graph is captured of.

    Args:
        transformer: whose weights are copied.
        precision: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``. Softmax, norms and logits are float32
            in each.

    Raises:
        ValueError: if a linear layer was replaced by something else, whose weights alone do not tell what it computes.
    """

    def __init__(self, transformer: Transformer, precision: str) -> None:
        config, dtype = transformer.config, DTYPES[precision]
        assert config.num_kv_heads is not None and config.head_dim is not None
        self.precision = precision
        self.config = config
        self.device = transformer.lm_head.weight.device
        self._dtype = dtype
        self._eps = config.norm_eps
        self._heads, self._kv_heads, self._dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._layers = [fuse(layer, dtype) for layer in transformer.layers]
        self._norm = transformer.norm.weight.detach().clone()
        self._embedding = transformer.embed_tokens.weight.detach().to(dtype, copy=True)
        self._head = transformer.lm_head.weight.detach().to(dtype, copy=True)
        action = transformer.action_linear
        self._action = None if action is None else (action.weight.detach().clone(), action.bias.detach().clone())
        positions = torch.arange(config.max_positions, device=self.device)
        self._rope = transformer.rope(positions, torch.float32)  # cosines and sines (max_positions, d)
        read = [
            weight for layer in self._layers for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ] + [self._head]  # fmt: skip
        self.bytes_per_step = sum(weight.numel() * weight.element_size() for weight in read)

    def prefill(self, tokens: Tensor) -> Prefix:
        """The prefix of ``tokens`` (B, P)."""
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def whole(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k)
            values.append(v)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self._heads != self._kv_heads)

        positions = torch.arange(tokens.shape[1], device=self.device)
        self._forward(F.embedding(tokens, self._embedding), positions, whole)
        return Prefix(torch.stack(keys), torch.stack(values))

    def branch(self, prefix: Prefix, samples: int, capacity: int) -> KVCache:
        """An empty branch of B * ``samples`` rows with room for ``capacity`` own positions."""
        return KVCache(prefix, samples, capacity)

    def feed(self, branch: KVCache, tokens: Tensor, actions: Tensor | None = None, action_at: int = -1) -> Tensor:
        """Final normed hidden states (R, L, D), float32; see :class:`ivideogpt.rollout.decoder.Decoder`."""
        start, count = branch.length, tokens.shape[1]
        end = start + count
        assert end <= branch.capacity, f"{end} positions do not fit into a branch of {branch.capacity}"
        mask = None
        if count > 1:
            own = torch.arange(end, device=self.device)
            mask = own <= own[start:, None]

        def cached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = branch.keys[layer], branch.values[layer]
            keys[:, :, start:end], values[:, :, start:end] = k, v
            own = keys[:, :, :end], values[:, :, :end]
            return attend(q, self._shared(branch, layer), own, mask, branch.samples)

        positions = torch.arange(start, end, device=self.device) + branch.prefix.length
        hidden = self._forward(self._embed(tokens, actions, action_at), positions, cached)
        branch.length = end
        return hidden.float()

    def feed_at(
        self, branch: KVCache, tokens: Tensor, start: Tensor, actions: Tensor | None = None, action_at: int = -1
    ) -> Tensor:
        """As :meth:`feed`, at own positions from ``start`` (a scalar on the device) on; ``branch.length`` stays.

        No shape and no address depends on a value, and nothing waits for the device: this is what a CUDA graph is
        captured of. All of the branch's capacity is read, masked.
        """
        own = start + torch.arange(tokens.shape[1], device=self.device)
        mask = torch.arange(branch.capacity, device=self.device) <= own[:, None]

        def cached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = branch.keys[layer], branch.values[layer]
            keys.index_copy_(2, own, k)
            values.index_copy_(2, own, v)
            return attend(q, self._shared(branch, layer), (keys, values), mask, branch.samples)

        return self._forward(self._embed(tokens, actions, action_at), own + branch.prefix.length, cached).float()

    def logits(self, hidden: Tensor, sampling: Sampling) -> Tensor:
        """Logits (..., V) float32 of the ids that ``sampling`` allows, from ``hidden`` (..., D)."""
        end = self.config.vocab_size if sampling.last_id is None else sampling.last_id + 1
        return F.linear(hidden.to(self._dtype), self._head[sampling.first_id : end]).float()

    def sample(
        self, branch: KVCache, lead: Tensor, actions: Tensor | None, uniforms: Tensor, sampling: Sampling
    ) -> Sampled:
        """Feeds ``lead``, then draws one token after another; see :class:`ivideogpt.rollout.decoder.Decoder`."""
        hidden = self.feed(branch, lead, actions)
        tokens: list[Tensor] = []
        state = hidden[:, -1]
        for index in range(uniforms.shape[1]):
            if tokens:
                state = self.feed(branch, tokens[-1][:, None])[:, -1]
            tokens.append(sample_token(self.logits(state, sampling), uniforms[:, index], sampling))
        return Sampled(torch.stack(tokens, dim=1), hidden)

    @property
    def idle_bytes(self) -> int:
        """None: it keeps nothing for branches to come."""
        return 0

    def _shared(self, branch: KVCache, layer: int) -> tuple[Tensor, Tensor]:
        return branch.prefix.keys[layer], branch.prefix.values[layer]

    def _embed(self, tokens: Tensor, actions: Tensor | None, action_at: int) -> Tensor:
        embeddings = F.embedding(tokens, self._embedding)  # (R, L, D)
        if actions is not None:
            assert self._action is not None
            added = F.linear(actions.to(self._action[0].dtype), *self._action).to(embeddings.dtype)
            embeddings[:, action_at] += added
        return embeddings

    def _forward(self, x: Tensor, positions: Tensor, attention: AttentionFunction) -> Tensor:
        cos, sin = (table[positions].to(x.dtype) for table in self._rope)
        rotated = self._heads + self._kv_heads
        for index, layer in enumerate(self._layers):
            h = self._rms_norm(x, layer.attention_norm)
            qkv = F.linear(h, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, self._dim)).transpose(1, 2)
            q, k = rotate(qkv[:, :rotated], cos, sin).split([self._heads, self._kv_heads], dim=1)
            h = attention(index, q, k, qkv[:, rotated:])  # (R, H, L, d)
            x = x + F.linear(h.transpose(1, 2).flatten(2), layer.out, layer.out_bias)
            h = self._rms_norm(x, layer.mlp_norm)
            gate, up = F.linear(h, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
        return self._rms_norm(x, self._norm)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), self._eps).to(x.dtype)
