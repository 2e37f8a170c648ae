"""The zoo's entries and names."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ivideogpt
from ivideogpt.config import TokenizerConfig, TransformerConfig, WorldModelConfig
from ivideogpt.models import CompressiveTokenizer, RewardHead, Transformer
from ivideogpt.zoo.hub import ModelNotFoundError, resolve
from ivideogpt.zoo.registry import cards_folder, entries, find_entry, list_models
from ivideogpt.zoo.tensors import build_on_meta

PUBLISHED = [
    "ivideogpt-bair-64-act-cond", "ivideogpt-bair-64-act-free", "ivideogpt-oxe-256-act-free",
    "ivideogpt-oxe-64-act-free", "ivideogpt-oxe-64-act-free-medium", "ivideogpt-oxe-64-goal-cond",
    "ivideogpt-robonet-64-act-cond", "ivideogpt-vp2-robodesk-64-act-cond", "ivideogpt-vp2-robosuite-64-act-cond",
]  # fmt: skip


def test_all_published_checkpoints_are_entries() -> None:
    assert [entry.name for entry in entries().values() if entry.hub_id] == PUBLISHED
    assert ivideogpt.list_models() == sorted([*PUBLISHED, "ivideogpt-metaworld-nano"])
    assert list_models("*bair*") == PUBLISHED[:2]
    assert list_models("*act-cond*") == [name for name in PUBLISHED if "act-cond" in name]
    for entry in entries().values():
        assert entry.licence == "mit"
        assert entry.hub_id in (f"thuml/{entry.name}", None)
        assert entry.summary.endswith(".")
        assert all(set(row) == {"benchmark", "metric", "value", "protocol"} for row in entry.authors_results)
        assert entry.data
        assert all(set(row) - {"hub_id"} == {"name", "url", "licence"} for row in entry.data)
        assert entry.base_model is None or entry.base_model in entries()
        assert entry.recipe is None or (cards_folder().parent / entry.recipe).is_file()
        assert entry.limits


@pytest.mark.parametrize("name", ["thuml/ivideogpt-oxe", "ivideogpt-oxe", "ivideogpt-oxe-64-act-free"])
def test_the_oxe_names_mean_the_64_px_action_free_checkpoint(name: str) -> None:
    entry = find_entry(name)
    assert entry is not None
    assert entry.hub_id == "thuml/ivideogpt-oxe-64-act-free"
    assert (entry.resolution, entry.context_length, entry.action_dim) == (64, 2, None)
    assert find_entry("thuml/ivideogpt-bair") is None


@pytest.mark.parametrize("name", [*PUBLISHED, "ivideogpt-metaworld-nano"])
def test_parameter_counts_are_those_of_the_configurations(name: str) -> None:
    entry = entries()[name]
    if entry.hub_id is None:
        config = WorldModelConfig.preset("nano", action_dim=4, reward=True)
    else:
        tokens = TokenizerConfig.preset("256" if "256" in name else "64", context_length=entry.context_length)
        size = "medium" if name.endswith("medium") else "small"
        config = WorldModelConfig(tokens, TransformerConfig.preset(size, action_dim=entry.action_dim))
    assert (config.tokenizer.resolution, config.context_length) == (entry.resolution, entry.context_length)
    assert (config.action_dim, config.reward_head is not None) == (entry.action_dim, entry.rewards)

    def build() -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {
            "tokenizer": CompressiveTokenizer(config.tokenizer),
            "transformer": Transformer(config.transformer),
        }
        return parts | ({"reward_head": RewardHead(config.reward_head)} if config.reward_head else {})

    counts = {part: sum(p.numel() for p in m.parameters()) for part, m in build_on_meta(build, name).items()}
    assert counts == entry.parameters


def test_names_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "ivideogpt-metaworld-nano").mkdir()
    assert resolve("mine") == Path("mine")
    assert resolve(tmp_path / "mine") == tmp_path / "mine"
    # a zoo name goes before a folder of the same name, which can still be meant
    embedded = find_entry("ivideogpt-metaworld-nano")
    assert embedded is not None
    assert embedded.folder is not None
    if embedded.folder.is_dir():
        assert resolve("ivideogpt-metaworld-nano") == embedded.folder
    assert resolve("./ivideogpt-metaworld-nano") == Path("ivideogpt-metaworld-nano")
    with pytest.raises(ModelNotFoundError, match=r"no world model at nowhere/at/all: there is no such folder"):
        resolve(Path("nowhere/at/all"))
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        resolve("./thuml/ivideogpt-oxe")
    with pytest.raises(ValueError, match="revision 'v1' was given, but mine is a folder"):
        resolve("mine", revision="v1")


def test_the_embedded_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entries()["ivideogpt-metaworld-nano"]
    assert entry.folder is not None

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = ivideogpt.from_pretrained("ivideogpt-metaworld-nano")
    config = model.config
    assert (config.tokenizer.resolution, config.context_length) == (entry.resolution, entry.context_length)
    assert (config.action_dim, config.reward_head is not None) == (entry.action_dim, entry.rewards)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert counts == entry.parameters
    assert sum(path.stat().st_size for path in entry.folder.rglob("*") if path.is_file()) <= 24 * 2**20


def test_the_zoo_is_listed_without_torch() -> None:
    code = "import sys, ivideogpt; ivideogpt.list_models(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
