"""CompressiveTokenizer: a conditional VQGAN that turns a clip into few tokens and back (arXiv 2405.15223, 3.1).

B batch, T frames, t0 context frames, F = T - t0 future frames, N and n tokens of a context and a future frame,
g the side of the latent grid, p of a patch of it, D codebook width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from ivideogpt.config import TokenizerConfig
from ivideogpt.layout import TokenLayout
from ivideogpt.models.autoencoder import Decoder, Encoder, Recomputing
from ivideogpt.models.compiling import compiled
from ivideogpt.models.conditional import ConditionalDecoder, ConditionalEncoder, CrossAttentionBlock
from ivideogpt.models.quantizer import QuantizerOutput, VectorQuantizer

Features = list[Tensor]
"""One tensor (B*t0, C, h, w) a level, of the context encoder or of the context decoder."""

RANGE_TOLERANCE = 1e-3
"""How far a frame's values may leave [0, 1]: room for the rounding of resizing filters and of bf16, not for -1..1."""


@dataclass
class TokenizerOutput:
    """Training forward.

    Attributes:
        context_reconstruction: (B, t0, C, H, W), not clamped.
        future_reconstruction: (B, F, C, H, W), not clamped.
        commitment_loss: scalar, context codebook.
        dynamics_commitment_loss: scalar, dynamics codebook.
        context_indices: (B, t0, N).
        dynamics_indices: (B, F, n).
        context_latents: (B, t0, N, D) before quantization.
        dynamics_latents: (B, F, n, D) before quantization.
    """

    context_reconstruction: Tensor
    future_reconstruction: Tensor
    commitment_loss: Tensor
    dynamics_commitment_loss: Tensor
    context_indices: Tensor
    dynamics_indices: Tensor
    context_latents: Tensor
    dynamics_latents: Tensor


# without this, FSDP2 of torch 2.11 does not see the tensors inside, and gathers no weights for their backward pass
register_dataclass(TokenizerOutput)


class CompressiveTokenizer(nn.Module):
    """Compressive VQ tokenizer; the published checkpoints' state dicts load into it as they are.

    Attributes:
        compiles: whether a training forward is compiled (``torch.compile``).
    """

    compiles = False

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        channels, layers, groups = config.block_channels, config.layers_per_block, config.norm_num_groups
        latent, dropout = config.latent_channels, config.attention_dropout
        dim = config.codebook_dim
        assert dim is not None
        patch_dim = latent * config.patch_size**2

        self.encoder = Encoder(config.in_channels, latent, channels, layers, groups, config.mid_block_attention)
        self.cond_encoder = ConditionalEncoder(
            config.in_channels, latent, channels, layers, groups,
            config.encoder_attention_levels, config.context_length, dropout,
        )  # fmt: skip
        self.quant_conv = nn.Conv2d(latent, dim, 1)
        self.quantize = VectorQuantizer(config.codebook_size, dim)
        self.post_quant_conv = nn.Conv2d(dim, latent, 1)
        self.quant_linear = nn.Linear(patch_dim, dim)
        self.dynamics_quantize = VectorQuantizer(config.dynamics_codebook_size, dim)
        self.post_quant_linear = nn.Linear(dim, patch_dim)
        self.decoder = Decoder(latent, config.out_channels, channels, layers, groups, config.mid_block_attention)
        self.cond_decoder = ConditionalDecoder(
            latent, config.out_channels, channels, layers, groups, config.grid_size,
            config.decoder_attention_levels, config.context_length, dropout,
        )  # fmt: skip

    @property
    def layout(self) -> TokenLayout:
        return self.config.layout

    @property
    def context_length(self) -> int:
        return self.config.context_length

    def set_context_length(self, context_length: int) -> None:
        """Shortens the context, keeping the last frames' part of the key positions.

        Raises:
            ValueError: if ``context_length`` is longer than the one that the tokenizer has, or below 1.
        """
        if not 1 <= context_length <= self.context_length:
            raise ValueError(
                f"context_length {context_length}: a tokenizer with key positions for {self.context_length} context "
                f"frames can be changed to 1..{self.context_length}; train one for a longer context"
            )
        for block in self.modules():
            if isinstance(block, CrossAttentionBlock):
                block.set_context_length(context_length)
        self.config = replace(self.config, context_length=context_length)

    def check_frames(self, frames: Tensor, name: str = "video") -> None:
        """Refuses frames that this tokenizer was not made for.

        Raises:
            ValueError: if ``frames`` are not floats in [0, 1] of shape (B, T, C, H, W), with the model's C, H and W.
        """
        config = self.config
        if not isinstance(frames, Tensor):
            raise ValueError(f"{name} must be a tensor (B, T, C, H, W), got {type(frames).__name__}")
        shape = tuple(frames.shape)
        if len(shape) != 5:
            raise ValueError(f"{name} must have shape (B, T, C, H, W), got {shape}")
        if not frames.is_floating_point():
            raise ValueError(f"{name} must be floats in [0, 1], got {frames.dtype}: divide 8-bit frames by 255")
        if shape[0] == 0:
            raise ValueError(f"{name} holds no clip: shape {shape}")
        expected = (config.in_channels, config.resolution, config.resolution)
        if shape[2:] != expected:
            raise ValueError(f"{name} must have frames (C, H, W) = {expected} for this model, got {shape[2:]}")
        low, high = (value.item() for value in frames.aminmax()) if frames.numel() else (0.0, 0.0)
        # written so that NaN, which compares false with everything, is refused too
        if not (low >= -RANGE_TOLERANCE and high <= 1.0 + RANGE_TOLERANCE):
            raise ValueError(f"{name} must lie in [0, 1], got values from {low:g} to {high:g}")

    # pixels <-> token ids

    def tokenize(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B, L) of ``video`` (B, T, C, H, W), float in [0, 1].

        Raises:
            ValueError: if the video does not fit the model, or is shorter than its context.
        """
        self.check_frames(video)
        if video.shape[1] < self.context_length:
            raise ValueError(
                f"video of {video.shape[1]} frames is shorter than the model's context of {self.context_length}"
            )
        tokens = self.encode(video)
        return tokens, self.layout.labels(tokens)

    def encode(self, video: Tensor) -> Tensor:
        """Tokens (B, L) of a ``video`` that is known to fit: no check makes the host wait for the device."""
        context_frames, future_frames = video.split([self.context_length, video.shape[1] - self.context_length], 1)
        context_indices, features = self.encode_context(context_frames)
        return self.layout.assemble(context_indices, self.encode_future(future_frames, features))

    def detokenize(self, tokens: Tensor) -> Tensor:
        """Video (B, T, C, H, W), not clamped, of ``tokens`` (B, L)."""
        context_indices, dynamics_indices = self.layout.split(tokens)
        context_frames, features = self.decode_context(context_indices)
        return torch.cat([context_frames, self.decode_future(dynamics_indices, features)], dim=1)

    # pixels <-> codebook indices

    def encode_context(self, context_frames: Tensor) -> tuple[Tensor, Features]:
        """Indices (B, t0, N) and encoder features of ``context_frames`` (B, t0, C, H, W)."""
        latents, features = self._context_latents(context_frames)
        return self.quantize.nearest(latents), features

    def encode_future(self, future_frames: Tensor, features: Features) -> Tensor:
        """Indices (B, F, n) of ``future_frames`` (B, F, C, H, W), seen from their context's encoder features."""
        return self.dynamics_quantize.nearest(self._dynamics_latents(future_frames, features))

    def without_decoders(self) -> CompressiveTokenizer:
        """A copy in eval mode that encodes and does nothing else."""
        parts = copy.copy(self)
        parts._modules = {name: part for name, part in self._modules.items() if not name.endswith("decoder")}
        return copy.deepcopy(parts).eval()

    def decode_context(self, context_indices: Tensor) -> tuple[Tensor, Features]:
        """Frames (B, t0, C, H, W) and decoder features of ``context_indices`` (B, t0, N)."""
        return self._decode_context_entries(self.quantize.embedding(context_indices))

    def decode_future(self, dynamics_indices: Tensor, features: Features) -> Tensor:
        """Frames (B, F, C, H, W) of ``dynamics_indices`` (B, F, n), seen from their context's decoder features."""
        return self._decode_dynamics_entries(self.dynamics_quantize.embedding(dynamics_indices), features)

    def forward(self, context_frames: Tensor, future_frames: Tensor) -> TokenizerOutput:
        """Encodes, quantizes and decodes ``context_frames`` (B, t0, C, H, W), ``future_frames`` (B, F, C, H, W)."""
        if self.compiles and torch.is_grad_enabled():
            return compiled(CompressiveTokenizer.reconstruct)(self, context_frames, future_frames)
        return self.reconstruct(context_frames, future_frames)

    def save_memory(self, recompute: bool = True) -> None:
        """Whether a backward pass computes norms and activations again in place of keeping them."""
        for block in self.modules():
            if isinstance(block, Recomputing):
                block.recomputes = recompute

    def reconstruct(self, context_frames: Tensor, future_frames: Tensor) -> TokenizerOutput:
        """What ``forward`` gives, never compiled."""
        context_latents, encoder_features = self._context_latents(context_frames)
        dynamics_latents = self._dynamics_latents(future_frames, encoder_features)
        context: QuantizerOutput = self.quantize(context_latents)
        dynamics: QuantizerOutput = self.dynamics_quantize(dynamics_latents)
        context_reconstruction, decoder_features = self._decode_context_entries(context.quantized)
        return TokenizerOutput(
            context_reconstruction=context_reconstruction,
            future_reconstruction=self._decode_dynamics_entries(dynamics.quantized, decoder_features),
            commitment_loss=context.commitment_loss,
            dynamics_commitment_loss=dynamics.commitment_loss,
            context_indices=context.indices,
            dynamics_indices=dynamics.indices,
            context_latents=context_latents,
            dynamics_latents=dynamics_latents,
        )

    # pixels <-> latents

    def _context_latents(self, context_frames: Tensor) -> tuple[Tensor, Features]:
        rows = context_frames.shape[:2]
        latents, features = self.encoder(context_frames.flatten(0, 1))
        latents = self.quant_conv(latents)  # (B*t0, D, g, g)
        return latents.flatten(2).transpose(1, 2).unflatten(0, rows), features

    def _dynamics_latents(self, future_frames: Tensor, features: Features) -> Tensor:
        rows, p = future_frames.shape[:2], self.config.patch_size
        latents = self.cond_encoder(future_frames.flatten(0, 1), features)  # (B*F, c, g, g)
        patches = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B*F, c, g/p, p, g/p, p)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B*F, n, p p c)
        return self.quant_linear(patches).unflatten(0, rows)

    def _decode_context_entries(self, entries: Tensor) -> tuple[Tensor, Features]:
        grid = entries_to_grid(entries.flatten(0, 1), self.config.grid_size)
        frames, features = self.decoder(self.post_quant_conv(grid))
        return frames.unflatten(0, entries.shape[:2]), features

    def _decode_dynamics_entries(self, entries: Tensor, features: Features) -> Tensor:
        patches = self.post_quant_linear(entries.flatten(0, 1))  # (B*F, n, p p c)
        latents = patches_to_grid(patches, self.config.patch_size, self.config.grid_size)
        return self.cond_decoder(latents, features).unflatten(0, entries.shape[:2])


def entries_to_grid(entries: Tensor, grid_size: int) -> Tensor:
    """Grid (B, D, g, g) of a context frame's codebook ``entries`` (B, N, D)."""
    return entries.transpose(1, 2).unflatten(2, (grid_size, grid_size))


def patches_to_grid(patches: Tensor, patch_size: int, grid_size: int) -> Tensor:
    """Latents (B, c, g, g) of ``patches`` (B, n, p p c)."""
    p, side = patch_size, grid_size // patch_size
    patches = patches.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (B, g/p, g/p, p, p, c)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
