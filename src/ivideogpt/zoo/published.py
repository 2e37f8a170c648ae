"""Translation between the JSON files and tensor names of the published checkpoints and this package's.

``tokenizer/config.json`` is a diffusers configuration, ``transformer/config.json`` a LlamaConfig. Every structural
number of a model is read from them. Each of their fields is one of three kinds: *used* (it becomes a field of our
configuration), *fixed* (this package computes one value of it, any other is refused), or *carried* (it changes no
result; it is kept as it is and written back). A field that is none of them is refused. A used field that is missing
has the default that the original code gives it, which is not the default of our presets.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ivideogpt.config import TokenizerConfig, TransformerConfig

Fields = dict[str, Any]


@dataclass
class Published:
    """What the published files of a loaded model held, so that it can be written back as it was.

    Attributes:
        tokenizer_fields: ``tokenizer/config.json``, None for a model that was never in a file.
        transformer_fields: ``transformer/config.json``, likewise.
        generation_config: ``transformer/generation_config.json``, None where there is none.
        tokenizer_dtypes: dtype of each tensor of the tokenizer file, by its name there.
        transformer_dtypes: likewise for the transformer file.
        recipe: text of the resolved ``recipe.yaml`` beside the weights, None where there is none.
    """

    tokenizer_fields: Fields | None = None
    transformer_fields: Fields | None = None
    generation_config: Fields | None = None
    tokenizer_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    transformer_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    recipe: str | None = None


@dataclass(frozen=True)
class _Used:
    name: str  # of the field of our configuration
    kind: str  # "int", "float", "bool", "ints"; with "?" also null
    default: Any  # of the original's constructor


# Defaults: the constructor of the original's CompressiveVQModel.
_TOKENIZER_USED = {
    "resolution": _Used("resolution", "int", 256),
    "in_channels": _Used("in_channels", "int", 3),
    "out_channels": _Used("out_channels", "int", 3),
    "block_out_channels": _Used("block_channels", "ints", [64]),
    "layers_per_block": _Used("layers_per_block", "int", 1),
    "latent_channels": _Used("latent_channels", "int", 3),
    "norm_num_groups": _Used("norm_num_groups", "int", 32),
    "num_vq_embeddings": _Used("codebook_size", "int", 256),
    "num_dyn_embeddings": _Used("dynamics_codebook_size", "int", 256),
    "vq_embed_dim": _Used("codebook_dim", "int?", None),
    "patch_size": _Used("patch_size", "int", 4),
    "max_att_resolution": _Used("max_attention_resolution", "int", 32),
    "mid_block_add_attention": _Used("mid_block_attention", "bool", True),
    "context_length": _Used("context_length", "int", 1),
}
_TOKENIZER_FIXED: dict[str, tuple[Any, ...]] = {"act_fn": ("silu", "swish"), "norm_type": ("group",)}
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_TOKENIZER_CARRIED = {
    *("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "_commit_hash"),
    *("sample_size", "scaling_factor", "lookup_from_codebook", "force_upcast"),
    *("dyn_dim", "num_dyn_tokens"),  # of earlier releases of the original; its code ignores them
}

# Defaults: LlamaConfig, the same in transformers 4.30 to 5.
_TRANSFORMER_USED = {
    "vocab_size": _Used("vocab_size", "int", 32000),
    "hidden_size": _Used("embed_dim", "int", 4096),
    "intermediate_size": _Used("mlp_dim", "int", 11008),
    "num_hidden_layers": _Used("num_layers", "int", 32),
    "num_attention_heads": _Used("num_heads", "int", 32),
    "num_key_value_heads": _Used("num_kv_heads", "int?", None),
    "head_dim": _Used("head_dim", "int?", None),
    "max_position_embeddings": _Used("max_positions", "int", 2048),
    "rope_theta": _Used("rope_base", "float", 10000.0),
    "rms_norm_eps": _Used("norm_eps", "float", 1e-6),
    "attention_dropout": _Used("attention_dropout", "float", 0.0),
    "attention_bias": _Used("attention_bias", "bool", False),
    "mlp_bias": _Used("mlp_bias", "bool", False),
    "initializer_range": _Used("initializer_range", "float", 0.02),
}
_TRANSFORMER_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "tie_word_embeddings": (False,),
    "partial_rotary_factor": (None, 1.0),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "auto_map": (None, {}),  # code of the repository's own, which is never run here
}
# The other fields of LlamaConfig and PretrainedConfig, transformers 4.30 to 5: outputs, labels, special tokens, text
# generation, bookkeeping.
_TRANSFORMER_CARRIED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation
    _name_or_path _output_attentions architectures attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder label2id length_penalty
    max_length min_length name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_last_hidden_states tokenizer_class top_k
    top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache use_return_dict
    """.split()
)


def read_json(path: Path) -> Fields:
    """The object in the JSON file ``path``.

    Raises:
        ValueError: if the file holds no JSON object, or NaN or Infinity.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON number")

    try:
        fields = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {_short(fields)}")
    return fields


def check_known(fields: Iterable[str], known: Iterable[str], where: object, values: Mapping[str, Any]) -> None:
    """Refuses a field that is not among the known ones, naming the nearest of them."""
    known = sorted(known)
    for name in fields:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{where}: unknown field {name!r} (value {_short(values[name])}); the nearest known one is {nearest!r}"
            )


def tokenizer_config(fields: Mapping[str, Any], where: object, attention_dropout: float = 0.1) -> TokenizerConfig:
    """Configuration of the tokenizer that ``fields`` of a ``tokenizer/config.json`` describe.

    Args:
        fields: the file's object.
        where: what to call it in an error.
        attention_dropout: of the cross-attention while training, which the file does not store.

    Raises:
        ValueError: on an unknown field, a value of the wrong type, or one that asks for another computation.
    """
    known = {*_TOKENIZER_USED, *_TOKENIZER_FIXED, *_BLOCK_TYPES, *_TOKENIZER_CARRIED}
    check_known(fields, known, where, fields)
    _check_fixed(fields, _TOKENIZER_FIXED, where)
    values = _read(fields, _TOKENIZER_USED, where)
    for name, block_type in _BLOCK_TYPES.items():
        expected = [block_type] * len(values["block_channels"])
        if fields.get(name, [block_type]) != expected:
            raise ValueError(
                f"{where}: {name} {_short(fields.get(name, [block_type]))} is not supported; for "
                f"{len(expected)} block_out_channels this package computes {expected}"
            )
    try:
        return TokenizerConfig(**values, attention_dropout=attention_dropout)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def transformer_config(fields: Mapping[str, Any], where: object, action_dim: int | None = None) -> TransformerConfig:
    """Configuration of the transformer that ``fields`` of a ``transformer/config.json`` (a LlamaConfig) describe.

    The base of the rotary embedding is read from ``rope_theta``, or from ``rope_parameters`` as transformers 5 writes.

    Args:
        fields: the file's object.
        where: what to call it in an error.
        action_dim: size of an action, which the file does not store (the action layer's shape tells it).

    Raises:
        ValueError: on an unknown field, a value of the wrong type, or one that asks for another computation.
    """
    known = {*_TRANSFORMER_USED, *_TRANSFORMER_FIXED, *_TRANSFORMER_CARRIED, "rope_parameters", "rope_scaling"}
    check_known(fields, known, where, fields)
    _check_fixed(fields, _TRANSFORMER_FIXED, where)
    values = _read(fields, _TRANSFORMER_USED, where)
    for name in ("rope_parameters", "rope_scaling"):
        base = _rope_base(fields.get(name), f"{where}: {name}")
        if base is None:
            continue
        if "rope_theta" in fields and values["rope_base"] != base:
            raise ValueError(f"{where}: rope_theta {fields['rope_theta']!r} and {name} {base!r} disagree")
        values["rope_base"] = base
    try:
        return TransformerConfig(**values, action_dim=action_dim)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def tokenizer_fields(config: TokenizerConfig, base: Fields | None) -> Fields:
    """Object for ``tokenizer/config.json``: ``base`` with what differs in ``config``, or a new one for None."""
    new = _values(config, _TOKENIZER_USED)
    if base is not None:
        old = _values(tokenizer_config(base, "tokenizer"), _TOKENIZER_USED)
        fields = base | {name: value for name, value in new.items() if value != old[name]}
    else:
        fields = {
            "_class_name": "CompressiveVQModel", "_diffusers_version": "0.27.2", "act_fn": "silu",
            "force_upcast": True, "lookup_from_codebook": True, "norm_type": "group", "sample_size": 32,
            "scaling_factor": 0.18215, **new,
        }  # fmt: skip
    if base is None or len(base.get("down_block_types", [""])) != len(config.block_channels):
        fields |= {name: [block_type] * len(config.block_channels) for name, block_type in _BLOCK_TYPES.items()}
    assert tokenizer_config(fields, "tokenizer", config.attention_dropout) == config
    return dict(sorted(fields.items()))


def transformer_fields(config: TransformerConfig, base: Fields | None) -> Fields:
    """Object for ``transformer/config.json``: ``base`` with what differs in ``config``, or a new one for None."""
    new = _values(config, _TRANSFORMER_USED)
    if base is not None:
        old = _values(transformer_config(base, "transformer"), _TRANSFORMER_USED)
        fields = base | {name: value for name, value in new.items() if value != old[name]}
        if base.get("rope_parameters") and "rope_theta" not in base and "rope_theta" in fields:
            fields["rope_parameters"] = {**base["rope_parameters"], "rope_theta": fields.pop("rope_theta")}
    else:
        fields = {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 50256, "eos_token_id": 50256, "hidden_act": "silu",
            "model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False,
            "torch_dtype": "float32", "transformers_version": "4.44.2", "use_cache": True, **new,
        }  # fmt: skip
        if fields["head_dim"] is None:
            del fields["head_dim"]  # the transformers release of the published files does not know the field
    assert transformer_config(fields, "transformer", config.action_dim) == config
    return dict(sorted(fields.items()))


# tensor names


def transformer_key(name: str, wrapped: bool) -> str:
    """Name in ``transformer/model.safetensors`` of our transformer's tensor ``name``.

    Args:
        name: key of the state dict of :class:`ivideogpt.models.Transformer`.
        wrapped: True for the layout with an action layer or a reward head, which stands around the language model.
    """
    if name.startswith("action_linear."):
        return name
    key = name if name.startswith("lm_head.") else f"model.{name}"
    return f"llm.{key}" if wrapped else key


def reward_key(name: str) -> str:
    """Name in ``transformer/model.safetensors`` of the reward head's tensor ``name``."""
    return f"reward_{name}"  # linear.weight -> reward_linear.weight


def _read(fields: Mapping[str, Any], used: Mapping[str, _Used], where: object) -> Fields:
    values = {}
    for name, entry in used.items():
        value = fields.get(name, entry.default)
        if not _is_kind(value, entry.kind):
            raise ValueError(f"{where}: {name} must be {_KINDS[entry.kind]}, got {_short(value)}")
        if entry.kind == "ints":
            value = tuple(value)
        elif entry.kind == "float":
            value = float(value)
        values[entry.name] = value
    return values


def _values(config: TokenizerConfig | TransformerConfig, used: Mapping[str, _Used]) -> Fields:
    """All used fields of ``config`` as the files write them, null where the value follows from another one."""
    values = {name: getattr(config, entry.name) for name, entry in used.items()}
    if isinstance(config, TokenizerConfig):
        values["block_out_channels"] = list(config.block_channels)
        values["vq_embed_dim"] = None if config.codebook_dim == config.latent_channels else config.codebook_dim
    elif config.head_dim == config.embed_dim // config.num_heads:
        values["head_dim"] = None
    return values


_KINDS = {
    "int": "an integer", "int?": "an integer or null", "float": "a number", "bool": "true or false",
    "ints": "a list of integers",
}  # fmt: skip


def _is_kind(value: object, kind: str) -> bool:
    if kind == "ints":
        return isinstance(value, list | tuple) and all(_is_kind(item, "int") for item in value)
    if kind == "int?":
        return value is None or _is_kind(value, "int")
    if kind == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind == "float":
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, int)


def _check_fixed(fields: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], where: object) -> None:
    for name, allowed in fixed.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(
                f"{where}: {name} {_short(fields[name])} is not supported; this package computes {allowed[0]!r}"
            )


def _rope_base(rope: Any, where: str) -> float | None:
    """Base in a ``rope_parameters`` or ``rope_scaling`` object, None where there is none; scaled ones are refused."""
    if rope is None:
        return None
    if not isinstance(rope, dict):
        raise ValueError(f"{where} must be an object or null, got {_short(rope)}")
    _check_fixed(rope, {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (None, 1.0)}, where)
    check_known(rope, ("rope_theta", "rope_type", "type", "partial_rotary_factor"), where, rope)
    base = rope.get("rope_theta")
    if base is not None and not _is_kind(base, "float"):
        raise ValueError(f"{where}: rope_theta must be a number, got {_short(base)}")
    return None if base is None else float(base)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
