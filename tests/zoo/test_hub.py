"""Sharing through a Hub: the real client against a loopback server, in a process of its own.

The client reads ``HF_ENDPOINT`` when it is imported, so one script does everything and reports what it saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, os, sys, warnings
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from hub_server import TOKEN, USER, Hub, serve

golden, home = Path(sys.argv[2]), Path(sys.argv[3])
report = {}

def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def error_of(call):
    try:
        call()
    except ValueError as error:
        return {"kind": type(error).__name__, "text": str(error), "cause": type(error.__cause__).__name__}
    return None

def first_weight(model):
    return model.transformer.norm.weight[0].item()

with serve() as hub:
    os.environ |= {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "20",
    }
    import torch
    torch.set_num_threads(1)
    import ivideogpt
    from ivideogpt.zoo.hub import resolve

    warnings.simplefilter("error", UserWarning)
    report["endpoint"] = hub.endpoint
    published = {name: data for name, data in files_of(golden).items() if name != "golden.safetensors"}
    published |= {"README.md": b"# card", "train.py": b"raise SystemExit", "transformer/optimizer.pt": b"pickle"}
    hub.add("thuml/ivideogpt-oxe-64-act-free", published)
    hub.add("someone/pickled", {"tokenizer/config.json": b"{}", "pytorch_model.bin": b"pickle"})
    hub.add("other/secret", published, private=True)

    # a zoo alias, downloaded from the repository that it stands for
    model = ivideogpt.from_pretrained("thuml/ivideogpt-oxe")
    folder = resolve("ivideogpt-oxe")
    report["alias"] = {"files": sorted(files_of(folder)), "context_length": model.config.context_length}
    count = len(hub.requests)
    ivideogpt.from_pretrained("ivideogpt-oxe-64-act-free")
    report["fetched again"] = [r for r in hub.requests[count:] if r.startswith("GET") and "resolve" in r]

    # pushed, and loaded back by its id
    model = ivideogpt.from_pretrained(golden.parent / "bair-64-act-cond")
    model.extras |= {"recipe": "mine", "action_mean": [0.0] * 4, "action_std": [2.0] * 4}
    model.published.recipe = "stages: []\\n"
    commit = model.push_to_hub("someone/mine", private=True, commit_message="first model")
    pushed = hub.repositories["someone/mine"]
    report["push"] = {
        "url": commit.commit_url, "files": sorted(pushed.files("main")[1]), "messages": list(pushed.messages),
        "private": pushed.private, "card": pushed.files("main")[1]["README.md"].decode(),
        "large": sorted(r for r in hub.requests if r.startswith("PUT")), "count": len(hub.large_files),
    }
    back = ivideogpt.from_pretrained("someone/mine")
    report["back"] = {
        "same": all(torch.equal(t, back.state_dict()[k]) for k, t in model.state_dict().items()),
        "config": back.config == model.config, "extras": back.extras == model.extras,
        "recipe": back.published.recipe,
    }

    # pushed again: the card that is there stays, a recipe that is no more goes; the first one by its tag and commit
    first = pushed.refs["main"]
    pushed.refs["v1"] = first
    files = dict(pushed.files("main")[1]) | {"README.md": b"# written by hand"}
    pushed.commit(files, "main", "card by hand")
    model.published.recipe = None
    with torch.no_grad():
        model.transformer.norm.weight += 1
    model.push_to_hub("someone/mine")
    now = pushed.files("main")[1]
    report["again"] = {
        "card": now["README.md"].decode(), "recipe": "recipe.yaml" in now,
        "main": first_weight(ivideogpt.from_pretrained("someone/mine")),
        "v1": first_weight(ivideogpt.from_pretrained("someone/mine", revision="v1")),
        "commit": first_weight(ivideogpt.from_pretrained("someone/mine", revision=first)),
        "own": first_weight(model),
    }
    model.push_to_hub("someone/mine", card="---\\nlicense: mit\\n---\\n# mine")
    report["own card"] = pushed.files("main")[1]["README.md"].decode()

    report["errors"] = {
        "absent": error_of(lambda: ivideogpt.from_pretrained("someone/absent")),
        "typo": error_of(lambda: ivideogpt.from_pretrained("ivideogpt-oxe-64-act-fre")),
        "revision": error_of(lambda: ivideogpt.from_pretrained("someone/mine", revision="v9")),
        "pickled": error_of(lambda: ivideogpt.from_pretrained("someone/pickled")),
        "alias": error_of(lambda: ivideogpt.from_pretrained("ivideogpt-robonet-64-act-cond")),
        "no id": error_of(lambda: ivideogpt.from_pretrained("a/b/c")),
    }
    os.environ["HF_TOKEN"] = "hf_wrong"
    report["errors"]["secret"] = error_of(lambda: ivideogpt.from_pretrained("other/secret"))

# the server has gone
report["errors"]["offline"] = error_of(lambda: ivideogpt.from_pretrained("thuml/ivideogpt-bair-64-act-free"))
report["cached"] = ivideogpt.from_pretrained("thuml/ivideogpt-oxe").config.context_length
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("hub")
    arguments = [str(Path(__file__).parent), str(shared / "golden" / "oxe-64-act-free"), str(home)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True, text=True, timeout=280, check=False, env=environment, cwd=home,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return {**json.loads(run.stdout), "home": str(home)}


CHECKPOINT = [
    "tokenizer/config.json", "tokenizer/diffusion_pytorch_model.safetensors", "transformer/config.json",
    "transformer/model.safetensors",
]  # fmt: skip


def test_the_oxe_alias_fetches_the_checkpoint_and_nothing_else(report: dict[str, Any]) -> None:
    expected = sorted([*CHECKPOINT, "README.md", "transformer/generation_config.json"])  # no train.py, no .pt
    assert report["alias"] == {"files": expected, "context_length": 2}
    assert report["fetched again"] == []


def test_a_pushed_model_holds_everything(report: dict[str, Any]) -> None:
    pushed = report["push"]
    assert pushed["files"] == sorted([".gitattributes", *CHECKPOINT, "README.md", "ivideogpt.json", "recipe.yaml"])
    assert pushed["messages"] == ["first", "first model"]  # one commit for all of it
    assert pushed["private"]
    assert len(pushed["large"]) == pushed["count"] == 2
    assert pushed["url"].startswith(report["endpoint"] + "/someone/mine/commit/")
    assert "library_name: ivideogpt" in pushed["card"]
    assert 'from_pretrained("someone/mine")' in pushed["card"]
    assert "Not evaluated" in pushed["card"]


def test_a_pushed_model_comes_back(report: dict[str, Any]) -> None:
    assert report["back"] == {"same": True, "config": True, "extras": True, "recipe": "stages: []\n"}


def test_pushing_again(report: dict[str, Any]) -> None:
    again = report["again"]
    assert again["card"] == "# written by hand"
    assert not again["recipe"]
    assert again["main"] == again["own"] == again["v1"] + 1
    assert again["commit"] == again["v1"]
    assert report["own card"].endswith("# mine")


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("absent", ["'someone/absent'", "has no such repository, or it is private", "hf auth login"]),
        ("typo", ["did you mean 'ivideogpt-oxe-64-act-free'?", "the Hub repository 'ivideogpt-oxe-64-act-fre'"]),
        ("revision", ["'someone/mine' at revision 'v9'", "has the repository, but not revision 'v9'"]),
        ("pickled", ["has no tokenizer/diffusion", "never loaded because they can run any code", "pytorch_model.bin"]),
        ("alias", ["zoo name stands for, the Hub repository 'thuml/ivideogpt-robonet-64-act-cond': "]),
        ("no id", ["'a/b/c'", "is no valid id"]),
        ("secret", ["'other/secret'", "it is private and you are not logged in"]),
        ("offline", ["'thuml/ivideogpt-bair-64-act-free'", "could not be reached (ConnectError", "does not hold it"]),
    ],
)
def test_errors_say_what_was_looked_for_where_and_what_to_do(
    report: dict[str, Any], case: str, parts: list[str]
) -> None:
    error = report["errors"][case]
    assert error is not None
    assert error["kind"] == "ModelNotFoundError"
    for part in [report["endpoint"], *parts]:
        assert part in error["text"]
    if case != "pickled":
        assert "from_pretrained('./FOLDER')" in error["text"]
    if case == "offline":
        assert report["home"] in error["text"]  # the cache


def test_what_is_cached_works_offline(report: dict[str, Any]) -> None:
    assert report["cached"] == 2
