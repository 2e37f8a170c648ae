"""Fetching weights with the real Hub client from a loopback Hub: checked, found again without it, refused if wrong."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ivideogpt.metrics.networks import WEIGHT_FILES, RandomFeatures
from tests.zoo.hub_client import ClientError, HubClient
from tests.zoo.hub_server import Hub, serve

PUBLISHED = WEIGHT_FILES["i3d"][0]
FETCH = """
from ivideogpt.metrics.networks import fetch_weights
result = str(fetch_weights("i3d").path)
"""
FIND = """
from ivideogpt.metrics.networks import find_feature_network
network = find_feature_network("i3d")
result = [network.label, network.num_features, list(network(torch.zeros(2, 4, 3, 8, 8)).shape)]
"""
EXPECT = """
import dataclasses
from ivideogpt.metrics.networks import WEIGHT_FILES
WEIGHT_FILES["i3d"] = (dataclasses.replace(WEIGHT_FILES["i3d"][0], **changes),)
"""


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A network with the call convention of the published one."""
    path = tmp_path_factory.mktemp("network") / "network.pt"
    with warnings.catch_warnings():  # TorchScript is deprecated
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(RandomFeatures(400, seed=1)), str(path))
    return path.read_bytes()


@pytest.fixture(scope="module")
def hub(content: bytes) -> Iterator[tuple[Hub, str]]:
    """A Hub with that network under the published name, and the revision."""
    assert PUBLISHED.repo_id is not None
    with serve() as running:
        (revision,) = running.add(PUBLISHED.repo_id, {PUBLISHED.file: content}).commits
        yield running, revision


@pytest.fixture
def client(hub: tuple[Hub, str], tmp_path: Path) -> Iterator[HubClient]:
    home = tmp_path / "home"
    started = HubClient(hub[0].endpoint, home, TORCH_HOME=str(home), IVIDEOGPT_NETWORKS="")
    yield started
    started.close()


def failure(client: HubClient, code: str) -> tuple[str, str]:
    with pytest.raises(ClientError) as caught:
        client.run(code)
    return caught.value.kind, str(caught.value)


def test_what_was_fetched_is_found_again_without_the_hub(
    hub: tuple[Hub, str], client: HubClient, content: bytes
) -> None:
    changes: dict[str, Any] = {"revision": hub[1], "sha256": hashlib.sha256(content).hexdigest()}
    client.run(EXPECT, changes=changes)
    assert client.run(FETCH).endswith("i3d_torchscript.pt")
    asked = len(hub[0].requests)
    assert client.run(FIND) == ["FVD", 400, [2, 400]]
    assert len(hub[0].requests) == asked > 0


def test_another_file_under_the_published_name_is_refused(
    hub: tuple[Hub, str], client: HubClient, content: bytes
) -> None:
    client.run(EXPECT, changes={"revision": hub[1]})
    for code in (FETCH, FIND):
        kind, text = failure(client, code)
        assert kind == "ValueError"
        assert f"its SHA-256 is {hashlib.sha256(content).hexdigest()}, expected bec6519f" in text


def test_what_is_not_there_is_one_error_that_says_how_to_get_it(hub: tuple[Hub, str], client: HubClient) -> None:
    client.run(EXPECT, changes={"revision": "0" * 40, "file": "other.pt"})
    kind, text = failure(client, FETCH)
    assert kind == "OSError"
    assert "FVD needs the weights other.pt" in text and "cannot be fetched now" in text
