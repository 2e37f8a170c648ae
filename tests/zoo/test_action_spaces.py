"""Models of several action spaces on disk: saved beside the published files, loaded as the model of one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ivideogpt
from ivideogpt import recipes
from ivideogpt.models.action_layers import ActionLayers, with_action_layer
from ivideogpt.recipes.parts import PartBuilder
from ivideogpt.zoo.action_spaces import ACTION_SPACES, read_action_layers
from ivideogpt.zoo.checkpoint import Parts, load_parts, save_parts
from ivideogpt.zoo.hub import copy_to

SPACES = {"lab/arm": 3, "lab/gripper*": 2}


@pytest.fixture
def parts(tiny_world_model: Callable[..., Any]) -> Parts:
    model = tiny_world_model()
    layers = ActionLayers(SPACES, 32)
    for number, name in enumerate(SPACES):
        torch.nn.init.normal_(layers[name].weight, generator=torch.Generator().manual_seed(number))
        layers[name].mean.fill_(number + 1.0)
        layers[name].std.fill_(2.0)
    return Parts(model.tokenizer, model.transformer, action_layers=layers)


def test_one_of_several_is_a_model_like_any_other(parts: Parts, tmp_path: Path) -> None:
    folder = save_parts(tmp_path / "multi", parts)
    wm = ivideogpt.from_pretrained(folder, action_space="lab/gripper*")
    assert wm.config.action_dim == 2
    assert wm.extras["action_mean"] == [2.0, 2.0] and wm.extras["action_std"] == [2.0, 2.0]
    assert parts.action_layers is not None
    layer = parts.action_layers["lab/gripper*"]
    frames, actions = torch.rand(1, 2, 3, 32, 32), torch.randn(1, 4, 2)
    found = wm.rollout(frames, actions, temperature=0)
    plain = ivideogpt.WorldModel.from_parts(parts.tokenizer, with_action_layer(parts.transformer, layer)).eval()
    expected = plain.rollout(frames, (actions - layer.mean) / layer.std, temperature=0)
    assert torch.equal(found.tokens, expected.tokens)
    again = ivideogpt.from_pretrained(wm.save_pretrained(tmp_path / "one"))  # and is saved as one
    assert torch.equal(again.rollout(frames, actions, temperature=0).tokens, found.tokens)
    assert not (tmp_path / "one" / ACTION_SPACES).exists()
    half = ivideogpt.from_pretrained(folder, action_space="lab/arm", dtype="bfloat16")
    assert half.transformer.action_linear is not None
    assert half.transformer.action_linear.weight.dtype == torch.bfloat16


def test_a_space_must_be_chosen(parts: Parts, tmp_path: Path) -> None:
    folder = save_parts(tmp_path / "multi", parts)
    with pytest.raises(
        ValueError, match=r"has several action spaces: give action_space, one of 'lab/arm', 'lab/gripper\*'"
    ):
        ivideogpt.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"has no action space 'leg'; it has 'lab/arm' \(3\), 'lab/gripper\*' \(2\)"):
        ivideogpt.from_pretrained(folder, action_space="leg")
    with pytest.warns(UserWarning, match="fresh one for actions of size 7"):
        assert ivideogpt.from_pretrained(folder, action_dim=7).config.action_dim == 7
    loaded = load_parts(folder)
    assert loaded.action_layers is not None and loaded.action_layers.spaces == SPACES
    for name, tensor in loaded.action_layers.state_dict().items():
        assert parts.action_layers is not None
        assert torch.equal(tensor, parts.action_layers.state_dict()[name])
    parts.action_layers = None
    save_parts(folder, parts)  # nothing of the other model stays
    assert ivideogpt.from_pretrained(folder).config.action_dim is None
    with pytest.raises(ValueError, match="no action space 'lab/arm'; it has none"):
        ivideogpt.from_pretrained(folder, action_space="lab/arm")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lab/arm.weight": torch.zeros(31, 3)}, r"should be \(32, 3\)"),
        ({"lab/arm.std": torch.zeros(3)}, "a std of 0"),
        ({"lab/arm.mean": torch.full((3,), torch.nan)}, "not finite"),
        ({"more": torch.zeros(2)}, "not expected: more"),
        ({"a.b.weight": torch.zeros(32, 1)}, "missing"),
        ({"lab/arm.weight": torch.zeros(1, 5000)}, "of at most 5000 numbers"),
    ],
)
def test_files_that_hold_something_else(parts: Parts, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = save_parts(tmp_path / "multi", parts) / ACTION_SPACES
    save_file(load_file(path) | change, path)
    with pytest.raises(ValueError, match=says):
        read_action_layers(path, 32, torch.device("cpu"))


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
def test_a_recipe_trains_saves_and_goes_on(tmp_path: Path, make_shards: Callable[..., str]) -> None:
    arm, hand = make_shards("arm", source="lab/arm", action_dim=3), make_shards("hand", source="lab/hand", action_dim=2)
    tiny = (
        "{resolution: 32, block_channels: [8, 32, 32], layers_per_block: 1, latent_channels: 4, norm_num_groups: 4, "
        "codebook_size: 32, dynamics_codebook_size: 48, max_attention_resolution: 8, context_length: 2}"
    )
    path = tmp_path / "multi.yaml"
    path.write_text(f"""
name: multi
seed: 0
output: {tmp_path / "out"}
defaults:
  data:
    class_path: ivideogpt.data.VideoDataModule
    init_args:
      train: [{arm}, {hand}]
      segment_length: 4
      context_length: 2
      resolution: 32
      batch_size: 4
      num_workers: 0
      augment: false
      use_rewards: false
      pad_actions: true
  trainer: {{accelerator: cpu, max_steps: 3, limit_val_batches: 0, logger: false, enable_progress_bar: false}}
stages:
  first:
    module:
      class_path: ivideogpt.training.TransformerModule
      init_args:
        tokenizer: {tiny}
        transformer: {{num_layers: 1, num_heads: 2, embed_dim: 32, mlp_dim: 32, max_positions: 512}}
        action_spaces: {{lab/arm: 3, lab/hand: 2}}
        action_statistics_from_data: true
        warmup_updates: 0
        learning_rate: 1e-2
  second:
    module:
      class_path: ivideogpt.training.TransformerModule
      init_args:
        tokenizer: {{from: first}}
        transformer: {{from: first}}
        warmup_updates: 0
  alone:
    module:
      class_path: ivideogpt.training.TransformerModule
      init_args:
        tokenizer: {{from: second}}
        transformer: {{from: second, action_space: lab/hand}}
        warmup_updates: 0
    data: {{init_args: {{train: {hand}, pad_actions: false}}}}
""")
    output = recipes.run(path, [])
    assert output is not None
    first, second = load_parts(output / "first").action_layers, load_parts(output / "second").action_layers
    assert first is not None and second is not None
    assert first.spaces == second.spaces == {"lab/arm": 3, "lab/hand": 2}
    for name in first.spaces:
        assert first[name].weight.any() and not torch.equal(first[name].weight, second[name].weight)
        assert torch.equal(first[name].std, second[name].std)  # the second went on with them
    model = ivideogpt.from_pretrained(output / "model")
    assert model.config.action_dim == 2
    torch.testing.assert_close(torch.tensor(model.extras["action_mean"]), second["lab/hand"].mean)


def test_a_recipe_says_which_space_is_meant(parts: Parts, tmp_path: Path) -> None:
    folder = str(save_parts(tmp_path / "multi", parts))
    with pytest.raises(ValueError, match=r"'.*multi' has several action spaces: give action_space, one of 'lab/arm'"):
        PartBuilder({}).build("world_model", {"from": folder}, "world_model")
    chosen = PartBuilder({}).build("world_model", {"from": folder, "action_space": "lab/arm"}, "world_model")
    assert chosen.config.action_dim == 3


def test_a_copy_leaves_nothing_of_the_model_before(parts: Parts, tmp_path: Path) -> None:
    multi = save_parts(tmp_path / "multi", parts)
    parts.action_layers = None
    plain = save_parts(tmp_path / "plain", parts)
    out = copy_to(multi, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    copy_to(plain, out)
    assert ivideogpt.from_pretrained(out).config.action_dim is None
    assert not (out / ACTION_SPACES).exists() and (out / "notes.txt").read_text() == "mine"
