"""Transformer: the LLaMA architecture over a clip's tokens, with an action added to the slot of the frame it leads to.

B batch, L positions, D embed_dim, H query heads, K key/value heads, d head_dim, F future frames, A action size.
The names of the submodules are those of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ivideogpt.config import TransformerConfig
from ivideogpt.layout import IGNORE_INDEX
from ivideogpt.models.compiling import compiled
from ivideogpt.models.dropout import dropped_attention

Rope = tuple[Tensor, Tensor]
"""Cosine and sine (L, d) of the positions."""


class Cache(Protocol):
    """Key/value cache as the transformer sees it."""

    def update(self, layer: int, input_pos: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B, K, L, d) of positions ``input_pos`` (L,); returns those of 0..max(input_pos)."""


@dataclass
class TransformerOutput:
    """Attributes: logits (B, L, vocab_size), hidden (B, L, D) after the final norm."""

    logits: Tensor
    hidden: Tensor


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of ``logits`` (B, L, V) against ``labels`` (B, L) shifted by one, -100 left out; float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def padded_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits (..., V) of ``hidden`` (..., D) by ``weight`` (V, D); GPUs are slow at products of an odd width."""
    return F.linear(hidden, F.pad(weight, (0, 0, 0, -len(weight) % 64)))[..., : len(weight)]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever the input (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` (B, heads, L, d): feature i turns with feature i + d/2 (Su et al., 2021)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each of the linear ``layers`` makes of ``x``; while it is compiled, one product for plain layers."""
    plain = [layer for layer in layers if type(layer) is nn.Linear and layer.bias is None]
    if not torch.compiler.is_compiling() or len(plain) < len(layers):
        return tuple(layer(x) for layer in layers)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    weights = [layer.get_parameter("weight").to(dtype) for layer in plain]
    return F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int, dropout: float, bias: bool
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.grouped = num_heads != num_kv_heads
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)

    def forward(
        self, x: Tensor, rope: Rope, layer: int, input_pos: Tensor | None, cache: Cache | None, start: int = 0
    ) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or K, L, d)
            for projected in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        mask = None
        if cache is not None:
            assert input_pos is not None
            k, v = cache.update(layer, input_pos, k, v)
            if 1 < q.shape[2] < k.shape[2]:
                mask = torch.arange(k.shape[2], device=x.device) <= input_pos[:, None]
        dropout = self.dropout if self.training else 0.0
        if dropout and cache is None and x.device.type == "cpu" and not torch.compiler.is_compiling():
            out = dropped_attention(q, k, v, dropout)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=q.shape[2] == k.shape[2] and q.shape[2] > 1,
                enable_gqa=self.grouped,
            )  # fmt: skip
        return self.o_proj(out.transpose(1, 2)[:, start:].flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, 2020)."""

    def __init__(self, embed_dim: int, mlp_dim: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, mlp_dim, bias=bias)
        self.up_proj = nn.Linear(embed_dim, mlp_dim, bias=bias)
        self.down_proj = nn.Linear(mlp_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer.

    Attributes:
        compiles: whether what is computed for a backward pass is compiled (``torch.compile``).
    """

    compiles = False

    def __init__(self, attention: Attention, mlp: SwiGLU, embed_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(embed_dim, norm_eps)
        self.post_attention_layernorm = RMSNorm(embed_dim, norm_eps)

    def forward(
        self, x: Tensor, rope: Rope, layer: int, input_pos: Tensor | None, cache: Cache | None, start: int = 0
    ) -> Tensor:
        if self.compiles and cache is None and torch.is_grad_enabled():
            if start:
                return compiled(Block.compute_last)(self, x, rope, start)
            return compiled(Block.compute)(self, x, rope, 0, None, None)  # `layer` is the cache's, and no number here
        return self.compute(x, rope, layer, input_pos, cache, start)

    def compute(
        self, x: Tensor, rope: Rope, layer: int, input_pos: Tensor | None, cache: Cache | None, start: int = 0
    ) -> Tensor:
        """What ``forward`` gives, never compiled: (B, L - start, D), of the positions from ``start`` on."""
        attended = self.self_attn(self.input_layernorm(x), rope, layer, input_pos, cache, start)
        x = x[:, start:] + attended
        return x + self.mlp(self.post_attention_layernorm(x))

    def compute_last(self, x: Tensor, rope: Rope, start: int) -> Tensor:
        """``compute`` from ``start`` on, by itself: one function that meets two numbers is compiled for any number."""
        return self.compute(x, rope, 0, None, None, start)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _product_flops(layer: nn.Module, below: bool) -> float:
    """Operations of a linear ``layer`` on one token, forward and backward; ``below``: whether its input has a gradient.

    Of low-rank matrices beside a weight, the second sees what the first makes, which has a gradient if that is trained.
    """
    weights = [(name, weight) for name, weight in layer.named_parameters() if weight.ndim == 2]
    trained = any(weight.requires_grad for _, weight in weights)
    return float(
        sum(
            (2 + 2 * (trained if "lora_B" in name else below) + 2 * weight.requires_grad) * weight.numel()
            for name, weight in weights
        )
    )


class Transformer(nn.Module):
    """Decoder-only transformer over tokens, with an action layer where ``config.action_dim`` is set.

    Attributes:
        recomputes: whether a backward pass computes each block again in place of keeping what is inside (activation
            checkpointing): less memory, a third more arithmetic, the same gradients.
        compiles: whether what is computed for a backward pass is compiled (``torch.compile``).
    """

    compiles = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads, kv_heads, head_dim = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        assert kv_heads is not None and head_dim is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, dim)
        self.layers = nn.ModuleList(
            Block(
                Attention(dim, heads, kv_heads, head_dim, config.attention_dropout, config.attention_bias),
                SwiGLU(dim, config.mlp_dim, config.mlp_bias),
                dim,
                config.norm_eps,
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(dim, config.norm_eps)
        self.lm_head = nn.Linear(dim, config.vocab_size, bias=False)
        self.action_linear = nn.Linear(config.action_dim, dim) if config.action_dim is not None else None
        self.recomputes = False
        self.reset_parameters()

    shard_methods = ("embed", "embed_actions", "backbone")
    """Methods that compute with the weights, beside ``forward``."""

    @property
    def shard_units(self) -> list[nn.Module]:
        """Modules whose weights are gathered together where weights are spread over processes."""
        units = [self.embed_tokens, self.action_linear, *self.layers, self.norm, self.lm_head]
        return [unit for unit in units if unit is not None]

    def reset_parameters(self) -> None:
        """Fresh weights: normal for matrices, zero for biases and for the whole action layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.action_linear is not None:
            nn.init.zeros_(self.action_linear.weight)

    def compile_blocks(self) -> None:
        """Compiles the training forward of the blocks, all of them once, and of the head, when first called."""
        self.compiles = True
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.compiles = True

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of final ``hidden`` states (..., D)."""
        head = self.lm_head
        # weights that are spread over processes are no plain parameters, and gathered by the layer's own forward alone
        if self.compiles and torch.is_grad_enabled() and type(head) is nn.Linear and type(head.weight) is nn.Parameter:
            return compiled(padded_logits)(hidden, head.weight)
        return head(hidden)

    def flops_per_sequence(self, length: int, start: int = 0) -> float:
        """Arithmetic of a training step on one sequence: forward and backward, recomputation not counted.

        For each weight of a matrix and token two operations forward, two for the gradient of its input where something
        below it is trained, and two for its own where it is trained itself: six where nothing is frozen. The two
        products of causal attention likewise. In front of ``start``, where no hidden state is wanted, the last block
        needs keys and values, and the head nothing.
        """
        config = self.config
        assert config.head_dim is not None
        heads = config.num_heads * config.head_dim
        below = any(_trained(part) for part in (self.embed_tokens, self.action_linear) if part is not None)
        total = 0.0
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            first = start if index == config.num_layers - 1 else 0
            attention, mlp = layer.self_attn, layer.mlp
            below |= _trained(layer.input_layernorm)
            for projection in (attention.k_proj, attention.v_proj):
                total += _product_flops(projection, below) * length
            total += _product_flops(attention.q_proj, below) * (length - first)
            below |= any(_trained(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
            total += (6 if below else 2) * heads * (length**2 - first**2)
            total += _product_flops(attention.o_proj, below) * (length - first)
            below |= _trained(attention.o_proj) or _trained(layer.post_attention_layernorm)
            for projection in (mlp.gate_proj, mlp.up_proj):
                total += _product_flops(projection, below) * (length - first)
            below |= _trained(mlp.gate_proj) or _trained(mlp.up_proj)
            total += _product_flops(mlp.down_proj, below) * (length - first)
            below |= _trained(mlp.down_proj)
        return total + _product_flops(self.lm_head, below or _trained(self.norm)) * (length - start)

    def rope(self, input_pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (L, d) of positions (L,), computed in float32 and then cast."""
        dim, device = self.config.head_dim, input_pos.device
        assert dim is not None
        exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
        angles = input_pos.float()[:, None] * (1.0 / self.config.rope_base**exponent)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, L, D) of ``tokens`` (B, L)."""
        return self.embed_tokens(tokens)

    def embed_actions(self, actions: Tensor) -> Tensor:
        """What ``actions`` (..., A) add to the embedding of the slots they lead to, (..., D)."""
        if self.action_linear is None:
            raise ValueError("this transformer has no action layer (action_dim is None), but actions were given")
        return self.action_linear(actions.to(self.action_linear.weight.dtype))

    def backbone(
        self, embeddings: Tensor, input_pos: Tensor | None = None, cache: Cache | None = None, start: int = 0
    ) -> Tensor:
        """Final normed hidden states (B, L - start, D) of ``embeddings`` (B, L, D).

        Args:
            embeddings: (B, L, D).
            input_pos: positions (L,), 0..L-1 if None.
            cache: where keys and values of earlier positions are found and those of these are stored.
            start: the first of the L positions whose hidden state is wanted.
        """
        if input_pos is None:
            input_pos = torch.arange(embeddings.shape[1], device=embeddings.device)
        x, rope = embeddings, self.rope(input_pos, embeddings.dtype)
        recomputes = self.recomputes and cache is None and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            first = start if index + 1 == len(self.layers) else 0
            if recomputes:
                x = checkpoint(layer, x, rope, index, input_pos, None, first, use_reentrant=False)
            else:
                x = layer(x, rope, index, input_pos, cache, first)
        return self.norm(x)

    def forward(
        self, tokens: Tensor, slot_actions: Tensor | None = None, slot_positions: Tensor | None = None
    ) -> TransformerOutput:
        """Logits and hidden states of ``tokens`` (B, L), teacher-forced.

        Args:
            tokens: (B, L).
            slot_actions: (B, F, A), the actions that lead to the future frames.
            slot_positions: (F,), where their slots stand (``TokenLayout.slot_positions``).
        """
        embeddings = self.embed(tokens)
        if slot_actions is not None:
            assert slot_positions is not None
            embeddings = embeddings.index_add(1, slot_positions, self.embed_actions(slot_actions).to(embeddings.dtype))
        hidden = self.backbone(embeddings)
        return TransformerOutput(self.logits(hidden), hidden)
