"""Encoder and decoder of future frames, which look at the context frames' features by cross-attention.

B batch, t0 context frames, n frames of that batch row that share its context, C channels, h x w a feature map.
Queries of all n frames of a row attend to one set of keys, so keys and values are computed once a context however
many frames (or sampled futures) look at it.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivideogpt.config import CROSS_ATTENTION_HEADS, CROSS_ATTENTION_NORM_GROUPS
from ivideogpt.models.autoencoder import Decoder, Encoder, normed_convolution

KeysValues = tuple[Tensor, Tensor]
"""Keys and values (B, heads, t0 hw, C / heads) of the context frames at one level."""


class MultiheadCrossAttention(nn.Module):
    """Projections and attention, with the parameter names of ``torch.nn.MultiheadAttention``."""

    def __init__(self, channels: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """``query`` (B, Lq, C) looks at ``context`` (B, Lk, C)."""
        return self.attend(query, *self.keys_values(context))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of ``context`` (B, Lk, C)."""
        channels = context.shape[-1]
        kv = F.linear(context, self.in_proj_weight[channels:], self.in_proj_bias[channels:])
        k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in kv.chunk(2, dim=-1))
        return k, v

    def attend(self, query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``query`` (B, Lq, C) looks at the context that ``k`` and ``v`` are of."""
        channels = query.shape[-1]
        q = F.linear(query, self.in_proj_weight[:channels], self.in_proj_bias[:channels])
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class CrossAttentionBlock(nn.Module):
    """Adds to a frame's features what it finds in those of its context frames."""

    def __init__(self, channels: int, resolution: int, context_length: int, dropout: float) -> None:
        super().__init__()
        self.context_length = context_length
        self.att = MultiheadCrossAttention(channels, CROSS_ATTENTION_HEADS, dropout)
        self.resid_dropout = nn.Dropout(dropout)
        self.kv_norm = nn.GroupNorm(CROSS_ATTENTION_NORM_GROUPS, channels)
        self.q_norm = nn.GroupNorm(CROSS_ATTENTION_NORM_GROUPS, channels)
        self.kv_pos_emb = nn.Parameter(torch.zeros(context_length * resolution**2, channels))
        self.q_pos_emb = nn.Parameter(torch.zeros(resolution**2, channels))

    def set_context_length(self, context_length: int) -> None:
        """Keeps the last ``context_length`` frames' part of the key positions."""
        per_frame = self.kv_pos_emb.shape[0] // self.context_length
        kept = self.kv_pos_emb.detach()[-context_length * per_frame :].clone()
        self.kv_pos_emb = nn.Parameter(kept, requires_grad=self.kv_pos_emb.requires_grad)
        self.context_length = context_length

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``x`` (B*n, C, h, w) looks at ``context`` (B*t0, C, h, w)."""
        return self.attend(x, *self.keys_values(context))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of ``context`` (B*t0, C, h, w): what of it every frame that looks at it needs."""
        rows = context.shape[0] // self.context_length
        kv = context.unflatten(0, (rows, self.context_length)).transpose(1, 2).flatten(2)  # (B, C, t0 hw)
        return self.att.keys_values(self.kv_norm(kv).transpose(1, 2) + self.kv_pos_emb)

    def attend(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``x`` (B*n, C, h, w) looks at the context that ``k`` and ``v`` are of."""
        q = self.q_norm(x).flatten(2).transpose(1, 2) + self.q_pos_emb  # (B*n, hw, C)
        out = self.att.attend(q.reshape(k.shape[0], -1, q.shape[-1]), k, v)  # (B, n hw, C)
        out = self.resid_dropout(out).reshape(q.shape).transpose(1, 2).reshape(x.shape)
        return F.silu(x + out)


class ConditionalEncoder(Encoder):
    """Encoder of future frames; ``features`` are those of the context :class:`Encoder`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        attention_levels: list[tuple[int, int]],
        context_length: int,
        dropout: float,
    ) -> None:
        super().__init__(in_channels, out_channels, block_channels, layers_per_block, norm_num_groups, True)
        self.attention_index = {level: index for index, (level, _) in enumerate(attention_levels)}
        self.cross_att_blocks = nn.ModuleList(
            CrossAttentionBlock(block_channels[level], width, context_length, dropout)
            for level, width in attention_levels
        )

    def forward(self, frames: Tensor, features: list[Tensor]) -> Tensor:  # type: ignore[override]
        x = self.conv_in(frames)
        for level, block in enumerate(self.down_blocks):
            x = block(x)
            if level in self.attention_index:
                x = self.cross_att_blocks[self.attention_index[level]](x, features[level + 1])
        x = self.mid_block(x)
        return self.run(normed_convolution, self.conv_norm_out, self.conv_out, x)


class ConditionalDecoder(Decoder):
    """Decoder of future frames; ``features`` are those of the context :class:`Decoder`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        grid_size: int,
        attention_levels: list[tuple[int, int]],
        context_length: int,
        dropout: float,
    ) -> None:
        super().__init__(in_channels, out_channels, block_channels, layers_per_block, norm_num_groups, True)
        widths = tuple(reversed(block_channels))
        self.attention_index = {level: index for index, (level, _) in enumerate(attention_levels, start=1)}
        self.cross_att_blocks = nn.ModuleList(
            [CrossAttentionBlock(widths[0], grid_size, context_length, dropout)]
            + [CrossAttentionBlock(widths[level], width, context_length, dropout) for level, width in attention_levels]
        )

    @property
    def feature_levels(self) -> list[int]:
        """Which of the context decoder's features each cross-attention looks at."""
        return [1, *(level + 2 for level in self.attention_index)]

    def keys_values(self, features: list[Tensor]) -> list[KeysValues]:
        """Keys and values of each cross-attention, from the features at :attr:`feature_levels`."""
        return [self._cross_attention(index).keys_values(x) for index, x in enumerate(features)]

    def _cross_attention(self, index: int) -> CrossAttentionBlock:
        return cast("CrossAttentionBlock", self.cross_att_blocks[index])

    def last_features(self, latents: Tensor, keys_values: list[KeysValues]) -> Tensor:
        """What :meth:`to_frames` makes frames of, from ``latents`` (B*n, c, g, g)."""
        x = self.mid_block(self.conv_in(latents))
        x = self._cross_attention(0).attend(x, *keys_values[0])
        for level, block in enumerate(self.up_blocks):
            x = block(x)
            if level in self.attention_index:
                index = self.attention_index[level]
                x = self._cross_attention(index).attend(x, *keys_values[index])
        return x

    def forward(self, latents: Tensor, features: list[Tensor]) -> Tensor:  # type: ignore[override]
        keys_values = self.keys_values([features[level] for level in self.feature_levels])
        return self.to_frames(self.last_features(latents, keys_values))
