"""Whether clips, as pixels or as tokens, fit the model that is trained on them."""

from __future__ import annotations

from typing import Any

from ivideogpt.layout import TokenLayout
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.zoo.fingerprint import tokenizer_hash


def check_length(frames: int, layout: TokenLayout, transformer: Transformer) -> None:
    """Refuses clips that are longer than the transformer's positions.

    Raises:
        ValueError: naming both.
    """
    length, positions = layout.sequence_length(frames), transformer.config.max_positions
    if length > positions:
        raise ValueError(
            f"a clip of {frames} frames takes {length} positions, the transformer has {positions}: lower "
            f"the data's segment_length or raise max_positions"
        )


def check_token_data(data: Any, tokenizer: CompressiveTokenizer, transformer: Transformer) -> None:
    """Refuses a data module of tokens that another tokenizer made, or of clips that the model cannot take.

    Args:
        data: the data module; one without a ``tokenizer_hash`` delivers pixels and is not looked at.
        tokenizer: of the model.
        transformer: of the model.

    Raises:
        ValueError: naming both values.
    """
    made_by = getattr(data, "tokenizer_hash", None)
    if made_by is None:
        return
    if data.context_length != tokenizer.context_length:
        raise ValueError(
            f"the tokens were made with context_length {data.context_length}, the tokenizer has "
            f"{tokenizer.context_length}: tokenize the recordings with this model"
        )
    drafted = tokenizer.quantize.embedding.weight.is_meta  # a stage's model before the stages that it comes from
    own = made_by if drafted else tokenizer_hash(tokenizer)
    if made_by != own:
        raise ValueError(
            f"the tokens were made by another tokenizer: its hash is {made_by}, this model's is {own}; tokenize the "
            f"recordings with this model, or train with the tokenizer that made the tokens"
        )
    check_length(data.segment_length, tokenizer.layout, transformer)
    wanted = transformer.config.action_dim
    if wanted is not None and wanted != data.action_dim:
        raise ValueError(f"the transformer takes actions of size {wanted}, those of the tokens are {data.action_dim}")
