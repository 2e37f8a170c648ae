"""Loading and saving the parts of a world model as a folder in the published layout.

tokenizer/config.json    tokenizer/diffusion_pytorch_model.safetensors
transformer/config.json  transformer/model.safetensors  [transformer/generation_config.json]
[ivideogpt.json]         what the published layout lacks
[recipe.yaml]            the resolved recipe that trained the weights
[transformer/action_spaces.safetensors]   of a model with several action spaces

A LoRA adapter (:mod:`ivideogpt.zoo.adapter`) is loaded as well: its base, with the adapter merged in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivideogpt.config import RewardHeadConfig, WorldModelConfig
from ivideogpt.models.action_layers import ActionLayers
from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.zoo import published
from ivideogpt.zoo.action_spaces import ACTION_SPACES, read_action_layers, write_action_layers
from ivideogpt.zoo.changing import change_parts
from ivideogpt.zoo.folder import finish_interrupted_save, replacing_files
from ivideogpt.zoo.published import Published, read_json, reward_key, transformer_key
from ivideogpt.zoo.side_file import SIDE_FILE, check_extras, read_side_file, side_file_text
from ivideogpt.zoo.tensors import Header, build_on_meta, check_header, read_header, read_tensors, write_tensors

if TYPE_CHECKING:
    from ivideogpt.zoo.adapter import Adapter

TOKENIZER_CONFIG = "tokenizer/config.json"
TOKENIZER_WEIGHTS = "tokenizer/diffusion_pytorch_model.safetensors"
TRANSFORMER_CONFIG = "transformer/config.json"
TRANSFORMER_WEIGHTS = "transformer/model.safetensors"
GENERATION_CONFIG = "transformer/generation_config.json"
RECIPE = "recipe.yaml"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_LAYERS = "adapter_layers.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_LAYERS)
FILES = (
    *(TOKENIZER_CONFIG, TOKENIZER_WEIGHTS, TRANSFORMER_CONFIG, TRANSFORMER_WEIGHTS),
    *(GENERATION_CONFIG, SIDE_FILE, RECIPE, ACTION_SPACES),
    *ADAPTER_FILES,
)
"""Every file of a checkpoint that is ever read."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class Parts:
    """What a world model is composed of.

    Attributes:
        tokenizer: pixels <-> tokens.
        transformer: over tokens.
        reward_head: None where the model predicts no rewards.
        extras: fields of the side file, see :data:`ivideogpt.zoo.side_file.KNOWN`.
        published: what the published files held.
        action_layers: of several action spaces, of which a world model uses one; the transformer then has none.
        adapter: that was merged into them, where they were loaded from one.
    """

    tokenizer: CompressiveTokenizer
    transformer: Transformer
    reward_head: RewardHead | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    published: Published = field(default_factory=Published)
    action_layers: ActionLayers | None = None
    adapter: Adapter | None = None

    @property
    def config(self) -> WorldModelConfig:
        head = self.reward_head
        return WorldModelConfig(self.tokenizer.config, self.transformer.config, head.config if head else None)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The torch dtype that a user means with ``dtype``, for example ``torch.bfloat16`` or ``"bfloat16"``."""
    if dtype is None:
        return None
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return found


@dataclass
class Description:
    """What a checkpoint's configurations and headers describe: modules without memory, on the meta device.

    Attributes:
        tokenizer: without weights, as the others.
        transformer: over tokens.
        reward_head: None where there is none.
        extras: fields of the side file.
        tokenizer_fields: ``tokenizer/config.json``.
        transformer_fields: ``transformer/config.json``.
        wrapped: whether the transformer's tensors have the names of a model with actions or rewards.
        action_dim: size of an action, None without actions.
    """

    tokenizer: CompressiveTokenizer
    transformer: Transformer
    reward_head: RewardHead | None
    extras: dict[str, Any]
    tokenizer_fields: dict[str, Any]
    transformer_fields: dict[str, Any]
    wrapped: bool
    action_dim: int | None


def describe(folder: Path, headers: dict[str, Header]) -> Description:
    """Compares the configurations in ``folder`` with the ``headers`` of the weight files; no weight is read.

    Args:
        folder: with the JSON files of a checkpoint.
        headers: of the two weight files by their names in the folder, where they need not lie yet.

    Raises:
        ValueError: if a configuration is not what it should be, or the headers do not hold what it describes.
    """
    extras = read_side_file(folder)
    fields = {name: read_json(folder / name) for name in (TOKENIZER_CONFIG, TRANSFORMER_CONFIG)}

    # configurations: from the files, and from the shapes of the layers that they do not mention
    weights = headers[TRANSFORMER_WEIGHTS]
    action_dim = _action_dim(weights)
    tokenizer_config = published.tokenizer_config(
        fields[TOKENIZER_CONFIG], folder / TOKENIZER_CONFIG, extras.get("tokenizer_attention_dropout", 0.1)
    )
    transformer_config = published.transformer_config(
        fields[TRANSFORMER_CONFIG], folder / TRANSFORMER_CONFIG, action_dim
    )
    head_config = None
    if any(name.startswith("reward_linear.") for name in weights.shapes):
        head_config = RewardHeadConfig(transformer_config.embed_dim, extras.get("reward_transform", "symlog"))
    try:
        config = WorldModelConfig(tokenizer_config, transformer_config, head_config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    check_extras(extras, folder / SIDE_FILE, action_dim)

    # modules without memory, compared with what the files hold before any is spent
    _check_counts(config, headers, folder)
    tokenizer, transformer, reward_head = build_on_meta(lambda: _build(config), folder)
    wrapped = any(name.startswith("llm.") for name in weights.shapes)
    for expected, config_name, weights_name in (
        (tokenizer.state_dict(), TOKENIZER_CONFIG, TOKENIZER_WEIGHTS),
        (_transformer_tensors(transformer, reward_head, wrapped), TRANSFORMER_CONFIG, TRANSFORMER_WEIGHTS),
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        check_header(headers[weights_name], shapes, folder / config_name)
    described = (tokenizer, transformer, reward_head, extras, fields[TOKENIZER_CONFIG], fields[TRANSFORMER_CONFIG])
    return Description(*described, wrapped, action_dim)


def load_parts(
    folder: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    context_length: int | None = None,
    action_dim: int | None = None,
    action_space: str | None = None,
) -> Parts:
    """Parts of the world model in ``folder``, in eval mode.

    Args:
        folder: in the published layout, see the top of this file; or an adapter.
        device: where the weights go, the CPU if None.
        dtype: what the weights are converted to; if None, float32, also where the file holds bfloat16.
        context_length: shortens the tokenizer's context.
        action_dim: size of the actions that will be given. If the checkpoint has no action layer or one of another
            size, the model gets a fresh one, which adds nothing until it is trained, and says so by an
            :class:`ivideogpt.zoo.changing.ActionLayerWarning`.
        action_space: of a model with several, the one whose action layer the transformer gets.

    Raises:
        ValueError: if the folder lacks a file, if a configuration or a tensor is not what it should be, or if an
            argument does not fit.
        OSError: if a file cannot be read.
    """
    folder = Path(folder)
    wanted_dtype, wanted_device = as_dtype(dtype), _usable_device(device)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    finish_interrupted_save(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        from ivideogpt.zoo.adapter import load_adapted

        if action_space is not None:
            raise ValueError(f"{folder} is an adapter, with one action space at most; leave out {action_space!r}")
        parts = load_adapted(folder, wanted_device, wanted_dtype, context_length)
        change_parts(parts, folder, action_dim=action_dim)
        return parts
    for name in (TOKENIZER_CONFIG, TRANSFORMER_CONFIG):
        _existing(folder / name, folder)
    headers = {name: read_header(folder / name) for name in (TOKENIZER_WEIGHTS, TRANSFORMER_WEIGHTS)}
    described = describe(folder, headers)
    tokenizer, transformer, reward_head = described.tokenizer, described.transformer, described.reward_head
    wrapped = described.wrapped
    weights = headers[TRANSFORMER_WEIGHTS]

    tokenizer.load_state_dict(read_tensors(headers[TOKENIZER_WEIGHTS], wanted_device, wanted_dtype), assign=True)
    tensors = read_tensors(weights, wanted_device, wanted_dtype)
    transformer.load_state_dict(
        {name: tensors[transformer_key(name, wrapped)] for name in transformer.state_dict()}, assign=True
    )
    if reward_head is not None:
        reward_head.load_state_dict({name: tensors[reward_key(name)] for name in reward_head.state_dict()}, assign=True)

    action_layers = None
    if (folder / ACTION_SPACES).is_file():
        action_layers = read_action_layers(folder / ACTION_SPACES, transformer.config.embed_dim, wanted_device)
    held = Published(
        tokenizer_fields=described.tokenizer_fields,
        transformer_fields=described.transformer_fields,
        generation_config=read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else None,
        tokenizer_dtypes=headers[TOKENIZER_WEIGHTS].dtypes,
        transformer_dtypes=weights.dtypes,
        recipe=(folder / RECIPE).read_text(encoding="utf-8") if (folder / RECIPE).is_file() else None,
    )
    parts = Parts(tokenizer, transformer, reward_head, described.extras, held, action_layers)
    change_parts(parts, folder, context_length, action_dim, action_space)
    for module in (parts.tokenizer, parts.transformer, reward_head, parts.action_layers):
        if module is not None:
            module.eval()
    return parts


def save_parts(folder: str | Path, parts: Parts, dtype: torch.dtype | str | None = None) -> Path:
    """Writes ``parts`` to ``folder`` in the published layout; a save that fails leaves what was there.

    Fields of the published files that this package does not use are written back as they were read, so a model that
    is loaded and saved has the same tensors and fields.

    Args:
        folder: made if it does not exist; files of other names in it stay.
        parts: the world model.
        dtype: what the weights are converted to; None keeps them (see :func:`write_tensors` for bfloat16 files).

    Returns:
        The folder.

    Raises:
        ValueError: if ``parts.extras`` hold an unknown field or a wrong value.
        OSError: if something cannot be written; the old files are then whole.
    """
    folder, wanted, old = Path(folder), as_dtype(dtype), parts.published
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot save to {folder}: it is a file; give a folder")
    config = parts.config
    side_text = side_file_text(_extras_to_write(parts))
    wrapped = config.action_dim is not None or parts.reward_head is not None
    transformer_tensors = _transformer_tensors(parts.transformer, parts.reward_head, wrapped)
    with replacing_files(folder) as staging:
        (staging / "tokenizer").mkdir()
        (staging / "transformer").mkdir()
        write_tensors(parts.tokenizer.state_dict(), staging / TOKENIZER_WEIGHTS, old.tokenizer_dtypes, wanted)
        dtypes = write_tensors(transformer_tensors, staging / TRANSFORMER_WEIGHTS, old.transformer_dtypes, wanted)
        fields = published.transformer_fields(config.transformer, old.transformer_fields)
        if set(dtypes.values()) != set(old.transformer_dtypes.values()):
            written = str(next(iter(dtypes.values()))).removeprefix("torch.")
            fields |= {name: written for name in ("torch_dtype", "dtype") if name in fields}
        _write_json(staging / TRANSFORMER_CONFIG, fields)
        _write_json(staging / TOKENIZER_CONFIG, published.tokenizer_fields(config.tokenizer, old.tokenizer_fields))
        if old.generation_config is not None:
            _write_json(staging / GENERATION_CONFIG, old.generation_config)
        if old.recipe is not None:
            (staging / RECIPE).write_text(old.recipe, encoding="utf-8")
        (staging / SIDE_FILE).write_text(side_text, encoding="utf-8")
        if parts.action_layers is not None:
            write_action_layers(parts.action_layers, staging / ACTION_SPACES)
    optional = ((GENERATION_CONFIG, old.generation_config), (RECIPE, old.recipe), (ACTION_SPACES, parts.action_layers))
    for name, content in optional:
        if content is None:
            (folder / name).unlink(missing_ok=True)  # of the model that was here before
    for name in ADAPTER_FILES:
        (folder / name).unlink(missing_ok=True)
    return folder


def _build(config: WorldModelConfig) -> tuple[CompressiveTokenizer, Transformer, RewardHead | None]:
    head = RewardHead(config.reward_head) if config.reward_head is not None else None
    return CompressiveTokenizer(config.tokenizer), Transformer(config.transformer), head


def _transformer_tensors(transformer: Transformer, reward_head: RewardHead | None, wrapped: bool) -> dict[str, Tensor]:
    """Tensors of ``transformer/model.safetensors`` by their names there."""
    tensors = {transformer_key(name, wrapped): tensor for name, tensor in transformer.state_dict().items()}
    if reward_head is not None:
        tensors |= {reward_key(name): tensor for name, tensor in reward_head.state_dict().items()}
    return tensors


def _existing(path: Path, folder: Path) -> Path:
    if not path.is_file():
        names = sorted(item.name for item in folder.iterdir())
        raise ValueError(
            f"{folder} is no world model: it has no {path.relative_to(folder)}; a world model's folder holds "
            f"{', '.join(FILES[:4])}, this one {', '.join(names[:8]) or 'nothing'}"
        )
    return path


def _action_dim(header: Header) -> int | None:
    """Size of an action, which only the shape of the action layer tells; None where there is none."""
    name = "action_linear.weight"
    if not any(key.startswith("action_linear.") for key in header.shapes):
        return None
    shape = header.shapes.get(name)
    if shape is None or len(shape) != 2 or 0 in shape:
        raise ValueError(f"{header.path}: {name} must have the shape (embed_dim, action_dim), got {shape or 'none'}")
    return shape[1]


def _check_counts(config: WorldModelConfig, headers: dict[str, Header], folder: Path) -> None:
    """Refuses a configuration of more layers than its file has tensors, whose modules would take for ever to build."""
    for name, weights_name, layers in (
        (TRANSFORMER_CONFIG, TRANSFORMER_WEIGHTS, config.transformer.num_layers),
        (TOKENIZER_CONFIG, TOKENIZER_WEIGHTS, config.tokenizer.layers_per_block),
    ):
        count = len(headers[weights_name].shapes)
        if layers > count:
            raise ValueError(f"{folder / name} asks for {layers} layers, {folder / weights_name} has {count} tensors")


def _extras_to_write(parts: Parts) -> dict[str, Any]:
    extras, config = dict(parts.extras), parts.config
    if config.reward_head is not None:
        extras["reward_transform"] = config.reward_head.transform
    dropout = config.tokenizer.attention_dropout
    if dropout != 0.1 or "tokenizer_attention_dropout" in extras:
        extras["tokenizer_attention_dropout"] = dropout
    check_extras(extras, "extras", config.action_dim)
    return extras


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _usable_device(device: torch.device | str | None) -> torch.device:
    try:
        usable = torch.device(device or "cpu")
        torch.empty(0, device=usable)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return usable
