"""Loading and saving checkpoints in the published layout: round trips, other sizes, and everything that is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ivideogpt.config import RewardHeadConfig, TokenizerConfig, TransformerConfig, WorldModelConfig
from ivideogpt.world_model import WorldModel
from ivideogpt.zoo.changing import ActionLayerWarning
from ivideogpt.zoo.checkpoint import load_parts, save_parts

TOKENIZER = Path("tokenizer/diffusion_pytorch_model.safetensors")
TRANSFORMER = Path("transformer/model.safetensors")


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def published_files(folder: Path) -> dict[str, Any]:
    """Content of every file of the published layout below ``folder``."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*/*")):
        name = path.relative_to(folder).as_posix()
        files[name] = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    return files


# round trips


@pytest.mark.parametrize("name", ["oxe-64-act-free", "bair-64-act-cond"])
def test_golden_checkpoints_come_back_as_they_were(golden: Callable[[str], Any], name: str, tmp_path: Path) -> None:
    source = golden(name).folder
    save_parts(tmp_path / "copy", load_parts(source))
    before, after = published_files(source), published_files(tmp_path / "copy")
    assert before.keys() == after.keys()
    for file, content in before.items():
        assert same_tensors(content, after[file]) if file.endswith(".safetensors") else content == after[file], file
    assert set(json.loads((tmp_path / "copy" / "ivideogpt.json").read_text())) == {"format", "package_version"}


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "256 px, five levels": (
        {"resolution": 256, "block_channels": (8, 8, 32, 32, 32), "max_attention_resolution": 32, "patch_size": 4},
        {"max_positions": 1024},
        False,
    ),
    "other codebooks": ({"codebook_size": 17, "dynamics_codebook_size": 5, "codebook_dim": 3}, {}, False),
    "two resnets, attention in the middle": ({"layers_per_block": 2, "mid_block_attention": True}, {}, False),
    "grouped-query attention, reward head": ({}, {"num_heads": 4, "num_kv_heads": 2, "action_dim": 7}, True),
    "rope base": ({"context_length": 3}, {"rope_base": 123.0, "head_dim": 6, "max_positions": 300}, False),
    "reward head without actions": ({"context_length": 1, "patch_size": 8}, {}, True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_load_and_come_back(name: str, tmp_path: Path) -> None:
    tokenizer, transformer, reward = OTHERS[name]
    tokens = TokenizerConfig(
        **{
            "resolution": 32, "block_channels": (8, 32, 32), "layers_per_block": 1, "latent_channels": 4,
            "norm_num_groups": 4, "codebook_size": 32, "dynamics_codebook_size": 48, "context_length": 2,
            "max_attention_resolution": 8, **tokenizer,
        }
    )  # fmt: skip
    defaults = {"num_layers": 2, "num_heads": 2, "embed_dim": 32, "mlp_dim": 48, "max_positions": 256}
    config = WorldModelConfig(
        tokens,
        TransformerConfig(vocab_size=tokens.vocab_size, **{**defaults, **transformer}),
        RewardHeadConfig(32, "identity") if reward else None,
    )
    model = WorldModel(config).eval()
    folder = model.save_pretrained(tmp_path / "first")
    loaded = WorldModel.from_pretrained(folder)
    assert loaded.config == config
    assert same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "second")
    first, second = published_files(folder), published_files(tmp_path / "second")
    for file, content in first.items():
        assert same_tensors(content, second[file]) if file.endswith(".safetensors") else content == second[file]

    names = set(first["transformer/model.safetensors"])
    assert all(key.startswith(("llm.", "action_linear.", "reward_linear.")) for key in names) == (
        reward or "action_dim" in transformer
    )
    assert ("reward_linear.weight" in names) == reward
    clip = torch.rand(1, tokens.context_length + 1, 3, tokens.resolution, tokens.resolution)
    action_dim = config.action_dim
    actions = torch.rand(1, clip.shape[1], action_dim) if action_dim else None
    with torch.no_grad():
        ids, labels = loaded.tokenizer.tokenize(clip)
        out = loaded(ids, actions, labels)
    assert out.loss is not None
    assert torch.isfinite(out.loss)
    assert (out.rewards is not None) == reward


def test_fields_that_are_not_used_are_carried(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    saved = checkpoint()
    saved.edit_config("tokenizer", scaling_factor=0.5, _name_or_path="/somewhere", sample_size=99)
    fields = saved.edit_config("transformer", max_length=77, id2label={"0": "A"}, pad_token_id=3)
    generation = {"bos_token_id": 1, "_from_model_config": True}
    (saved.folder / "transformer" / "generation_config.json").write_text(json.dumps(generation))
    (saved.folder / "recipe.yaml").write_text("stages: []\n")
    copy = save_parts(tmp_path / "copy", load_parts(saved.folder))
    assert json.loads((copy / "transformer" / "config.json").read_text()) == fields
    assert json.loads((copy / "tokenizer" / "config.json").read_text())["scaling_factor"] == 0.5
    assert json.loads((copy / "transformer" / "generation_config.json").read_text()) == generation
    assert (copy / "recipe.yaml").read_text() == "stages: []\n"


def test_saving_over_another_model_leaves_nothing_of_it(
    checkpoint: Callable[..., Any], tiny_world_model: Callable[..., Any]
) -> None:
    saved = checkpoint(action_dim=2)
    (saved.folder / "recipe.yaml").write_text("of the old model")
    (saved.folder / "mine.txt").write_text("kept")
    other = tiny_world_model(seed=5, max_attention_resolution=8)
    other.save_pretrained(saved.folder)
    assert same_tensors(dict(WorldModel.from_pretrained(saved.folder).state_dict()), dict(other.state_dict()))
    assert not (saved.folder / "recipe.yaml").exists()
    assert (saved.folder / "mine.txt").read_text() == "kept"


# dtypes


def test_bfloat16_files_are_computed_in_float32_and_stay_bfloat16(
    checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    saved = checkpoint(action_dim=2)
    half = WorldModel.from_pretrained(saved.folder).save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((half / "transformer" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model = WorldModel.from_pretrained(half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    unchanged = published_files(model.save_pretrained(tmp_path / "unchanged"))
    for file, content in published_files(half).items():
        same = same_tensors(content, unchanged[file]) if file.endswith(".safetensors") else content == unchanged[file]
        assert same, file

    with torch.no_grad():
        model.transformer.norm.weight.add_(1e-4)  # trained: bfloat16 would lose it
    trained = published_files(model.save_pretrained(tmp_path / "trained"))
    assert {tensor.dtype for tensor in trained["transformer/model.safetensors"].values()} == {torch.float32}
    assert {tensor.dtype for tensor in trained["tokenizer/" + TOKENIZER.name].values()} == {torch.bfloat16}
    assert trained["transformer/config.json"]["torch_dtype"] == "float32"


def test_dtype_argument(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    saved = checkpoint()
    model = WorldModel.from_pretrained(saved.folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    written = published_files(model.save_pretrained(tmp_path / "half"))
    assert {tensor.dtype for tensor in written["transformer/model.safetensors"].values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, float64, got 'int8'"):
        WorldModel.from_pretrained(saved.folder, dtype="int8")


def test_loaded_weights_do_not_hang_on_the_file(checkpoint: Callable[..., Any]) -> None:
    saved = checkpoint()
    model = WorldModel.from_pretrained(saved.folder)
    before = model.transformer.lm_head.weight.clone()
    with open(saved.folder / TRANSFORMER, "r+b") as file:
        file.truncate(0)
    assert torch.equal(model.transformer.lm_head.weight, before)


# context length and actions


def test_context_length_as_the_original_changes_it(golden: Callable[[str], Any], tmp_path: Path) -> None:
    case = golden("oxe-64-act-free")
    model = WorldModel.from_pretrained(case.folder, context_length=1)
    with torch.no_grad():
        tokens, _ = model.tokenizer.tokenize(case.video)
    assert torch.equal(tokens, case.tensors["tokens_after_context_1"])
    saved = model.save_pretrained(tmp_path / "short")
    assert json.loads((saved / "tokenizer" / "config.json").read_text())["context_length"] == 1
    assert WorldModel.from_pretrained(saved).config == model.config
    with pytest.raises(ValueError, match=r"context_length 3.* 2 context"):
        WorldModel.from_pretrained(case.folder, context_length=3)


@pytest.mark.parametrize("before", [None, 4])
def test_another_action_size_gets_a_fresh_layer(
    checkpoint: Callable[..., Any], before: int | None, tmp_path: Path
) -> None:
    saved = checkpoint(action_dim=before, reward=True)
    old = WorldModel.from_pretrained(saved.folder)
    with pytest.warns(ActionLayerWarning, match=r"fresh one for actions of size 6.*everything else is kept") as caught:
        model = WorldModel.from_pretrained(saved.folder, action_dim=6)
    assert len(caught) == 1
    assert model.config.action_dim == 6
    assert model.transformer.action_linear is not None
    assert model.transformer.action_linear.weight.shape == (32, 6)
    assert not model.transformer.action_linear.weight.any()
    assert not model.transformer.action_linear.bias.any()
    kept = {name: tensor for name, tensor in model.state_dict().items() if "action_linear" not in name}
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in kept.items())
    assert not model.transformer.action_linear.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = WorldModel.from_pretrained(model.save_pretrained(tmp_path / "new"))
        assert again.config == model.config
        WorldModel.from_pretrained(tmp_path / "new", action_dim=6)


def test_action_statistics_go_with_the_action_layer(tiny_world_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_world_model(action_dim=2, max_attention_resolution=8)
    model.extras |= {"action_mean": [1.0, 2.0], "action_std": [0.5, 4.0], "recipe": "mine"}
    folder = model.save_pretrained(tmp_path / "model")
    assert WorldModel.from_pretrained(folder).extras == model.extras
    with pytest.warns(ActionLayerWarning):
        assert WorldModel.from_pretrained(folder, action_dim=3).extras == {"recipe": "mine"}


# faults


def refused(folder: Path, message: str) -> str:
    """The one error that loading ``folder`` gives, which matches ``message``."""
    with pytest.raises(ValueError, match=message) as caught:
        load_parts(folder)
    return str(caught.value)


def test_missing_extra_and_misshaped_tensors(checkpoint: Callable[..., Any]) -> None:
    saved = checkpoint(action_dim=2)
    good = saved.tensors(TRANSFORMER)
    name = "llm.model.layers.0.mlp.up_proj.weight"

    def check(edit: Callable[[dict[str, torch.Tensor]], object], *messages: str) -> None:
        saved.edit_tensors(TRANSFORMER, edit)
        text = refused(saved.folder, "does not hold the tensors that .*config.json describes")
        assert str(saved.folder / TRANSFORMER) in text
        for message in messages:
            assert message in text
        saved.edit_tensors(TRANSFORMER, lambda tensors: (tensors.clear(), tensors.update(good)))

    check(lambda t: t.pop(name), f"1 missing: {name} (48, 32)")
    check(lambda t: t.update(stray=torch.zeros(3)), "1 not expected: stray (3,)")
    check(lambda t: t.update({name: torch.zeros(2, 2)}), f"1 of another shape: {name} is (2, 2) and should be (48, 32)")
    check(lambda t: t.pop("action_linear.bias"), "1 missing: action_linear.bias (32,)")
    two_rewards = {"reward_linear.weight": torch.zeros(2, 32)}
    check(lambda t: t.update(two_rewards), "1 missing: reward_linear.bias (1,)", "is (2, 32) and should be (1, 32)")
    check(lambda t: t.update({f"{i}": torch.zeros(1) for i in range(9)}), "9 not expected: 0 (1,), ", " and 4 more")
    saved.edit_tensors(TRANSFORMER, lambda t: t.pop("action_linear.weight"))
    refused(saved.folder, r"action_linear.weight must have the shape \(embed_dim, action_dim\), got none")
    saved.edit_tensors(TOKENIZER, lambda t: t.pop("quantize.embedding.weight"))
    saved.edit_tensors(TRANSFORMER, lambda tensors: (tensors.clear(), tensors.update(good)))
    refused(saved.folder, r"1 missing: quantize.embedding.weight \(32, 4\)")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"hidden_size": 10**9, "head_dim": 16}, r"embed_tokens.weight is \(82, 32\) and should"),
        ("transformer", {"intermediate_size": 10**30}, "no model of these sizes can be built"),
        ("transformer", {"num_hidden_layers": 10**9}, r"asks for 1000000000 layers, .* has 21 tensors"),
        ("transformer", {"num_hidden_layers": 3}, r"missing: model.layers.2"),
        ("transformer", {"vocab_size": 10**12}, "82 token ids .* vocabulary of 1000000000000"),
        ("tokenizer", {"layers_per_block": 10**9}, "asks for 1000000000 layers"),
        ("tokenizer", {"block_out_channels": [8, 32, 2**40]}, "no model of these sizes can be built"),
        ("tokenizer", {"num_vq_embeddings": 10**13, "num_dyn_embeddings": 10**13}, "do not belong together"),
        ("tokenizer", {"num_vq_embeddings": 48, "num_dyn_embeddings": 32}, r"quantize.embedding.weight is \(32, 4\)"),
        ("tokenizer", {"context_length": 10**6}, "positions"),
        ("tokenizer", {"resolution": 24}, "resolution 24 must be a multiple of 16"),
    ],
)  # fmt: skip
def test_absurd_sizes_cost_no_memory(
    checkpoint: Callable[..., Any], part: str, changes: dict[str, Any], message: str
) -> None:
    saved = checkpoint()
    saved.edit_config(part, **changes)
    refused(saved.folder, message)


def test_folders_that_are_no_world_model(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty is no world model: it has no tokenizer/config.json; .* this one nothing")
    refused(tmp_path / "absent", r"absent is no folder")
    saved = checkpoint()
    refused(saved.folder / "tokenizer", r"it has no tokenizer/config.json; .* this one config.json, diffusion")
    (saved.folder / TRANSFORMER).unlink()
    refused(
        saved.folder, rf"no weights at {re.escape(str(saved.folder / TRANSFORMER))}: that folder holds config.json$"
    )
    (saved.folder / "transformer" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(saved.folder, r"holds only pytorch_model.bin, which are pickle files. Loading a pickle can run any code")
    (saved.folder / "transformer" / "pytorch_model.bin").unlink()
    (saved.folder / "transformer" / "model.safetensors.index.json").write_text("{}")
    refused(saved.folder, "split over several files")


@pytest.mark.parametrize("damage", ["truncated", "empty", "no header", "huge header"])
def test_damaged_weight_files(checkpoint: Callable[..., Any], damage: str) -> None:
    saved = checkpoint()
    path = saved.folder / TRANSFORMER
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "no header": b"\x10\0\0\0\0\0\0\0not a json header" + data[100:],
            "huge header": (2**62).to_bytes(8, "little") + data[8:],
        }[damage]
    )
    refused(saved.folder, rf"{re.escape(str(path))} is no intact safetensors file \(.*\); it may be truncated")


def test_integer_weights_are_refused(checkpoint: Callable[..., Any]) -> None:
    saved = checkpoint()
    saved.edit_tensors(TRANSFORMER, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    refused(saved.folder, r"tensor 'lm_head.weight' is of type I8; only F64, F32, BF16, F16 are read")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2, "package_version": "9.9"}, r"format 2; this version .* reads formats 1 to 1: .*'9.9'"),
        ({"format": "1"}, r"format '1'"),
        (
            {"action_men": [0.0]},
            r"unknown field 'action_men' \(value \[0.0\]\); the nearest known one is 'action_mean'",
        ),
        ({"action_mean": [0.0, 0.0]}, "action_mean and action_std belong together"),
        ({"action_mean": [0.0], "action_std": [1.0]}, "action_mean has 1 values for actions of size 2"),
        ({"action_mean": [0.0, 0.0], "action_std": [1.0, 0.0]}, r"action_std must be as many positive numbers, got"),
        ({"action_mean": ["a", 0.0], "action_std": [1.0, 1.0]}, r"action_mean must be a list of finite numbers, got"),
        ({"reward_transform": "log"}, "reward_transform must be 'symlog' or 'identity', got 'log'"),
        ({"preprocessing": "center crop"}, "preprocessing must be an object, got 'center crop'"),
        ({"tokenizer_attention_dropout": 1.5}, r"tokenizer_attention_dropout must be in \[0, 1\), got 1.5"),
    ],
)
def test_refused_side_files(checkpoint: Callable[..., Any], fields: dict[str, Any], message: str) -> None:
    saved = checkpoint(action_dim=2)
    (saved.folder / "ivideogpt.json").write_text(json.dumps({"format": 1} | fields))
    refused(saved.folder, rf"ivideogpt.json: {message}")


def test_extras_are_checked_before_anything_is_written(tiny_world_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_world_model(max_attention_resolution=8)
    model.extras["recip"] = "x"
    with pytest.raises(ValueError, match=r"unknown field 'recip'.*'recipe'"):
        model.save_pretrained(tmp_path / "model")
    model.extras = {"notes": {"loss": float("nan")}}
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_saving_where_a_file_is(tiny_world_model: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken: it is a file; give a folder"):
        tiny_world_model(max_attention_resolution=8).save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_reward_transform_and_dropout_live_in_the_side_file(
    tmp_path: Path, tiny_world_model: Callable[..., Any]
) -> None:
    model = tiny_world_model(reward=True, max_attention_resolution=8, attention_dropout=0.0)
    folder = model.save_pretrained(tmp_path / "model")
    side = json.loads((folder / "ivideogpt.json").read_text())
    assert (side["reward_transform"], side["tokenizer_attention_dropout"]) == ("symlog", 0.0)
    assert WorldModel.from_pretrained(folder).config == model.config
    (folder / "ivideogpt.json").unlink()  # as the original's files come
    assert WorldModel.from_pretrained(folder).config.reward_head == RewardHeadConfig(32, "symlog")
    shutil.rmtree(folder)
