"""LoRA adapters on disk: a small folder that changes a base model, which it names.

adapter_config.json  adapter_model.safetensors    peft's layout, which peft loads into transformers' LlamaForCausalLM
adapter_layers.safetensors                        the action layer and the reward head, whole, where there are any
ivideogpt.json                                    `adapter_base`: the base and its hash; all else of a side file
[recipe.yaml]                                     the resolved recipe that trained it

Adapters are fetched from strangers: their configuration may ask for nothing but plain LoRA of bounded size, and their
tensors are compared with the base before they are read. peft is not needed to load one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivideogpt.config import RewardHeadConfig
from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.transformer import Transformer
from ivideogpt.zoo import checkpoint
from ivideogpt.zoo.checkpoint import ADAPTER_CONFIG, ADAPTER_LAYERS, ADAPTER_WEIGHTS, FILES, RECIPE
from ivideogpt.zoo.fingerprint import base_hash
from ivideogpt.zoo.folder import replacing_files
from ivideogpt.zoo.published import read_json, reward_key, transformer_key
from ivideogpt.zoo.side_file import SIDE_FILE, check_extras, read_side_file, side_file_text
from ivideogpt.zoo.tensors import Header, build_on_meta, check_header, read_header, read_tensors, write_tensors

if TYPE_CHECKING:
    from ivideogpt.zoo.checkpoint import Parts

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of a block that an adapter may change."""
LARGEST_RANK = 1024
_LARGEST_ALPHA = 1_000_000
_LARGEST_JSON = 2**20  # bytes; peft's files have about a thousand
_PREFIX = "base_model.model."  # of peft's model around LlamaForCausalLM
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others change the weights of the base as well
}
_USED = ("r", "lora_alpha", "target_modules")
_CARRIED = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "task_type"),
)
"""Fields that change nothing of what a trained adapter computes; `megatron_core` and `qalora_group_size` are never
empty, and without effect as long as `megatron_config` and `use_qalora` are."""


@dataclass
class Adapter:
    """What an adapter's folder holds.

    Attributes:
        config: object of ``adapter_config.json``.
        matrices: A and B by the transformer's names, such as ``layers.0.self_attn.q_proj.lora_A.weight``.
        layers: tensors of the action layer and the reward head, by their names in a published transformer file.
        extras: fields of the side file, ``adapter_base`` among them.
        recipe: text of ``recipe.yaml``.
    """

    config: dict[str, Any]
    matrices: dict[str, Tensor]
    layers: dict[str, Tensor]
    extras: dict[str, Any]
    recipe: str | None = None

    @property
    def base(self) -> dict[str, Any]:
        """Its base: ``model`` and ``revision``, or ``folder``; ``sha256``; ``context_length`` where it is shorter."""
        found: dict[str, Any] = self.extras["adapter_base"]
        return found


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter, and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def save_adapter(folder: str | Path, adapter: Adapter) -> Path:
    """Writes ``adapter`` to ``folder``; a save that fails leaves what was there.

    Raises:
        ValueError: if its configuration or its extras hold what would not be read again.
        OSError: if something cannot be written; the old files are then whole.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot save to {folder}: it is a file; give a folder")
    config = adapter.config | {"base_model_name_or_path": adapter.base.get("model")}
    check_config(config, ADAPTER_CONFIG)
    side_text = side_file_text(adapter.extras)
    with replacing_files(folder) as staging:
        (staging / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {_stored_name(name): tensor for name, tensor in adapter.matrices.items()}
        write_tensors(tensors, staging / ADAPTER_WEIGHTS, {}, None)
        if adapter.layers:
            write_tensors(adapter.layers, staging / ADAPTER_LAYERS, {}, None)
        if adapter.recipe is not None:
            (staging / RECIPE).write_text(adapter.recipe, encoding="utf-8")
        (staging / SIDE_FILE).write_text(side_text, encoding="utf-8")
        written = {path.name for path in staging.iterdir()}
    for name in FILES:
        if name not in written:
            (folder / name).unlink(missing_ok=True)  # of the model that was here before
    return folder


def load_adapted(folder: Path, device: torch.device, dtype: torch.dtype | None, context_length: int | None) -> Parts:
    """Parts of the base with the adapter in ``folder`` merged into plain layers, in eval mode.

    Args:
        folder: of the adapter; the base is looked for where it says.
        device: where the weights go.
        dtype: what the weights are converted to when they are merged; float32 if None.
        context_length: shortens the tokenizer's context.

    Raises:
        ValueError: if a file is not what it should be, if there is no such base, or if it is another one.
        OSError: if a file cannot be read.
    """
    extras = read_side_file(folder)
    if "adapter_base" not in extras:
        raise ValueError(f"{folder / SIDE_FILE} does not name the base model of the adapter beside it (adapter_base)")
    config = read_config(folder / ADAPTER_CONFIG)
    header = read_header(folder / ADAPTER_WEIGHTS)
    layers = read_header(folder / ADAPTER_LAYERS) if (folder / ADAPTER_LAYERS).is_file() else None
    adapter = Adapter(config, {}, {}, extras, _text(folder / RECIPE))

    base = adapter.base

    def fits(transformer: Transformer) -> None:
        check_header(header, _expected(transformer, config), folder / ADAPTER_CONFIG)

    base_folder = find_base(folder, base, fits)
    narrow = dtype in (torch.bfloat16, torch.float16)  # the sum is rounded once, not each of its terms
    parts = checkpoint.load_parts(base_folder, device, None if narrow else dtype)
    transformer = parts.transformer
    fits(transformer)
    action_dim = transformer.config.action_dim
    if layers is not None:
        expected = _expected_layers(layers, transformer.config.embed_dim)
        check_header(layers, expected, folder / ADAPTER_CONFIG)
        action_dim = expected["action_linear.weight"][1] if "action_linear.weight" in expected else action_dim
    check_extras(extras, folder / SIDE_FILE, action_dim)
    found = base_hash(parts.tokenizer, transformer)
    if found != base["sha256"]:
        raise ValueError(
            f"{folder} is an adapter for another base: it was trained on weights with the hash {base['sha256'][:12]}, "
            f"those of {base_folder} have {found[:12]}; give the base that it was trained on"
        )

    matrices = read_tensors(header, device, None)
    adapter.matrices = {name.removeprefix(f"{_PREFIX}model."): tensor for name, tensor in matrices.items()}
    adapter.layers = read_tensors(layers, device, None) if layers is not None else {}
    weights = merged_weights(transformer.state_dict(), adapter.matrices, scale_of(config))
    transformer.load_state_dict(weights, strict=False, assign=True)
    parts.reward_head = _put_layers(transformer, adapter)
    if context_length is None:
        context_length = base.get("context_length")
    if context_length is not None and context_length != parts.tokenizer.config.context_length:
        parts.tokenizer.set_context_length(context_length)
    for module in (parts.tokenizer, transformer, parts.reward_head):
        if module is not None:
            module.to(dtype=dtype or torch.float32).eval()
    parts.extras = {name: value for name, value in extras.items() if name != "adapter_base"}
    parts.published = replace(parts.published, recipe=adapter.recipe)
    parts.action_layers, parts.adapter = None, adapter  # several layers of the base were not trained with the rest
    return parts


def save_for_hub(folder: str | Path, parts: Parts) -> Path:
    """Writes what is published of ``parts``: the adapter alone where they were loaded from one, else the whole model.

    Raises:
        ValueError: if the adapter's base is a folder of this machine.
    """
    if parts.adapter is None:
        return checkpoint.save_parts(folder, parts)
    check_reachable(parts.adapter.base)
    extras = {**parts.extras, "adapter_base": parts.adapter.base}
    return save_adapter(folder, replace(parts.adapter, extras=extras, recipe=parts.published.recipe))


def check_reachable(base: dict[str, Any] | None) -> None:
    """Refuses a base that others cannot have.

    Raises:
        ValueError: if there is none, or saying what to publish instead.
    """
    if base is None:
        raise ValueError(f"the {SIDE_FILE} of the adapter does not name its base (adapter_base)")
    if "folder" in base:
        raise ValueError(
            f"the adapter's base is a folder, {base['folder']!r}, which only the machine that trained it has: publish "
            "the merged model (`ivideogpt merge ADAPTER --out FOLDER`), or train on a base that is on the Hub"
        )


def find_base(folder: Path, base: dict[str, Any], fits: Callable[[Transformer], None] | None = None) -> Path:
    """Folder of the base that the adapter in ``folder`` names; fetched where needed, if its transformer ``fits``.

    Raises:
        ValueError: if it is not there, or an adapter itself.
    """
    from ivideogpt.zoo.hub import resolve

    if "folder" in base:
        found = (folder / base["folder"]).resolve()
        if not found.is_dir():
            raise ValueError(
                f"{folder} is an adapter of the model in {found}, and there is no such folder; put it there"
            )
    else:
        found = Path(resolve(base["model"], base.get("revision"), fits))
    if is_adapter(found):
        raise ValueError(
            f"{found} is an adapter, and so cannot be the base of another one; merge it first: "
            "`ivideogpt merge ADAPTER --out FOLDER`"
        )
    return found


def scale_of(config: dict[str, Any]) -> float:
    """What B A is multiplied with."""
    return float(config["lora_alpha"]) / int(config["r"])


@torch.no_grad()
def merged_weights(weights: dict[str, Tensor], matrices: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """New tensors W + scale * B A for those ``weights`` that have ``matrices``; computed in float32 at least."""
    found = {}
    for name, a in matrices.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        weight, b = weights[f"{layer}.weight"], matrices[f"{layer}.lora_B.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        added = scale * (b.to(wide) @ a.to(wide))
        found[f"{layer}.weight"] = (weight.to(wide) + added.to(weight.device)).to(weight.dtype)
    return found


def check_config(fields: dict[str, Any], where: object) -> None:
    """Refuses everything but plain LoRA of bounded size.

    Raises:
        ValueError: naming the field.
    """
    for name, allowed in _FIXED.items():
        value = fields.get(name, allowed[0])
        if not any(value is item or (isinstance(item, str) and value == item) for item in allowed):
            raise ValueError(f"{where}: {name} {value!r} is not supported; it must be one of {list(allowed)}")
    rank, alpha, targets = (fields.get(name) for name in _USED)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= LARGEST_RANK:
        raise ValueError(f"{where}: r must be a number in 1..{LARGEST_RANK}, got {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not -_LARGEST_ALPHA <= alpha <= _LARGEST_ALPHA:
        raise ValueError(f"{where}: lora_alpha must be a number up to {_LARGEST_ALPHA:,}, got {alpha!r}")
    if not isinstance(targets, list) or not targets or not all(name in TARGETS for name in targets):
        raise ValueError(f"{where}: target_modules must be a list of some of {', '.join(TARGETS)}, got {targets!r}")
    for name, value in fields.items():
        if name not in (*_FIXED, *_USED, *_CARRIED) and value not in (None, False, {}, []):
            raise ValueError(f"{where}: {name} {value!r} is not supported; this package reads plain LoRA only")


def read_config(path: Path) -> dict[str, Any]:
    """Object of the ``adapter_config.json`` at ``path``.

    Raises:
        ValueError: if it is no JSON object, or asks for anything but plain LoRA of bounded size.
    """
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, which no such file needs (at most {_LARGEST_JSON:,})"
        )
    fields = read_json(path)
    check_config(fields, path)
    return fields


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _stored_name(name: str) -> str:
    return _PREFIX + transformer_key(name, wrapped=False)


def _expected(transformer: Transformer, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that ``config`` describes, by their names in the file."""
    rank: int = config["r"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in config["target_modules"]:
            shapes[_stored_name(f"{name}.lora_A.weight")] = (rank, layer.in_features)
            shapes[_stored_name(f"{name}.lora_B.weight")] = (layer.out_features, rank)
    return shapes


def _expected_layers(header: Header, embed_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the layers in the file of ``header``; the size of an action is what it says."""
    shapes: dict[str, tuple[int, ...]] = {}
    if any(name.startswith("action_linear.") for name in header.shapes):
        shape = header.shapes.get("action_linear.weight", ())
        shapes["action_linear.weight"] = (embed_dim, shape[1] if len(shape) == 2 and shape[1] else 1)
        shapes["action_linear.bias"] = (embed_dim,)
    if any(name.startswith("reward_linear.") for name in header.shapes):
        shapes |= {"reward_linear.weight": (1, embed_dim), "reward_linear.bias": (1,)}
    return shapes


def _put_layers(transformer: Transformer, adapter: Adapter) -> RewardHead | None:
    """Gives ``transformer`` the adapter's action layer; the adapter's reward head, None where it has none."""
    layers, embed_dim = adapter.layers, transformer.config.embed_dim
    if "action_linear.weight" in layers:
        action_dim = layers["action_linear.weight"].shape[1]
        transformer.config = replace(transformer.config, action_dim=action_dim)
        action_linear = build_on_meta(lambda: nn.Linear(action_dim, embed_dim), ADAPTER_LAYERS)
        names = ("weight", "bias")
        action_linear.load_state_dict({name: layers[f"action_linear.{name}"] for name in names}, assign=True)
        transformer.action_linear = action_linear
    if "reward_linear.weight" not in layers:
        return None  # that of the base reads hidden states which have changed
    config = RewardHeadConfig(embed_dim, adapter.extras.get("reward_transform", "symlog"))
    head = build_on_meta(lambda: RewardHead(config), ADAPTER_LAYERS)
    head.load_state_dict({name: layers[reward_key(name)] for name in head.state_dict()}, assign=True)
    return head
