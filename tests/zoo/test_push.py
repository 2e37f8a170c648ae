"""Publishing on a Hub: the real client, in a process of its own, against a loopback server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from ivideogpt.zoo.push import Evidence, parts_hash, prepare
from ivideogpt.zoo.registry import cards_folder
from tests.zoo.conftest import files_of
from tests.zoo.hub_client import ClientError, HubClient
from tests.zoo.hub_server import READ_TOKEN, TOKEN, Fault, Hub

SAVED = [
    "ivideogpt.json", "recipe.yaml", "tokenizer/config.json", "tokenizer/diffusion_pytorch_model.safetensors",
    "transformer/config.json", "transformer/model.safetensors",
]  # fmt: skip
LARGE = [name for name in SAVED if name.endswith(".safetensors")]
PUSH = """
wm = ivideogpt.from_pretrained("./" + folder if not folder.startswith("/") else folder)
done = wm.push_to_hub(repo_id, **options)
result = {"url": done.url, "commit": done.commit, "changed": done.changed, "files": done.files}
"""
RESULTS = cards_folder() / "results" / "ivideogpt-metaworld-nano.json"
COMMAND = "from ivideogpt.cli import main\nresult = main(words)"


@pytest.fixture
def model(tiny_world_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A saved model with a recipe and everything that a side file can hold."""
    model = tiny_world_model(action_dim=3)
    model.extras |= {
        "base_model": "ivideogpt-oxe", "recipe": "mine", "training": {"updates": 7, "seed": 0},
        "action_mean": [0.0] * 3, "action_std": [2.0] * 3,
    }  # fmt: skip
    model.published.recipe = "name: mine\nseed: 0\nstages: {}\n"
    return model.save_pretrained(tmp_path / "model")


def push(client: HubClient, folder: Path, repo_id: str = "someone/mine", **options: Any) -> dict[str, Any]:
    return client.run(PUSH, folder=folder, repo_id=repo_id, options=options)


def test_a_push_holds_everything_and_comes_back(hub: Hub, client: HubClient, model: Path) -> None:
    done = push(client, model, commit_message="first model")
    repository = hub.repositories["someone/mine"]
    assert sorted(repository.main) == sorted([".gitattributes", "README.md", *SAVED])
    assert repository.messages == ["first", "first model"]  # one commit for all of it
    assert done["changed"]
    assert done["commit"] == repository.branches["main"]
    assert done["url"] == f"{hub.endpoint}/someone/mine/commit/{done['commit']}"
    assert len([r for r in hub.requests if r.startswith("PUT")]) == len(hub.large_files) == 2
    assert {name: len(data) for name, data in repository.main.items() if name != ".gitattributes"} == done["files"]
    code = """
    a, b = ivideogpt.from_pretrained(folder), ivideogpt.from_pretrained("someone/mine")
    same = all(torch.equal(t, b.state_dict()[k]) for k, t in a.state_dict().items())
    result = [same, a.config == b.config, a.extras == b.extras, a.published.recipe == b.published.recipe]
    """
    assert client.run(code, folder=model) == [True] * 4


def test_the_card_links_the_base_model_and_the_data(hub: Hub, client: HubClient, model: Path) -> None:
    words = ["push", str(model), "someone/mine", "--dataset", "someone/recordings", "--licence", "apache-2.0"]
    assert client.run(COMMAND, words=words) == 0
    text = hub.repositories["someone/mine"].main["README.md"].decode()
    data: Any = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("thuml/ivideogpt-oxe-64-act-free", "finetune")
    assert data.datasets == ["someone/recordings"]
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "ivideogpt", "robotics")
    assert 'from_pretrained("someone/mine")' in text
    assert "Not evaluated by this project" in text
    assert "`lightning run someone/mine` runs it" in text


def test_the_embedded_model_goes_with_its_own_card(hub: Hub, client: HubClient) -> None:
    assert client.run(COMMAND, words=["push", "ivideogpt-metaworld-nano", "someone/nano"]) == 0
    files = hub.repositories["someone/nano"].main
    assert {"rollout.gif", "recipe.yaml", "results/ivideogpt-metaworld-nano.json"} < set(files)
    text = files["README.md"].decode()
    assert 'from_pretrained("someone/nano")' in text
    assert "](rollout.gif)" in text
    assert "Measured by this project" in text
    assert client.run(COMMAND, words=["push", "ivideogpt-metaworld-nano", "someone/nano"]) == 0
    assert "nothing was changed" in client.printed


def test_the_same_push_again_changes_nothing(hub: Hub, client: HubClient, model: Path) -> None:
    first = push(client, model)
    count = len(hub.requests)
    second = push(client, model)
    assert second == {**first, "changed": False}
    assert not [r for r in hub.requests[count:] if r.startswith("PUT") or "/commit/" in r]
    assert client.run(COMMAND, words=["push", str(model), "someone/mine"]) == 0
    assert "holds all of it already; nothing was changed" in client.printed


def test_only_what_changed_is_sent_and_what_is_gone_goes(hub: Hub, client: HubClient, model: Path) -> None:
    push(client, model)
    repository = hub.repositories["someone/mine"]
    repository.commit({**repository.main, "NOTES.txt": b"by hand", "results/old.json": b"{}"}, "main", "by hand")
    change = """
    wm = ivideogpt.from_pretrained(folder)
    wm.transformer.norm.weight.data += 1
    wm.published.recipe = None
    wm.push_to_hub("someone/mine")
    """
    count = len(hub.requests)
    client.run(change, folder=model)
    assert len([r for r in hub.requests[count:] if r.startswith("PUT")]) == 1  # not the tokenizer
    assert "recipe.yaml" not in repository.main
    assert "results/old.json" not in repository.main
    assert repository.main["NOTES.txt"] == b"by hand"
    assert b"Recipe: not recorded" in repository.main["README.md"]


def test_a_card_that_was_written_by_hand_stays(hub: Hub, client: HubClient, model: Path) -> None:
    push(client, model)
    repository = hub.repositories["someone/mine"]
    by_hand = b"---\nlicense: mit\n---\n# written by hand\n"
    repository.commit({**repository.main, "README.md": by_hand}, "main", "card by hand")
    assert not push(client, model)["changed"]
    assert repository.main["README.md"] == by_hand
    push(client, model, card="---\nlicense: mit\n---\n# mine\n")
    assert repository.main["README.md"].endswith(b"# mine\n")


def test_branches_and_tags(hub: Hub, client: HubClient, model: Path) -> None:
    first = push(client, model, tag="v1")
    repository = hub.repositories["someone/mine"]
    assert repository.tags == {"v1": first["commit"]}
    assert not push(client, model, tag="v1")["changed"]  # the same tag on the same commit
    other = "wm = ivideogpt.from_pretrained(folder)\nwm.transformer.norm.weight.data += 1\nwm.save_pretrained(folder)"
    client.run(other, folder=model)
    trial = push(client, model, revision="trial", tag="v2")
    assert repository.branches == {"main": first["commit"], "trial": trial["commit"]}
    assert repository.tags == {"v1": first["commit"], "v2": trial["commit"]}
    read = "result = ivideogpt.from_pretrained('someone/mine', revision=at).transformer.norm.weight[0].item()"
    assert [client.run(read, at=at) for at in ("main", "v1", "trial", "v2")] == [1.0, 1.0, 2.0, 2.0]
    with pytest.raises(ClientError, match="the tag 'v1' of someone/mine is an earlier commit.*choose another name"):
        push(client, model, revision="trial", tag="v1")


def test_private_and_public(hub: Hub, client: HubClient, model: Path) -> None:
    push(client, model, private=True)
    assert hub.repositories["someone/mine"].private
    push(client, model, "someone/public")
    with pytest.raises(ClientError, match="someone/public exists and is public; make it private on the Hub first"):
        push(client, model, "someone/public", private=True)
    assert len(hub.repositories["someone/public"].messages) == 2


def test_a_dry_run_asks_nobody(hub: Hub, client: HubClient, model: Path) -> None:
    assert client.run(COMMAND, words=["push", str(model), "someone/mine", "--dry-run", "--private"]) == 0
    assert hub.requests == []
    assert [line.split()[1] for line in client.printed.splitlines()[:-1]] == sorted([*SAVED, "README.md"])
    assert client.printed.splitlines()[-1].endswith("bytes would go to someone/mine; nothing was uploaded")
    with pytest.raises(ClientError, match="a repository is USER/NAME, got 'mine'"):
        push(client, model, "mine", dry_run=True)


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrongwrongwrong", "someone/mine", "does not know who you are: log in with `hf auth login`"),
        (None, "someone/mine", "log in with `hf auth login`"),
        (READ_TOKEN, "someone/mine", "your token may not write there"),
        (TOKEN, "somebody-else/mine", "your token may not write there"),
    ],
)
def test_who_may_not_push_is_told_why(
    token: str | None, repo_id: str, message: str, hub: Hub, new_client: Callable[..., HubClient], model: Path
) -> None:
    with pytest.raises(ClientError, match=message) as caught:
        push(new_client(token=token), model, repo_id)
    assert caught.value.kind == "PushError"
    assert hub.repositories == {}


# faults


def old_and_changed(client: HubClient, hub: Hub, model: Path) -> dict[str, bytes]:
    """Pushes a model, changes both of its weight files on this disk, and gives what the Hub holds."""
    push(client, model)
    code = """
    wm = ivideogpt.from_pretrained(folder)
    for part in (wm.transformer, wm.tokenizer):
        for parameter in part.parameters():
            parameter.data += 1
    wm.save_pretrained(folder)
    """
    client.run(code, folder=model)
    return dict(hub.repositories["someone/mine"].main)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("request_", ["POST /api/repos", "GET /api/models", "/preupload/", "PUT /lfs", "/commit/"])
def test_a_busy_hub_is_asked_again(status: int, request_: str, hub: Hub, client: HubClient, model: Path) -> None:
    hub.faults.append(Fault(request_, status=status, retry_after=0 if status == 429 else None))
    push(client, model)
    assert hub.faults[0].times == 0
    assert set(SAVED) <= set(hub.repositories["someone/mine"].main)


def test_a_hub_that_stays_in_trouble_is_told_of(hub: Hub, client: HubClient, model: Path) -> None:
    old = old_and_changed(client, hub, model)
    hub.faults.append(Fault("POST .*/commit/", times=99, status=429, retry_after=600))
    with pytest.raises(ClientError, match=r"asked it too often.*goes on from where it stopped \(status 429") as caught:
        push(client, model)
    assert caught.value.kind == "PushError"
    assert hub.repositories["someone/mine"].main == old
    hub.faults.clear()
    count = len(hub.requests)
    push(client, model)
    assert not [r for r in hub.requests[count:] if r.startswith("PUT")]  # the large files had arrived
    assert hub.repositories["someone/mine"].main != old


def test_an_upload_that_is_cut_once_goes_through(hub: Hub, client: HubClient, model: Path) -> None:
    hub.faults.append(Fault("PUT /lfs", cut_after=1000))
    push(client, model)
    assert hub.faults[0].times == 0
    sent = files_of(model)
    assert {name: hub.repositories["someone/mine"].main[name] for name in LARGE} == {name: sent[name] for name in LARGE}


def test_a_push_that_was_killed_goes_on(hub: Hub, new_client: Callable[..., HubClient], model: Path) -> None:
    """Killed while one of two large files had arrived and the other was on its way."""
    first = new_client()
    old = old_and_changed(first, hub, model)
    arrived = len(hub.large_files)
    stuck = Fault("PUT /lfs/", wait=threading.Event())
    hub.faults.append(stuck)
    first.send(PUSH, folder=str(model), repo_id="someone/mine", options={})
    assert stuck.wait is not None
    assert stuck.wait.wait(60)
    for _ in range(600):
        if len(hub.large_files) == arrived + 1:  # the other of the two
            break
        threading.Event().wait(0.1)
    assert len(hub.large_files) == arrived + 1
    first.process.kill()
    first.process.wait()
    stuck.go_on.set()
    repository = hub.repositories["someone/mine"]
    assert repository.main == old  # nothing half-written
    second = new_client()
    read = "result = ivideogpt.from_pretrained('someone/mine').transformer.norm.weight[0].item()"
    assert second.run(read) == 1.0
    count = len(hub.requests)
    push(second, model)
    assert len([r for r in hub.requests[count:] if r.startswith("PUT")]) == 1
    assert repository.main != old
    assert second.run(read) == 2.0


@pytest.mark.slow
def test_a_connection_that_keeps_breaking_is_told_of(hub: Hub, client: HubClient, model: Path) -> None:
    old = old_and_changed(client, hub, model)
    hub.faults.append(Fault("PUT /lfs", times=99, cut_after=1000))
    with pytest.raises(ClientError, match="the connection to .* broke while someone/mine was uploaded") as caught:
        push(client, model)
    assert caught.value.kind == "PushError"
    assert hub.repositories["someone/mine"].main == old


# what stays here


def test_nothing_private_arrives(hub: Hub, client: HubClient, tmp_path: Path, tiny_world_model: Any) -> None:
    """A run's folder as full of private things as one can be; every byte that the server got is searched."""
    home = "/home/jane doe/robots"
    wm = tiny_world_model(action_dim=3)
    wm.extras |= {"notes": {"log": f"{home}/log.txt", "by": "see ~/notes/today.md"}, "base_model": f"{home}/base"}
    wm.published.recipe = (
        f"name: mine\noutput: {home}/out\nstages:\n  t:\n    data:\n      init_args:\n        train: {home}/shards\n"
        f"        val: ['../../held out/set', '{tmp_path}/x']\n    trainer: {{default: 'file://{home}/y'}}\n"
    )
    model = wm.save_pretrained(tmp_path / "run" / "model")
    config = json.loads((model / "transformer/config.json").read_text())
    (model / "transformer/config.json").write_text(json.dumps({**config, "_name_or_path": f"{home}/secret-project"}))
    for name in ("checkpoints/last.ckpt", "optimizer.pt", "events.out.tfevents.1", "metrics.csv", "token", ".env"):
        for folder in (tmp_path / "run", model, model / "transformer"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"PRIVATE MATTER {TOKEN}")
    evaluated = json.loads(RESULTS.read_text())
    evaluated["hashes"]["model"] = parts_hash(wm.parts)
    evaluated["command"] = f"ivideogpt evaluate --model '{home}/out' --data={tmp_path}/shards"
    (tmp_path / "results.json").write_text(json.dumps(evaluated))
    words = ["push", str(tmp_path / "run"), "someone/mine", "--results", str(tmp_path / "results.json")]
    assert client.run(COMMAND, words=words) == 0
    arrived = b"\n".join([*hub.received, *(data for repo in hub.repositories.values() for data in repo.main.values())])
    for private in (
        b"jane",
        b"/home",
        str(tmp_path).encode(),
        b"PRIVATE MATTER",
        TOKEN.encode(),
        b"../held",
        b"~/notes",
    ):
        assert private not in arrived, private
    names = set(hub.repositories["someone/mine"].main)
    assert names == {".gitattributes", "README.md", "results/results.json", *SAVED}
    recipe = hub.repositories["someone/mine"].main["recipe.yaml"].decode()
    assert re.findall(r"train: (.*)", recipe) == ["shards"]
    assert "output" not in recipe
    kept = json.loads(hub.repositories["someone/mine"].main["ivideogpt.json"])
    assert kept["notes"] == {"log": "log.txt", "by": "see today.md"}


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("hf_abcdefghijklmnopqrstuvwxyz", "a Hugging Face token"),
        ("https://jane:hunter22@host/x", "a password in a URL"),
        ("AKIAABCDEFGHIJKLMNOP", "an AWS key"),
        ("api_key: abcdef123456", "a password or key"),
    ],
)
def test_a_secret_stops_the_push(secret: str, kind: str, hub: Hub, client: HubClient, model: Path) -> None:
    (model / "recipe.yaml").write_text(f"name: mine\nstages: {{}}\ndescription: |\n  {secret}\n")
    with pytest.raises(ClientError, match=rf"recipe.yaml, line \d, holds {kind}; take it out") as caught:
        push(client, model)
    assert secret not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema_version": 9, "tasks": {}, "overall": {}}, "results of schema 9; cards are made of schema 2"),
        ({"schema_version": 1, "tasks": {}, "overall": {}}, "results of schema 1; .* Measure again"),
        ({"schema_version": 2, "tasks": {}}, "is no results file of `ivideogpt evaluate`"),
    ],
)
def test_results_that_no_card_can_show(
    content: dict[str, Any], message: str, hub: Hub, client: HubClient, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.json").write_text(json.dumps(content))
    words = ["push", str(model), "someone/mine", "--results", str(tmp_path / "other.json"), "--debug"]
    with pytest.raises(ClientError, match=message):
        client.run(COMMAND, words=words)
    assert hub.requests == []


def test_a_recipe_that_climbs_publishes_nothing_from_elsewhere(
    hub: Hub, client: HubClient, model: Path, tmp_path: Path
) -> None:
    """Stage names of somebody else's recipe must not reach files outside of the folder that is published."""
    (tmp_path / "results.json").write_text('{"private": 1}')
    (model / "recipe.yaml").write_text("name: mine\nstages: {'..': {}, '../..': {}, '/tmp': {}}\n")
    push_it = [str(model), "someone/mine"]
    assert client.run(COMMAND, words=["push", *push_it]) == 0
    assert not [name for name in hub.repositories["someone/mine"].main if name.startswith("results")]
    (model / "recipe.yaml").write_text("stages: [\n")
    with pytest.raises(ClientError, match="recipe.yaml is not valid YAML"):
        client.run(COMMAND, words=["push", *push_it, "--debug"])


def test_weights_that_are_no_numbers_are_not_published(tiny_world_model: Callable[..., Any], tmp_path: Path) -> None:
    wm = tiny_world_model(action_dim=3)
    with torch.no_grad():
        wm.transformer.norm.weight[2] = torch.nan
    with pytest.raises(ValueError, match=r"transformer\.norm\.weight holds NaN or infinite weights"):
        prepare(tmp_path, wm.parts, "someone/mine", Evidence())
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_or_no_gif_is_refused(hub: Hub, client: HubClient, model: Path, tmp_path: Path) -> None:
    (tmp_path / "page.gif").write_text("<script>")
    for words, message in (
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(model / "tokenizer")], "holds no world model, neither itself nor in"),
        ([str(model), "--gif", str(tmp_path / "page.gif")], "page.gif is no GIF"),
    ):
        with pytest.raises(ClientError, match=message):
            client.run(COMMAND, words=["push", words[0], "someone/mine", *words[1:], "--debug"])
    assert hub.requests == []
