"""Sharing adapters through a Hub: the real client, in a process of its own, against a loopback server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ivideogpt.world_model import WorldModel
from tests.zoo.conftest import files_of
from tests.zoo.hub_client import ClientError, HubClient
from tests.zoo.hub_server import Hub

ADAPTER = [
    "README.md", "adapter_config.json", "adapter_layers.safetensors", "adapter_model.safetensors", "ivideogpt.json",
    "recipe.yaml",
]  # fmt: skip
MAKE = """
from pathlib import Path
from ivideogpt.recipes.adapters import base_reference, make_adapter
from ivideogpt.recipes.parts import source_folder
from ivideogpt.training import TransformerModule
from ivideogpt.zoo.adapter import save_adapter
from ivideogpt.zoo.checkpoint import load_parts

spec, earlier = {"from": base}, {base: Path(base)} if base.startswith("/") else {}
parts = load_parts(source_folder(spec, earlier, "here"))
torch.manual_seed(0)
module = TransformerModule(parts.transformer, parts.tokenizer, parts.reward_head, lora={"rank": 2})
for name, parameter in module.named_parameters():
    if ".lora_B." in name:
        torch.nn.init.normal_(parameter, std=0.1)
result = base_reference(spec, earlier, Path(folder), "here", 2)
save_adapter(folder, make_adapter(module, {"recipe": "mine", "adapter_base": result}, "stages: {}\\n"))
"""
SAME = """
models = [ivideogpt.from_pretrained(name).state_dict() for name in names]
result = all(torch.equal(value, models[1][name]) for name, value in models[0].items())
"""
COMMAND = "from ivideogpt import cli\nresult = cli.main(words)"


@pytest.fixture
def base(hub: Hub, tiny_world_model: Callable[..., Any], tmp_path: Path) -> dict[str, bytes]:
    """Files of a base model, which is on the Hub as `someone/base`."""
    files = files_of(tiny_world_model(action_dim=3, reward=True).save_pretrained(tmp_path / "base"))
    hub.add("someone/base", files)
    return files


def test_an_adapter_is_pushed_alone_and_keeps_to_the_commit_of_its_base(
    hub: Hub, client: HubClient, base: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    reference = client.run(MAKE, base="someone/base", folder=folder)
    found = hub.repositories["someone/base"].files()
    assert found is not None
    assert (reference["model"], reference["revision"]) == ("someone/base", found[0])
    assert client.run(COMMAND, words=["push", str(folder), "someone/adapter"]) == 0
    there = hub.repositories["someone/adapter"].main
    assert sorted(there.keys() - {".gitattributes"}) == ADAPTER
    assert sum(map(len, there.values())) < 0.5 * sum(map(len, base.values()))
    assert there["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert b'from_pretrained("someone/adapter")' in there["README.md"]
    assert client.run(SAME, names=["someone/adapter", str(folder)])

    changed = {**base, "transformer/model.safetensors": b"another"}
    hub.repositories["someone/base"].commit(changed, "main", "changed")
    assert client.run(SAME, names=["someone/adapter", str(folder)])
    assert client.run(COMMAND, words=["merge", "someone/adapter", "--out", str(tmp_path / "merged")]) == 0
    assert client.run(SAME, names=["someone/adapter", str(tmp_path / "merged")])

    # a whole model takes its place, and the other way round
    assert client.run(COMMAND, words=["push", str(tmp_path / "merged"), "someone/adapter"]) == 0
    assert not [name for name in hub.repositories["someone/adapter"].main if name.startswith("adapter")]
    assert client.run(SAME, names=["someone/adapter", str(folder)])
    assert client.run(COMMAND, words=["push", str(folder), "someone/adapter"]) == 0
    assert sorted(hub.repositories["someone/adapter"].main.keys() - {".gitattributes"}) == ADAPTER


def test_what_others_could_not_load_is_not_published(
    hub: Hub, client: HubClient, base: dict[str, bytes], tmp_path: Path
) -> None:
    assert client.run(MAKE, base=str(tmp_path / "base"), folder=tmp_path / "local")["folder"] == "../base"
    assert client.run(COMMAND, words=["push", str(tmp_path / "local"), "someone/local"]) == 2
    assert "publish the merged model" in client.log.read_text()
    assert "someone/local" not in hub.repositories or not hub.repositories["someone/local"].main


def edited(files: dict[str, bytes], name: str, **changes: Any) -> dict[str, bytes]:
    return {**files, name: json.dumps(json.loads(files[name]) | changes).encode()}


def test_hostile_adapters_are_refused_before_their_tensors_are_fetched(
    hub: Hub, client: HubClient, base: dict[str, bytes], tmp_path: Path
) -> None:
    client.run(MAKE, base="someone/base", folder=tmp_path / "adapter")
    good = files_of(tmp_path / "adapter")
    reference = {"sha256": "0" * 64}
    cases = {
        "folder": (edited(good, "ivideogpt.json", adapter_base={"folder": "../x", **reference}), "base is a folder"),
        "path": (edited(good, "ivideogpt.json", adapter_base={"model": "../x", **reference}), "cannot be one"),
        "none": ({**good, "ivideogpt.json": b'{"format": 1}'}, "does not name its base"),
        "code": (edited(good, "adapter_config.json", auto_map={"a": "b"}), "auto_map"),
        "rank": (edited(good, "adapter_config.json", r=10**9), "r must be a number in 1..1024"),
        "huge": ({**good, "adapter_config.json": b" " * 2**21}, "adapter_config.json .* has 2,097,152 bytes"),
        "cut": ({**good, "adapter_model.safetensors": good["adapter_model.safetensors"][:-64]}, "not to be believed"),
        "pickle": ({**good, "adapter_model.safetensors": b"\x80\x04." + bytes(99)}, "holds a pickle"),
        "bin": (
            {name: data for name, data in good.items() if name != "adapter_model.safetensors"}
            | {"adapter_model.bin": b"\x80\x04."},
            "has no adapter_model.safetensors.*pickle files, which it has, are never loaded",
        ),
    }
    for name, (files, message) in cases.items():
        hub.add(f"other/{name}", files)
        with pytest.raises(ClientError, match=message) as caught:
            client.run("ivideogpt.from_pretrained(name)", name=f"other/{name}")
        assert "ValueError" in caught.value.kinds
    fetched = [path for path in client.home.rglob("*other--*/**/*") if path.name.startswith("adapter_model")]
    assert not fetched

    # bases without end
    hub.add("other/looped", edited(good, "ivideogpt.json", adapter_base={"model": "other/looped", **reference}))
    with pytest.raises(ClientError, match="is an adapter, and so cannot be the base of another one"):
        client.run("ivideogpt.from_pretrained(name)", name="other/looped")


def test_an_adapter_of_another_shape_costs_no_download_of_its_base(
    hub: Hub,
    client: HubClient,
    new_client: Callable[..., HubClient],
    base: dict[str, bytes],
    tiny_config: Callable[..., Any],
    tmp_path: Path,
) -> None:
    client.run(MAKE, base="someone/base", folder=tmp_path / "adapter")
    good = files_of(tmp_path / "adapter")
    config = tiny_config(3)
    deeper = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, num_layers=3))
    files = files_of(WorldModel(deeper).save_pretrained(tmp_path / "deeper"))
    hub.add("someone/deeper", files)
    named = {"model": "someone/deeper", "sha256": json.loads(good["ivideogpt.json"])["adapter_base"]["sha256"]}
    hub.add("other/misfit", edited(good, "ivideogpt.json", adapter_base=named))
    hub.sent.clear()
    with pytest.raises(ClientError, match=r"adapter_config.json .*layers.2") as caught:
        new_client().run("ivideogpt.from_pretrained('other/misfit')")
    assert "ValueError" in caught.value.kinds and "Looked for" not in str(caught.value)
    fetched = [hub.sent[name] for name in files if name.endswith("safetensors")]
    weights = [len(data) for name, data in files.items() if name.endswith("safetensors")]
    assert len(fetched) == len(weights) == 2
    assert 0 < sum(fetched) < 0.2 * sum(weights)
