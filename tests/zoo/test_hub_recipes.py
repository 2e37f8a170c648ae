"""Recipes and the Hub: one that publishes at its end, and one that rides with the weights and is run from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ivideogpt.data.reader import load_manifest, resolve_source
from ivideogpt.recipes.foreign import check_foreign, is_hub_id
from ivideogpt.recipes.publishing import publish_settings
from tests.zoo.hub_client import ClientError, HubClient
from tests.zoo.hub_server import Fault, Hub

COMMAND = "from ivideogpt.cli import main, lightning_main\nresult = (lightning_main if lightning else main)(words)"
TOKENIZER = dict(
    resolution=64, block_channels=[8, 32, 32], layers_per_block=1, latent_channels=4, norm_num_groups=4,
    codebook_size=32, dynamics_codebook_size=48, context_length=2, max_attention_resolution=16,
)  # fmt: skip


def recipe(out: Path, **top: Any) -> dict[str, Any]:
    """The smallest training of everything on the embedded recordings, with an evaluation."""
    trainer = {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "enable_progress_bar": False}
    data = {"train": "embedded:train", "val": "embedded:heldout", "segment_length": 4, "batch_size": 2,
            "num_workers": 0, "epoch_batches": 2, "context_length": 2}  # fmt: skip
    modules: dict[str, tuple[str, dict[str, Any]]] = {
        "tokenizer": ("TokenizerModule", {"tokenizer": TOKENIZER, "perceptual_weight": 0.0}),
        "transformer": (
            "TransformerModule",
            {
                "tokenizer": {"from": "tokenizer"},
                "transformer": {"num_layers": 1, "num_heads": 2, "embed_dim": 32, "mlp_dim": 48, "action_dim": 4},
            },
        ),
        "evaluate": ("EvaluationModule", {"world_model": {"from": "transformer"}, "horizon": 2, "num_examples": 1}),
    }
    return {
        "name": "tiny",
        "output": str(out),
        "defaults": {"data": {"class_path": "ivideogpt.data.VideoDataModule", "init_args": data}, "trainer": trainer},
        "stages": {
            stage: {"module": {"class_path": f"ivideogpt.training.{name}", "init_args": arguments}}
            for stage, (name, arguments) in modules.items()
        },
        **top,
    }


def test_a_recipe_publishes_and_is_run_from_the_hub(
    hub: Hub, new_client: Callable[..., HubClient], tmp_path: Path
) -> None:
    content = recipe(tmp_path / "out", publish={"repo_id": "someone/tiny", "tag": "v1", "licence": "mit"})
    content["stages"]["evaluate"]["trainer"] = {"limit_test_batches": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    client = new_client()
    # the Hub is in trouble when the training is done: the run stays, and the same command publishes
    hub.faults.append(Fault("POST .*/commit/", times=99, status=403))
    with pytest.raises(ClientError, match="your token may not write there"):
        client.run(COMMAND, lightning=True, words=["run", str(tmp_path / "tiny.yaml"), "--debug"])
    hub.faults.clear()
    assert client.run(COMMAND, lightning=True, words=["run", str(tmp_path / "tiny.yaml")]) == 0
    assert client.printed.count("finished before, skipped") == 3
    repository = hub.repositories["someone/tiny"]
    assert repository.tags == {"v1": repository.branches["main"]}
    assert set(repository.main) == {
        ".gitattributes", "README.md", "ivideogpt.json", "recipe.yaml", "results/evaluate.json", "rollout.gif",
        "tokenizer/config.json", "tokenizer/diffusion_pytorch_model.safetensors", "transformer/config.json",
        "transformer/model.safetensors",
    }  # fmt: skip
    card = repository.main["README.md"].decode()
    measured = json.loads(repository.main["results/evaluate.json"])["overall"]["model"]["psnr"]
    assert f"{measured:.4g}" in card
    for source, row in load_manifest(resolve_source("embedded:train"))["sources"].items():
        assert f"| {source}: {row['episodes']:,} episodes, {row['frames']:,} frames | MIT |" in card
    assert "tokenizer: 1 updates in" in card
    assert "](rollout.gif)" in card
    rides = yaml.safe_load(repository.main["recipe.yaml"])
    assert not rides.keys() & {"publish", "output", "on_change"}
    assert str(tmp_path) not in repository.main["recipe.yaml"].decode()

    # somebody else runs what rides with the weights, in an empty folder
    other = new_client()
    words = ["run", "someone/tiny", "evaluate=null", f"output={tmp_path / 'again'}"]
    assert other.run(COMMAND, lightning=True, words=words) == 0
    assert (tmp_path / "again" / "model" / "transformer" / "model.safetensors").is_file()
    assert other.run(COMMAND, lightning=False, words=["run", "someone/tiny", "--revision", "v1", "--print-config"]) == 0
    assert yaml.safe_load(other.printed)["stages"].keys() == {"tokenizer", "transformer", "evaluate"}
    with pytest.raises(ClientError, match="'v9'"):
        other.run(COMMAND, lightning=False, words=["run", "someone/tiny", "--revision", "v9", "--debug"])
    assert not list(other.home.rglob("*.safetensors"))  # the recipe alone was fetched


def hostile(content: dict[str, Any]) -> bytes:
    return yaml.safe_dump(content, sort_keys=False).encode()


def with_class(path: str) -> dict[str, Any]:
    content = recipe(Path("x"))
    del content["output"]
    content["stages"]["tokenizer"]["module"]["class_path"] = path
    return content


def with_value(stage: str, name: str, value: Any) -> dict[str, Any]:
    content = recipe(Path("x"))
    del content["output"]
    content["stages"][stage]["module"]["init_args"][name] = value
    return content


LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (hostile(with_class("os.system")), r"stages.tokenizer.module: a recipe may not name os.system"),
        (hostile(with_class("subprocess.Popen")), "may not name subprocess.Popen"),
        (hostile(with_class("ivideogpt.recipes.os.system")), "there is no module"),
        (
            hostile(with_value("evaluate", "output_folder", "/root/.ssh")),
            "output_folder is '/root/.ssh', a path outside",
        ),
        (hostile(with_value("evaluate", "output_folder", "runs/../../x")), "is 'runs/../../x', a path outside"),
        (hostile({**with_class("x.Y"), "output": "/tmp/x"}), "sets 'output', which only who runs it may do"),
        (hostile({**with_class("x.Y"), "base": ["../../../secret.yaml"]}), "sets 'base', which only who runs it"),
        (hostile({**with_class("x.Y"), "publish": {"repo_id": "evil/x"}}), "sets 'publish', which only who runs it"),
        (b"name: x\nstages: !!python/object/apply:os.system ['id']\n", "is not valid YAML"),
        (LAUGHS.encode(), "has YAML aliases"),
        (b"[" * 10**6, "more than 50 mappings and lists inside each other"),
        (b"- a\n- b\n", "must hold a mapping"),
        (b"x" * (2**20 + 1), "which no such file needs"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_hostile_recipes_are_refused(text: bytes, message: str, hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.add("evil/recipe", {"recipe.yaml": text})
    with pytest.raises(ClientError, match=message) as caught:
        client.run(COMMAND, lightning=False, words=["run", "evil/recipe", f"output={tmp_path / 'x'}", "--debug"])
    assert "ValueError" in caught.value.kinds
    assert list(tmp_path.iterdir()) == []


def test_a_repository_without_a_recipe(hub: Hub, client: HubClient, published: dict[str, bytes]) -> None:
    hub.add("someone/plain", published)
    for words, message in (
        (["someone/plain"], "the Hub repository 'someone/plain' has no recipe.yaml. It holds"),
        (
            ["someone/absent"],
            "there is no recipe 'someone/absent', neither as a file nor on the Hub: .* no such repository",
        ),
        (["debug", "--revision", "v1"], "revision 'v1' was given, but 'debug' is no Hub repository"),
    ):
        with pytest.raises(ClientError, match=message):
            client.run(COMMAND, lightning=False, words=["run", *words, "--debug"])


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("someone/mine-v1.0")
    (tmp_path / "someone").mkdir()
    for text in ("someone/mine", "recipe.yaml", "elsewhere/recipe.yaml", "debug", "a/b/c", "./a", "/a/b"):
        assert not is_hub_id(text), text


def test_trust_allows_paths_and_nothing_else() -> None:
    assert check_foreign("name: x\nstages: {a: {data: /srv/x}}\n", "it", trust=True)["name"] == "x"
    with pytest.raises(ValueError, match="it sets 'base'"):
        check_foreign("base: [/etc/passwd]\n", "it", trust=True)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("someone/mine", "publish must be a mapping with repo_id"),
        ({"repo_id": "mine"}, "publish must be a mapping with repo_id: USER/NAME"),
        ({"repo_id": "a/b", "privat": True}, "publish: unknown key 'privat'; did you mean 'private'"),
        ({"repo_id": "a/b", "private": "yes"}, "publish.private: 'yes' is of the wrong type"),
        ({"repo_id": "a/b", "datasets": "x/y"}, "publish.datasets: 'x/y' is of the wrong type"),
    ],
)
def test_mistakes_in_publish(node: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        publish_settings(node)
