"""Tests of LoRA adapters on disk: small, loaded with their base, refused where anything is not what it should be."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ivideogpt import cli
from ivideogpt.config import WorldModelConfig
from ivideogpt.recipes.adapters import base_reference, make_adapter
from ivideogpt.training import TransformerModule
from ivideogpt.training.lora import LoRA
from ivideogpt.world_model import WorldModel
from ivideogpt.zoo.adapter import save_adapter, save_for_hub
from ivideogpt.zoo.changing import ActionLayerWarning
from ivideogpt.zoo.checkpoint import load_parts

INSIDE_PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
CONFIG, WEIGHTS, LAYERS = "adapter_config.json", "adapter_model.safetensors", "adapter_layers.safetensors"


class Adapted:
    """An adapter on disk, with what its module computed when it was saved."""

    def __init__(self, base: WorldModel, folder: Path, lora: LoRA, **extras: Any) -> None:
        self.base, self.folder = folder / "base", folder / "adapter"
        if not self.base.exists():
            base.save_pretrained(self.base)
        parts = load_parts(self.base, action_dim=base.config.action_dim)
        torch.manual_seed(1)
        self.module = TransformerModule(parts.transformer, parts.tokenizer, parts.reward_head, lora=lora).eval()
        for name, parameter in self.module.named_parameters():
            if ".lora_B." in name or name.startswith(("transformer.action_linear", "reward_head")):
                nn.init.normal_(parameter, std=0.1)
        length = parts.tokenizer.config.context_length
        reference = base_reference({"from": "base"}, {"base": self.base}, self.folder, "here", length)
        save_adapter(self.folder, make_adapter(self.module, {**extras, "adapter_base": reference}, "stages: {}\n"))

    def logits(self, tokens: Tensor, slot_actions: Tensor | None, positions: Tensor) -> Tensor:
        with torch.no_grad():
            return self.module.transformer(tokens, slot_actions, positions).logits

    def edit_config(self, **changes: Any) -> None:
        self._edit(self.folder / CONFIG, changes)

    def edit_side_file(self, **changes: Any) -> None:
        self._edit(self.folder / "ivideogpt.json", changes)

    @staticmethod
    def _edit(path: Path, changes: dict[str, Any]) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def edit_tensors(self, file: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = load_file(self.folder / file)
        edit(tensors)
        save_file(tensors, self.folder / file)


@pytest.fixture
def adapted(tiny_world_model: Callable[..., WorldModel], tmp_path: Path) -> Callable[..., Adapted]:
    """``adapted(action_dim=3, reward=True, ...)`` saves a tiny base and an adapter of it."""

    def make(action_dim: int | None = 3, reward: bool = True, lora: LoRA | None = None, **extras: Any) -> Adapted:
        return Adapted(tiny_world_model(action_dim, reward), tmp_path, lora or LoRA(rank=2, alpha=6), **extras)

    return make


def sequence(model: WorldModel, frames: int = 4) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens, actions of the slots, and where these are."""
    torch.manual_seed(2)
    layout, action_dim = model.layout, model.config.action_dim
    future = frames - model.config.context_length
    tokens = torch.randint(0, layout.vocab_size, (2, layout.sequence_length(frames)))
    actions = None if action_dim is None else torch.randn(2, future, action_dim)
    return tokens, actions, layout.slot_positions(future, tokens.device)


def assert_same(model: WorldModel, adapted: Adapted) -> None:
    """The loaded model computes what the trained module did."""
    given = sequence(model)
    with torch.no_grad():
        found = model.transformer(*given).logits
    torch.testing.assert_close(found, adapted.logits(*given), atol=1e-5, rtol=0)
    head = adapted.module.reward_head
    assert (model.reward_head is None) == (head is None)
    if head is not None and model.reward_head is not None:
        assert all(
            torch.equal(value, model.reward_head.state_dict()[name]) for name, value in head.state_dict().items()
        )


# loading


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("action_dim", [None, 3])
def test_a_loaded_adapter_is_a_plain_model_that_computes_the_same(
    adapted: Callable[..., Adapted], action_dim: int | None, reward: bool
) -> None:
    saved = adapted(action_dim, reward, recipe="mine")
    assert (saved.folder / LAYERS).is_file() == (action_dim is not None or reward)
    model = WorldModel.from_pretrained(saved.folder)
    assert not model.training
    assert all(type(layer) is nn.Linear for name, layer in model.named_modules() if name.endswith("_proj"))
    assert model.extras.keys() <= {"recipe", "reward_transform"}
    assert model.extras["recipe"] == "mine"
    assert model.published.recipe == "stages: {}\n"
    assert_same(model, saved)
    base = WorldModel.from_pretrained(saved.base)
    given = sequence(base)
    with torch.no_grad():
        assert (base.transformer(*given).logits - saved.logits(*given)).abs().max() > 1e-2
        actions = None if action_dim is None else torch.zeros(1, 4, action_dim)
        video = model.rollout(torch.rand(1, 2, 3, 32, 32), actions, horizon=2).video
    assert video.shape == (1, 4, 3, 32, 32)


def test_a_new_action_space_goes_with_the_adapter(tiny_world_model: Callable[..., WorldModel], tmp_path: Path) -> None:
    tiny_world_model(action_dim=None, reward=False).save_pretrained(tmp_path / "base")
    statistics = {"action_mean": [0.0] * 5, "action_std": [2.0] * 5}
    with pytest.warns(ActionLayerWarning):
        saved = Adapted(tiny_world_model(action_dim=5, reward=False), tmp_path, LoRA(rank=2, alpha=6), **statistics)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = WorldModel.from_pretrained(saved.folder)
    assert model.config.action_dim == 5
    assert model.extras == statistics
    assert_same(model, saved)
    with pytest.warns(ActionLayerWarning, match="an action layer for actions of size 5"):
        other = WorldModel.from_pretrained(saved.folder, action_dim=2)
    assert (other.config.action_dim, other.extras) == (2, {})


def test_an_adapter_of_a_model_of_several_embodiments_has_one_action_space(adapted: Callable[..., Adapted]) -> None:
    from ivideogpt.models.action_layers import ActionLayers
    from ivideogpt.zoo.checkpoint import save_parts

    saved = adapted(None, True)
    base = load_parts(saved.base)
    base.action_layers = ActionLayers({"one": 2, "other": 3}, base.transformer.config.embed_dim)
    save_parts(saved.base, base)
    assert load_parts(saved.base).action_layers is not None
    assert load_parts(saved.folder).action_layers is None
    assert_same(WorldModel.from_pretrained(saved.folder), saved)
    with pytest.raises(ValueError, match=r"is an adapter, with one action space at most; leave out 'one'"):
        load_parts(saved.folder, action_space="one")


def test_context_length_and_dtype(adapted: Callable[..., Adapted]) -> None:
    saved = adapted()
    assert WorldModel.from_pretrained(saved.folder, context_length=1).config.context_length == 1
    full, half = (WorldModel.from_pretrained(saved.folder, dtype=dtype) for dtype in (None, "bfloat16"))
    assert all(torch.equal(value.bfloat16(), half.state_dict()[name]) for name, value in full.state_dict().items())
    assert WorldModel.from_pretrained(saved.folder, dtype="float64").transformer.norm.weight.dtype == torch.float64
    base = json.loads((saved.folder / "ivideogpt.json").read_text())["adapter_base"]
    saved.edit_side_file(adapter_base={**base, "context_length": 1})
    assert WorldModel.from_pretrained(saved.folder).config.context_length == 1


def test_an_adapter_is_small_and_moves_with_its_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = WorldModel(WorldModelConfig.preset("nano", action_dim=4, reward=True))
    saved = Adapted(base, tmp_path, LoRA(rank=8))
    files = {path.name for path in saved.folder.iterdir()}
    assert files == {CONFIG, WEIGHTS, LAYERS, "ivideogpt.json", "recipe.yaml"}
    sizes = [sum(path.stat().st_size for path in of.rglob("*") if path.is_file()) for of in (saved.folder, saved.base)]
    assert sizes[0] < 0.05 * sizes[1]
    assert str(tmp_path) not in "".join(path.read_text() for path in saved.folder.glob("*.[jy]*"))
    shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    shutil.rmtree(saved.base)
    assert_same(WorldModel.from_pretrained(tmp_path.with_name("elsewhere") / "adapter"), saved)
    with pytest.raises(ValueError, match=r"is an adapter of the model in .*base, and there is no such folder"):
        WorldModel.from_pretrained(saved.folder)


@INSIDE_PEFT
def test_peft_loads_it_into_the_llama_of_transformers(adapted: Callable[..., Adapted]) -> None:
    import peft
    import transformers

    saved = adapted(None, False)
    llama = transformers.LlamaForCausalLM.from_pretrained(saved.base / "transformer", attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(llama, str(saved.folder)).eval()
    tokens, _, positions = sequence(WorldModel.from_pretrained(saved.base))
    with torch.no_grad():
        found = model(input_ids=tokens).logits
    torch.testing.assert_close(found, saved.logits(tokens, None, positions), atol=1e-4, rtol=0)


@INSIDE_PEFT
def test_one_that_peft_saved_is_loaded(adapted: Callable[..., Adapted], tmp_path: Path) -> None:
    import peft
    import transformers

    saved = adapted(None, False)
    llama = transformers.LlamaForCausalLM.from_pretrained(saved.base / "transformer", attn_implementation="eager")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama, config).eval()
    model.save_pretrained(str(tmp_path / "by_peft"))
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(tmp_path / "by_peft" / name, saved.folder / name)
    loaded = WorldModel.from_pretrained(saved.folder)
    tokens, _, _ = sequence(loaded)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        torch.testing.assert_close(loaded.transformer(tokens).logits, expected, atol=1e-4, rtol=0)


# merging and saving


def test_merge_writes_a_whole_model(
    adapted: Callable[..., Adapted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = adapted()
    out = tmp_path / "whole"
    assert cli.main(["merge", str(saved.folder), "--out", str(out)]) == 0
    assert f"{out}: the adapter {saved.folder}, merged into ../base" in capsys.readouterr().out
    assert not (out / CONFIG).exists()
    shutil.rmtree(saved.base)
    assert_same(WorldModel.from_pretrained(out), saved)
    assert "adapter_base" not in (out / "ivideogpt.json").read_text()
    assert cli.main(["merge", str(saved.folder), "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert cli.main(["merge", str(out), "--out", str(tmp_path / "more")]) == 2
    assert "is no adapter" in capsys.readouterr().err


def test_a_folder_holds_an_adapter_or_a_whole_model(adapted: Callable[..., Adapted]) -> None:
    saved = adapted()
    adapter = load_parts(saved.folder).adapter
    assert adapter is not None
    model = WorldModel.from_pretrained(saved.folder)
    model.save_pretrained(saved.folder)
    assert not (saved.folder / CONFIG).exists()
    assert_same(WorldModel.from_pretrained(saved.folder), saved)
    save_adapter(saved.folder, adapter)
    assert not (saved.folder / "transformer" / "model.safetensors").exists()
    assert_same(WorldModel.from_pretrained(saved.folder), saved)
    with pytest.raises(ValueError, match="it is a file"):
        save_adapter(saved.folder / CONFIG, adapter)


def test_what_is_published_needs_a_base_that_others_have(adapted: Callable[..., Adapted], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base is a folder, '../base'.* publish the merged model"):
        save_for_hub(tmp_path / "public", load_parts(adapted().folder))
    assert not (tmp_path / "public").exists()


# faults


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_parts(folder)


def test_another_base_is_refused(adapted: Callable[..., Adapted]) -> None:
    saved = adapted()
    path = saved.base / "transformer" / "model.safetensors"
    tensors = load_file(path)
    tensors["action_linear.weight"] += 1  # the adapter brings its own
    save_file(tensors, path)
    assert_same(WorldModel.from_pretrained(saved.folder), saved)
    tensors["llm.model.norm.weight"][0] += 1e-6
    save_file(tensors, path)
    refused(saved.folder, r"is an adapter for another base: .* the hash .*those of .*base have")


def test_an_adapter_is_no_base(adapted: Callable[..., Adapted]) -> None:
    saved = adapted()
    base = json.loads((saved.folder / "ivideogpt.json").read_text())["adapter_base"]
    saved.edit_side_file(adapter_base={**base, "folder": "."})
    refused(saved.folder, "is an adapter, and so cannot be the base of another one; merge it first")
    with pytest.raises(ValueError, match=r"here.from: 'one' .* is an adapter, and so cannot be the base"):
        base_reference({"from": "one"}, {"one": saved.folder}, saved.folder, "here", 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type 'IA3' is not supported; it must be one of \['LORA'\]"),
        ({"r": 0}, r"r must be a number in 1..1024, got 0"),
        ({"r": 10**9}, r"r must be a number in 1..1024"),
        ({"r": True}, r"r must be a number"),
        ({"r": 3}, r"lora_A.weight is \(2, 32\) and should be \(3, 32\)"),
        ({"lora_alpha": "8"}, r"lora_alpha must be a number up to 1,000,000, got '8'"),
        ({"lora_alpha": 10**400}, r"lora_alpha must be a number up to"),
        ({"target_modules": "all-linear"}, r"target_modules must be a list of some of q_proj.*got 'all-linear'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"target_modules must be a list of some"),
        ({"target_modules": [["q_proj"]]}, r"target_modules must be a list of some"),
        ({"target_modules": ["q_proj"]}, r"24 not expected: base_model.model.model.layers.0"),
        ({"bias": "all"}, r"bias 'all' is not supported"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights 'pissa' is not supported"),
        ({"init_lora_weights": 1}, r"init_lora_weights 1 is not supported"),
        ({"use_dora": True}, r"use_dora True is not supported; this package reads plain LoRA only"),
        ({"use_rslora": 1}, r"use_rslora 1 is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern \{'q_proj': 4\} is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"layers_to_transform": [0]}, r"layers_to_transform \[0\] is not supported"),
        ({"something_new": "yes"}, r"something_new 'yes' is not supported"),
    ],
)
def test_hostile_configurations(adapted: Callable[..., Adapted], fields: dict[str, Any], message: str) -> None:
    saved = adapted()
    saved.edit_config(**fields)
    refused(saved.folder, message)


def test_hostile_tensors(adapted: Callable[..., Adapted]) -> None:
    saved = adapted()
    good = load_file(saved.folder / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def check(edit: Callable[[dict[str, Tensor]], object], message: str, file: str = WEIGHTS) -> None:
        before = (saved.folder / file).read_bytes()
        saved.edit_tensors(file, edit)
        refused(saved.folder, message)
        (saved.folder / file).write_bytes(before)

    assert name in good
    check(lambda t: t.pop(name), r"1 missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    check(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "1 not expected: base_model.model.lm")
    check(lambda t: t.update({name: torch.ones(2, 33)}), r"is \(2, 33\) and should be \(2, 32\)")
    check(lambda t: t.update({name: torch.ones(2, 32, dtype=torch.int8)}), "only F64, F32, BF16, F16 are read")
    check(lambda t: t.update({"action_linear.weight": torch.ones(31, 3)}), r"should be \(32, 3\)", LAYERS)
    check(lambda t: t.update({"action_linear.weight": torch.ones(32)}), r"should be \(32, 1\)", LAYERS)
    check(lambda t: t.pop("action_linear.weight"), r"1 missing: action_linear.weight", LAYERS)
    check(lambda t: t.pop("reward_linear.bias"), r"1 missing: reward_linear.bias \(1,\)", LAYERS)
    check(lambda t: t.update({"llm.lm_head.weight": torch.ones(2)}), "1 not expected: llm.lm_head.weight", LAYERS)
    assert_same(WorldModel.from_pretrained(saved.folder), saved)
    whole = (saved.folder / WEIGHTS).read_bytes()
    (saved.folder / WEIGHTS).write_bytes(whole[:-100])
    refused(saved.folder, "no intact safetensors file")
    (saved.folder / WEIGHTS).unlink()
    (saved.folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(saved.folder, r"holds only adapter_model.bin, which are pickle files. Loading a pickle can run any code")


def test_a_huge_configuration_is_not_read(adapted: Callable[..., Adapted]) -> None:
    saved = adapted()
    saved.edit_config(something=" " * 2**21)
    refused(saved.folder, r"adapter_config.json has 2,\d+,\d+ bytes, which no such file needs")


HASH = "0" * 64


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "adapter_base must be an object, got None"),
        ({"sha256": HASH}, r"adapter_base must have a model, .* or a folder, got \['sha256'\]"),
        ({"model": "a", "folder": "b", "sha256": HASH}, "adapter_base must have a model"),
        ({"model": "../a", "sha256": HASH}, r"model '../a' cannot be one"),
        ({"model": "/a", "sha256": HASH}, r"model '/a' cannot be one"),
        ({"model": "a/b/c", "sha256": HASH}, r"model 'a/b/c' cannot be one"),
        ({"model": ["a"], "sha256": HASH}, r"model \['a'\] cannot be one"),
        ({"model": "a", "revision": "../main", "sha256": HASH}, r"revision '../main' cannot be one"),
        ({"folder": 3, "sha256": HASH}, "folder must be a path, got 3"),
        ({"folder": "../base"}, "sha256 None cannot be one"),
        ({"folder": "../base", "sha256": "x"}, "sha256 'x' cannot be one"),
        ({"folder": "../base", "sha256": HASH, "code": "x"}, "unknown field 'code'"),
        ({"folder": "../base", "sha256": HASH, "context_length": 0}, "context_length must be 1 or more, got 0"),
        ({"folder": "../base", "sha256": HASH}, "is an adapter for another base: .*000000000000"),
    ],
)
def test_hostile_side_files(adapted: Callable[..., Adapted], base: Any, message: str) -> None:
    saved = adapted()
    saved.edit_side_file(adapter_base=base)
    refused(saved.folder, message)


def test_side_files_without_a_base_or_with_statistics_of_another_size(adapted: Callable[..., Adapted]) -> None:
    saved = adapted()
    saved.edit_side_file(action_mean=[0.0], action_std=[1.0])
    refused(saved.folder, "action_mean has 1 values for actions of size 3")
    (saved.folder / "ivideogpt.json").write_text('{"format": 1}')
    refused(saved.folder, r"does not name the base model of the adapter beside it \(adapter_base\)")
