"""Configurations of tokenizer, transformer, reward head and world model: frozen dataclasses, presets, validation.

Every structural number of a model stands here once; derived numbers are properties. How these map to the files of
the published checkpoints is the business of ``ivideogpt.zoo.published``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ivideogpt.layout import TokenLayout

RewardTransform = Literal["symlog", "identity"]

CROSS_ATTENTION_HEADS = 4
CROSS_ATTENTION_NORM_GROUPS = 32
"""The published tokenizers fix these two, and no file of theirs stores them."""

MOST_POSITIONS = 2**18
"""Longest sequence of a transformer: rollouts tabulate the rotary embedding of every position."""


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be a positive integer, got {value!r}")


@dataclass(frozen=True)
class TokenizerConfig:
    """Compressive tokenizer (arXiv 2405.15223, section 3.1).

    Args:
        resolution: height and width of a frame in pixels.
        in_channels: colour channels of a frame.
        out_channels: colour channels of a reconstruction.
        block_channels: channels of each resolution level; every level but the last halves the resolution.
        layers_per_block: residual blocks a level in the encoders (the decoders have one more).
        latent_channels: channels of the latent grid.
        norm_num_groups: groups of the group norms.
        codebook_size: entries of the context codebook.
        dynamics_codebook_size: entries of the dynamics codebook.
        codebook_dim: width of a codebook entry; ``latent_channels`` if None.
        patch_size: side of the latent patch that becomes one dynamics token.
        max_attention_resolution: cross-attention stands where the feature map is at most this wide.
        mid_block_attention: self-attention in the middle of the context encoder and decoder (the conditional ones
            always have it).
        context_length: context frames that future frames are conditioned on.
        attention_dropout: dropout of the cross-attention while training; the published files do not store it.
    """

    resolution: int = 64
    in_channels: int = 3
    out_channels: int = 3
    block_channels: tuple[int, ...] = (128, 256, 512)
    layers_per_block: int = 2
    latent_channels: int = 64
    norm_num_groups: int = 32
    codebook_size: int = 8192
    dynamics_codebook_size: int = 8192
    codebook_dim: int | None = None
    patch_size: int = 4
    max_attention_resolution: int = 16
    mid_block_attention: bool = False
    context_length: int = 2
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_channels", tuple(self.block_channels))
        if self.codebook_dim is None:
            object.__setattr__(self, "codebook_dim", self.latent_channels)
        _check_positive(
            self,
            *("resolution", "in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"),
            *("codebook_size", "dynamics_codebook_size", "codebook_dim", "patch_size", "context_length"),
        )
        if not self.block_channels:
            raise ValueError("TokenizerConfig.block_channels must name at least one level, got ()")
        for channels in self.block_channels:
            if not isinstance(channels, int) or channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"TokenizerConfig.block_channels {self.block_channels}: {channels!r} is no positive multiple of "
                    f"norm_num_groups {self.norm_num_groups}"
                )
        factor = 2 ** (len(self.block_channels) - 1)
        if self.resolution % (factor * self.patch_size):
            raise ValueError(
                f"TokenizerConfig.resolution {self.resolution} must be a multiple of {factor * self.patch_size} "
                f"({len(self.block_channels)} levels, patch_size {self.patch_size})"
            )
        if self.grid_size > self.max_attention_resolution:
            raise ValueError(
                f"TokenizerConfig: the latent grid of {self.grid_size} is wider than max_attention_resolution "
                f"{self.max_attention_resolution}, so no future frame could see its context"
            )
        for level, width in self.encoder_attention_levels:
            channels = self.block_channels[level]
            if channels % CROSS_ATTENTION_NORM_GROUPS:
                raise ValueError(
                    f"TokenizerConfig.block_channels[{level}] = {channels} has cross-attention (feature map {width} "
                    f"wide), whose group norm needs a multiple of {CROSS_ATTENTION_NORM_GROUPS}"
                )
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"TokenizerConfig.attention_dropout must be in [0, 1), got {self.attention_dropout!r}")

    @property
    def grid_size(self) -> int:
        """Side of the latent grid (16 in all published checkpoints)."""
        return self.resolution // 2 ** (len(self.block_channels) - 1)

    @property
    def encoder_attention_levels(self) -> list[tuple[int, int]]:
        """(level, feature map width) of every encoder level that has cross-attention, after its downsampling."""
        last = len(self.block_channels) - 1
        widths = [self.resolution // 2 ** min(level + 1, last) for level in range(last + 1)]
        return [(level, width) for level, width in enumerate(widths) if width <= self.max_attention_resolution]

    @property
    def decoder_attention_levels(self) -> list[tuple[int, int]]:
        """(level, feature map width) of every decoder level that has cross-attention, after its upsampling."""
        last = len(self.block_channels) - 1
        widths = [self.grid_size * 2 ** min(level + 1, last) for level in range(last + 1)]
        return [(level, width) for level, width in enumerate(widths) if width <= self.max_attention_resolution]

    @property
    def context_tokens_per_frame(self) -> int:
        return self.grid_size**2

    @property
    def dynamics_tokens_per_frame(self) -> int:
        return (self.grid_size // self.patch_size) ** 2

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(
            context_length=self.context_length,
            context_tokens_per_frame=self.context_tokens_per_frame,
            dynamics_tokens_per_frame=self.dynamics_tokens_per_frame,
            codebook_size=self.codebook_size,
            dynamics_codebook_size=self.dynamics_codebook_size,
        )

    @property
    def vocab_size(self) -> int:
        return self.layout.vocab_size

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TokenizerConfig:
        """Named configuration: ``"64"`` and ``"256"`` as published, ``"nano"`` the embedded one."""
        return replace(_preset(_TOKENIZERS, name, "tokenizer"), **overrides)


@dataclass(frozen=True)
class TransformerConfig:
    """LLaMA-style transformer over the tokens of a clip.

    Args:
        vocab_size: number of token ids.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads (grouped-query attention); ``num_heads`` if None.
        embed_dim: width of the residual stream.
        mlp_dim: width of the SwiGLU layer.
        head_dim: width of a head; ``embed_dim // num_heads`` if None.
        max_positions: longest sequence.
        rope_base: base of the rotary embedding.
        norm_eps: epsilon of the RMS norms.
        attention_dropout: dropout of the attention weights while training.
        attention_bias: biases in the attention projections.
        mlp_bias: biases in the SwiGLU projections.
        initializer_range: standard deviation of fresh weights.
        action_dim: size of an action; None for a model without actions.
    """

    vocab_size: int = 16386
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    embed_dim: int = 768
    mlp_dim: int = 3072
    head_dim: int | None = None
    max_positions: int = 1024
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    action_dim: int | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        _check_positive(self, "vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim", "mlp_dim")
        _check_positive(self, "max_positions")
        if self.max_positions > MOST_POSITIONS:
            raise ValueError(
                f"TransformerConfig.max_positions must be at most {MOST_POSITIONS}, got {self.max_positions}: a "
                "rollout takes memory for each"
            )
        if self.head_dim is None:
            if self.embed_dim % self.num_heads:
                raise ValueError(
                    f"TransformerConfig.embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}"
                )
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        _check_positive(self, "head_dim")
        assert self.num_kv_heads is not None and self.head_dim is not None
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"TransformerConfig.num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"TransformerConfig.head_dim must be even (rotary embedding), got {self.head_dim}")
        if self.rope_base <= 0 or self.norm_eps <= 0:
            raise ValueError(
                f"TransformerConfig.rope_base and norm_eps must be positive, got {self.rope_base!r}, {self.norm_eps!r}"
            )
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"TransformerConfig.attention_dropout must be in [0, 1), got {self.attention_dropout!r}")
        if self.action_dim is not None:
            _check_positive(self, "action_dim")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TransformerConfig:
        """Named configuration: ``"small"`` (138M) and ``"medium"`` (436M) as published, ``"nano"`` the embedded one."""
        return replace(_preset(_TRANSFORMERS, name, "transformer"), **overrides)


@dataclass(frozen=True)
class RewardHeadConfig:
    """Linear reward head on the transformer's final hidden state.

    Args:
        embed_dim: width of the hidden state.
        transform: ``"symlog"`` if the head was trained on symlog(reward), ``"identity"`` if on the reward itself.
    """

    embed_dim: int = 768
    transform: RewardTransform = "symlog"

    def __post_init__(self) -> None:
        _check_positive(self, "embed_dim")
        if self.transform not in get_args(RewardTransform):
            raise ValueError(
                f"RewardHeadConfig.transform must be one of {get_args(RewardTransform)}, got {self.transform!r}"
            )


@dataclass(frozen=True)
class WorldModelConfig:
    """World model: a tokenizer, a transformer over its tokens, and a reward head if there is one."""

    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    reward_head: RewardHeadConfig | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size != self.transformer.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} token ids (slots included) and the transformer a "
                f"vocabulary of {self.transformer.vocab_size}: they do not belong together"
            )
        if self.reward_head is not None and self.reward_head.embed_dim != self.transformer.embed_dim:
            raise ValueError(
                f"the reward head expects hidden states of width {self.reward_head.embed_dim}, the transformer's "
                f"are {self.transformer.embed_dim} wide"
            )
        if self.layout.prompt_length > self.transformer.max_positions:
            raise ValueError(
                f"{self.context_length} context frames take {self.layout.prompt_length} positions, the transformer "
                f"has {self.transformer.max_positions}"
            )

    @property
    def layout(self) -> TokenLayout:
        return self.tokenizer.layout

    @property
    def context_length(self) -> int:
        return self.tokenizer.context_length

    @property
    def action_dim(self) -> int | None:
        return self.transformer.action_dim

    @property
    def max_horizon(self) -> int:
        """Largest number of future frames that the transformer's positions allow."""
        return self.layout.max_horizon(self.transformer.max_positions)

    @classmethod
    def preset(
        cls, name: str, action_dim: int | None = None, reward: bool = False, context_length: int | None = None
    ) -> WorldModelConfig:
        """Named world model: ``"64-small"``, ``"64-medium"``, ``"256-small"`` or ``"nano"``."""
        tokenizer_name, transformer_name = _preset(_WORLD_MODELS, name, "world model")
        tokenizer = TokenizerConfig.preset(tokenizer_name)
        if context_length is not None:
            tokenizer = replace(tokenizer, context_length=context_length)
        transformer = TransformerConfig.preset(transformer_name, vocab_size=tokenizer.vocab_size, action_dim=action_dim)
        return cls(tokenizer, transformer, RewardHeadConfig(transformer.embed_dim) if reward else None)


def _preset(presets: dict[str, Any], name: str, kind: str) -> Any:
    if name not in presets:
        raise ValueError(f"no {kind} preset {name!r}; there are {sorted(presets)}")
    return presets[name]


_TOKENIZERS = {
    "64": TokenizerConfig(),
    "256": TokenizerConfig(
        resolution=256, block_channels=(128, 256, 256, 512, 768), max_attention_resolution=32, context_length=2
    ),
    "nano": TokenizerConfig(
        block_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        codebook_size=1024,
        dynamics_codebook_size=1024,
        attention_dropout=0.0,  # too small to overfit in the hours that it trains
    ),
}
_TRANSFORMERS = {
    "small": TransformerConfig(),
    "medium": TransformerConfig(num_layers=24, num_heads=16, embed_dim=1024, mlp_dim=4096),
    "nano": TransformerConfig(vocab_size=2050, num_layers=6, num_heads=4, embed_dim=256, mlp_dim=512),
}
_WORLD_MODELS = {
    "64-small": ("64", "small"),
    "64-medium": ("64", "medium"),
    "256-small": ("256", "small"),
    "nano": ("nano", "nano"),
}
