"""Pure ``nn.Module`` models: tokenizer, transformer, reward head, discriminator."""

from ivideogpt.models.discriminator import PatchDiscriminator
from ivideogpt.models.reward_head import RewardHead, symexp, symlog
from ivideogpt.models.tokenizer import CompressiveTokenizer, TokenizerOutput
from ivideogpt.models.transformer import Transformer, TransformerOutput, next_token_loss

__all__ = [
    "CompressiveTokenizer",
    "PatchDiscriminator",
    "RewardHead",
    "TokenizerOutput",
    "Transformer",
    "TransformerOutput",
    "next_token_loss",
    "symexp",
    "symlog",
]
