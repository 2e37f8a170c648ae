"""A Hub in trouble while a model is fetched: busy, broken, cut off; nothing half-written is ever loaded."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ivideogpt.world_model import WorldModel
from tests.zoo.conftest import files_of
from tests.zoo.hub_client import ClientError, HubClient
from tests.zoo.hub_server import Fault, Hub

LOAD = "result = ivideogpt.from_pretrained(name).transformer.norm.weight[0].item()"
WEIGHTS = "transformer/model.safetensors"


NUMBERS = itertools.count()


@pytest.fixture
def repository(hub: Hub, published: dict[str, bytes]) -> str:
    """Name of a repository that no test has fetched yet."""
    name = f"someone/model-{next(NUMBERS)}"
    hub.add(name, {**published, "README.md": b"# a card"})
    return name


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(
    "request_", ["GET /api/models", "(GET|HEAD) .*/transformer/config.json", f"(GET|HEAD) .*/{WEIGHTS}"]
)
def test_a_busy_hub_is_asked_again(status: int, request_: str, hub: Hub, client: HubClient, repository: str) -> None:
    hub.faults.append(Fault(request_, status=status, retry_after=1 if status == 429 else None))
    assert client.run(LOAD, name=repository) == 1.0
    assert hub.faults[0].times == 0


@pytest.mark.parametrize(
    ("status", "message"),
    [(429, r"is asked too often \(status 429\); try again later"), (500, r"is in trouble \(status 500\)")],
)
def test_a_hub_that_stays_in_trouble_is_told_of(
    status: int, message: str, hub: Hub, client: HubClient, repository: str
) -> None:
    hub.faults.append(Fault("/api/models", times=99, status=status, retry_after=600 if status == 429 else None))
    with pytest.raises(ClientError, match=message) as caught:
        client.run(LOAD, name=repository)
    assert caught.value.kind == "ModelNotFoundError"


def test_what_is_cached_needs_no_healthy_hub(hub: Hub, client: HubClient, repository: str) -> None:
    assert client.run(LOAD, name=repository) == 1.0
    hub.faults.append(Fault("/api/models", times=99, status=500))
    assert client.run(LOAD, name=repository) == 1.0


def whole_files(home: Path, published: dict[str, bytes]) -> list[str]:
    """Files of the checkpoint that a cache gives out, every one of which must be whole."""
    found = []
    for path in home.rglob("snapshots/*/**/*"):
        name = "/".join(path.parts[path.parts.index("snapshots") + 2 :])
        if path.is_file() and name in published:
            assert path.read_bytes() == published[name], name
            found.append(name)
    return sorted(found)


def test_a_download_that_is_cut_goes_on_where_it_stopped(
    hub: Hub, new_client: Callable[..., HubClient], tmp_path: Path
) -> None:
    """With the embedded model in float32: the client keeps what arrived in pieces of 10 MB."""
    wide = WorldModel.from_pretrained("ivideogpt-metaworld-nano").save_pretrained(tmp_path / "wide", dtype="float32")
    nano = files_of(wide)
    size, cut = len(nano[WEIGHTS]), 15_000_000
    assert size > cut
    hub.add("someone/nano", nano)
    # the header is looked at by two requests; the third is the download
    hub.faults[:] = [Fault(f"GET .*/{WEIGHTS}", times=2), Fault(f"GET .*/{WEIGHTS}", cut_after=cut)]
    client = new_client()
    client.run("result = ivideogpt.from_pretrained(name).transformer.norm.weight[0].item()", name="someone/nano")
    assert [fault.times for fault in hub.faults] == [0, 0]
    assert cut < hub.sent[WEIGHTS] < size + 5_100_000  # 5 MB of the first part were thrown away, and the header
    assert WEIGHTS in whole_files(client.home, nano)


def test_a_download_that_was_killed_leaves_nothing_that_loads(
    hub: Hub, new_client: Callable[..., HubClient], repository: str, published: dict[str, bytes], tmp_path: Path
) -> None:
    stuck = Fault(f"GET .*/{WEIGHTS}", wait=threading.Event())
    hub.faults[:] = [Fault(f"GET .*/{WEIGHTS}", times=2), stuck]
    first = new_client(home=tmp_path / "home")
    first.send(LOAD, name=repository)
    assert stuck.wait is not None
    assert stuck.wait.wait(60)
    first.process.kill()
    first.process.wait()
    stuck.go_on.set()
    assert WEIGHTS not in whole_files(tmp_path / "home", published)
    offline = new_client(home=tmp_path / "home", HF_HUB_OFFLINE="1")
    with pytest.raises(ClientError, match=f"no world model {repository!r}") as caught:
        offline.run(LOAD, name=repository)
    assert caught.value.kind == "ModelNotFoundError"
    assert new_client(home=tmp_path / "home").run(LOAD, name=repository) == 1.0


@pytest.mark.parametrize("file", [pytest.param(WEIGHTS, marks=pytest.mark.slow), "transformer/config.json"])
def test_a_connection_that_keeps_breaking_leaves_nothing_that_loads(
    file: str, hub: Hub, new_client: Callable[..., HubClient], repository: str, published: dict[str, bytes]
) -> None:
    """The server always sends the same first bytes and cuts, whatever is asked for."""
    hub.faults[:] = [
        Fault(f"GET .*/{file}", times=2 if file == WEIGHTS else 0),
        Fault(f"GET .*/{file}", 999, cut_after=0),
    ]
    client = new_client()
    with pytest.raises(ClientError, match=f"no world model {repository!r}"):
        client.run(LOAD, name=repository)
    assert file not in whole_files(client.home, published)
    hub.faults.clear()
    assert client.run(LOAD, name=repository) == 1.0
