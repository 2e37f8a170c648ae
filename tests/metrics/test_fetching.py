"""Fetching weights with the real Hub client from a loopback server: checked, found again without it, refused if wrong.

The client reads ``HF_ENDPOINT`` when it is imported, so one script in a process of its own does it all.
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
import dataclasses, hashlib, io, json, os, sys, warnings

sys.path.insert(0, sys.argv[1])
from hub_server import serve

def error_of(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]

report = {}
with serve() as hub:
    os.environ |= {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": sys.argv[2], "TORCH_HOME": sys.argv[2], "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    import torch
    from ivideogpt.metrics import networks
    from ivideogpt.metrics.networks import WEIGHT_FILES, find_feature_network

    published = WEIGHT_FILES["i3d"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(networks.RandomFeatures(400, seed=1)), buffer)
    content = buffer.getvalue()
    repository = hub.add(published.repo_id, {published.file: content})
    revision, = repository.commits
    small = dataclasses.replace(published, revision=revision)
    WEIGHT_FILES["i3d"] = (small,)
    report["wrong"] = error_of(lambda: networks.fetch_weights("i3d"))
    report["still wrong"] = error_of(lambda: find_feature_network("i3d"))
    report["sha256"] = hashlib.sha256(content).hexdigest()

    WEIGHT_FILES["i3d"] = (dataclasses.replace(small, sha256=report["sha256"]),)
    report["fetched"] = str(networks.fetch_weights("i3d").path)
    count = len(hub.requests)
    network = find_feature_network("i3d")
    report["label"], report["features"] = network.label, network.num_features
    video = torch.zeros(2, 4, 3, 8, 8)
    report["shape"] = list(network(video).shape)
    report["asked again"] = len(hub.requests) - count

    WEIGHT_FILES["i3d"] = (dataclasses.replace(small, revision="0" * 40, file="other.pt"),)
    report["absent"] = error_of(lambda: networks.fetch_weights("i3d"))
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    server = Path(__file__).parents[1] / "zoo"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "IVIDEOGPT_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(server), str(home)], capture_output=True, text=True, env=environment,
        timeout=200,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_what_was_fetched_is_found_again_without_the_hub(report: dict[str, Any]) -> None:
    assert report["fetched"].endswith("i3d_torchscript.pt")
    assert report["asked again"] == 0
    assert (report["label"], report["features"], report["shape"]) == ("FVD", 400, [2, 400])


def test_another_file_under_the_published_name_is_refused(report: dict[str, Any]) -> None:
    for kind, text in (report["wrong"], report["still wrong"]):
        assert kind == "ValueError"
        assert f"its SHA-256 is {report['sha256']}, expected bec6519f" in text


def test_what_is_not_there_is_one_error_that_says_how_to_get_it(report: dict[str, Any]) -> None:
    kind, text = report["absent"]
    assert kind == "OSError"
    assert "FVD needs the weights other.pt" in text and "cannot be fetched now" in text
