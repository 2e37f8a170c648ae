"""Fixtures of the zoo's tests: a tiny checkpoint on disk, ways to damage it, a loopback Hub and clients of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # the folder that holds `tests`, whose modules import each other
    sys.path.insert(0, str(ROOT))

from tests.zoo.hub_client import HubClient  # noqa: E402
from tests.zoo.hub_server import Hub, serve  # noqa: E402

TOKENIZER = Path("tokenizer/diffusion_pytorch_model.safetensors")
TRANSFORMER = Path("transformer/model.safetensors")


class Checkpoint:
    """A checkpoint folder whose files can be edited in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def edit_config(self, part: str, remove: str | None = None, **changes: Any) -> dict[str, Any]:
        """Changes fields of ``part``'s configuration; returns what is then in the file."""
        path = self.folder / part / "config.json"
        fields = json.loads(path.read_text()) | changes
        if remove is not None:
            del fields[remove]
        path.write_text(json.dumps(fields))
        return fields

    def edit_tensors(self, file: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
        """Has ``edit`` change the tensors of ``file``."""
        tensors = load_file(self.folder / file)
        edit(tensors)
        save_file(tensors, self.folder / file, metadata={"format": "pt"})

    def tensors(self, file: Path) -> dict[str, Tensor]:
        return load_file(self.folder / file)

    def config(self, part: str) -> dict[str, Any]:
        return json.loads((self.folder / part / "config.json").read_text())


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_world_model: Callable[..., Any]) -> Callable[..., Checkpoint]:
    """``checkpoint(action_dim=None, reward=False, ...)`` saves a tiny random world model."""

    def save(action_dim: int | None = None, reward: bool = False, **arguments: Any) -> Checkpoint:
        model = tiny_world_model(action_dim, reward, **{"max_attention_resolution": 8, **arguments})
        return Checkpoint(model.save_pretrained(tmp_path / "checkpoint"))

    return save


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of all files below ``folder``, by their path in it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_world_model: Callable[..., Any]) -> dict[str, bytes]:
    """Files of a tiny random checkpoint as the authors published theirs: the four of the layout, nothing of ours."""
    folder = tiny_world_model().save_pretrained(tmp_path_factory.mktemp("published"))
    return {name: data for name, data in files_of(folder).items() if name != "ivideogpt.json"}


@pytest.fixture(scope="module")
def _running_hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def hub(_running_hub: Hub) -> Iterator[Hub]:
    """A loopback Hub, empty and without faults."""
    for part in (_running_hub.repositories, _running_hub.large_files, _running_hub.sent):
        part.clear()
    for log in (_running_hub.requests, _running_hub.faults, _running_hub.received):
        log.clear()
    yield _running_hub
    for fault in _running_hub.faults:
        fault.go_on.set()


@pytest.fixture(scope="module")
def client(_running_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    """A process with the real client, logged in."""
    started = HubClient(_running_hub.endpoint, tmp_path_factory.mktemp("client"))
    yield started
    started.close()


@pytest.fixture
def new_client(_running_hub: Hub, tmp_path: Path) -> Iterator[Callable[..., HubClient]]:
    """``new_client(token=...)`` starts another process, with a cache of its own."""
    started: list[HubClient] = []

    def start(**options: Any) -> HubClient:
        home = options.pop("home", tmp_path / f"home-{len(started)}")
        started.append(HubClient(_running_hub.endpoint, home, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()
