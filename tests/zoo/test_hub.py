"""Loading from a Hub: the real client, in a process of its own, against a loopback server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.zoo.conftest import files_of
from tests.zoo.hub_client import ClientError, HubClient
from tests.zoo.hub_server import READ_TOKEN, Hub

CHECKPOINT = [
    "tokenizer/config.json", "tokenizer/diffusion_pytorch_model.safetensors", "transformer/config.json",
    "transformer/model.safetensors",
]  # fmt: skip
OXE = "thuml/ivideogpt-oxe-64-act-free"
LOAD = "wm = ivideogpt.from_pretrained(name)\nresult = wm.transformer.norm.weight[0].item()"
FILES = """
from ivideogpt.zoo.hub import resolve
folder = resolve(name)
result = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
"""


def test_the_oxe_alias_fetches_the_checkpoint_and_nothing_else(
    hub: Hub, client: HubClient, published: dict[str, bytes]
) -> None:
    hub.add(OXE, {**published, "README.md": b"# card", "train.py": b"raise SystemExit", "optimizer.pt": b"pickle"})
    code = 'wm = ivideogpt.from_pretrained("thuml/ivideogpt-oxe")\nresult = wm.config.context_length'
    assert client.run(code) == 2
    assert client.run(FILES, name="ivideogpt-oxe") == sorted([*CHECKPOINT, "README.md"])  # no train.py, no .pt
    count = len(hub.requests)
    client.run(LOAD, name="ivideogpt-oxe-64-act-free")
    assert not [request for request in hub.requests[count:] if request.startswith("GET") and "resolve" in request]


def test_a_golden_checkpoint_of_the_authors_layout(
    shared: Path, hub: Hub, new_client: Callable[..., HubClient]
) -> None:
    files = {n: d for n, d in files_of(shared / "golden" / "oxe-64-act-free").items() if n != "golden.safetensors"}
    hub.add(OXE, files)
    code = """
    wm = ivideogpt.from_pretrained("thuml/ivideogpt-oxe")
    video = wm.rollout(torch.rand(1, 2, 3, 64, 64), horizon=2, temperature=0).video
    result = [list(video.shape), bool(video.isfinite().all())]
    """
    assert new_client().run(code) == [[1, 4, 3, 64, 64], True]


def test_revisions_are_branches_tags_and_commits(
    hub: Hub, client: HubClient, tiny_world_model: Callable[..., Any], tmp_path: Path
) -> None:
    versions = []
    for seed in (0, 1, 2):
        model = tiny_world_model(seed=seed)
        model.transformer.norm.weight.data[0] = seed + 1.0
        versions.append(files_of(model.save_pretrained(tmp_path / str(seed))))
    repository = hub.add("someone/versions", versions[0])
    first = repository.branches["main"]
    repository.tags["v1"] = first
    repository.branches["trial"] = first
    repository.commit(versions[1], "trial", "on a branch")
    repository.commit(versions[2], "main", "third")
    code = "wm = ivideogpt.from_pretrained(name, revision=at)\nresult = wm.transformer.norm.weight[0].item()"
    found = [client.run(code, name="someone/versions", at=at) for at in (None, "main", "v1", first, "trial")]
    assert found == [3.0, 3.0, 1.0, 1.0, 2.0]
    with pytest.raises(ClientError, match="'someone/versions' at revision 'v9'.*not revision 'v9'") as caught:
        client.run(code, name="someone/versions", at="v9")
    assert caught.value.kind == "ModelNotFoundError"


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_loopbacktoken", None),
        (READ_TOKEN, None),
        ("hf_wrongwrongwrong", "has no such repository, or it is private and you are not logged in"),
        (None, "has no such repository, or it is private and you are not logged in .`hf auth login`"),
    ],
)
def test_private_repositories(
    token: str | None,
    message: str | None,
    hub: Hub,
    new_client: Callable[..., HubClient],
    published: dict[str, bytes],
) -> None:
    hub.add("other/secret", published, private=True)
    one = new_client(token=token)
    if message is None:
        assert one.run(LOAD, name="other/secret") == 1.0
        return
    with pytest.raises(ClientError, match=message):
        one.run(LOAD, name="other/secret")
    assert not [path for path in one.home.rglob("*") if path.suffix == ".safetensors"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("someone/absent", ["'someone/absent'", "has no such repository, or it is private", "hf auth login"]),
        (
            "ivideogpt-oxe-64-act-fre",
            ["did you mean 'ivideogpt-oxe-64-act-free'?", "the Hub repository 'ivideogpt-oxe-64-act-fre'"],
        ),
        (
            "ivideogpt-robonet-64-act-cond",
            ["zoo name stands for, the Hub repository 'thuml/ivideogpt-robonet-64-act-cond': "],
        ),
        ("a/b/c", ["'a/b/c'", "is no valid id"]),
    ],
)
def test_errors_say_what_was_looked_for_where_and_what_to_do(
    name: str, parts: list[str], hub: Hub, client: HubClient
) -> None:
    with pytest.raises(ClientError) as caught:
        client.run(LOAD, name=name)
    assert caught.value.kind == "ModelNotFoundError"
    for part in [hub.endpoint, *parts, "from_pretrained('./FOLDER')"]:
        assert part in str(caught.value)


def test_what_is_cached_works_without_the_hub(
    hub: Hub, new_client: Callable[..., HubClient], published: dict[str, bytes]
) -> None:
    hub.add("someone/cached", published)
    first = new_client()
    assert first.run(LOAD, name="someone/cached") == 1.0
    home = first.home
    offline = new_client(home=home, HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.run(LOAD, name="someone/cached") == 1.0
    with pytest.raises(ClientError, match="could not be reached.*does not hold it") as caught:
        offline.run(LOAD, name="thuml/ivideogpt-bair-64-act-free")
    assert str(home) in str(caught.value)  # the cache
    declared = new_client(home=home, HF_HUB_OFFLINE="1")
    assert declared.run(LOAD, name="someone/cached") == 1.0


def test_the_command_downloads(hub: Hub, client: HubClient, published: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(OXE, published)
    code = "from ivideogpt.cli import main\nresult = main(words)"
    assert client.run(code, words=["zoo", "download", "ivideogpt-oxe"]) == 0
    assert Path(client.printed.strip()).is_dir()
    out = tmp_path / "copy"
    assert client.run(code, words=["zoo", "download", OXE, "--out", str(out)]) == 0
    assert files_of(out) == published
    assert client.run(code, words=["zoo", "download", "ivideogpt-metaworld-nano", "--out", str(tmp_path / "nano")]) == 0
    assert client.run("result = ivideogpt.from_pretrained(f).config.action_dim", f=str(tmp_path / "nano")) == 4
