"""Shard sets behind URLs: the same clips as from a folder, few shards at a time, resumable; what a fault does."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivideogpt.data import ShardError, ShardSet, VideoDataModule, file_cache
from ivideogpt.data.mixtures import Mixture
from ivideogpt.data.reader import open_source
from ivideogpt.data.verification import verify_set
from tests.data.file_server import Server, serving
from tests.zoo.hub_server import TOKEN, serve

Sets = Callable[..., Path]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVIDEOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_cache, "_FIRST_WAIT", 0.01)


def shards_asked(server: Server) -> list[str]:
    return [name for name in server.asked if name.endswith(".tar")]


def module_of(train: Any, **options: Any) -> VideoDataModule:
    defaults: dict[str, Any] = {"segment_length": 5, "resolution": 16, "batch_size": 2, "num_workers": 0}
    module = VideoDataModule(train, **(defaults | options))
    module.setup()
    return module


def test_the_same_episodes_as_from_a_folder(make_set: Sets, server: Server) -> None:
    folder = make_set("set", episodes=7, per_shard=3)
    local = ShardSet(folder)
    for url in (f"{server.url}/set", f"{server.url}/set/", f"{server.url}/set/manifest.json"):
        remote = ShardSet(url)
        assert len(remote) == len(local) == 7
    assert shards_asked(server) == []  # nothing but manifest and index yet
    for index in range(7):
        ours, theirs = remote.episode(index), local.episode(index)
        assert ours is not None and theirs is not None
        assert np.array_equal(ours.video, theirs.video) and ours.metadata == theirs.metadata
        assert len(shards_asked(server)) == index // 3 + 1
    assert Counter(server.asked)["manifest.json"] == 3
    assert verify_set(f"{server.url}/set") == []


def test_a_pass_visits_every_episode_once_and_few_shards_at_a_time(make_set: Sets, server: Server) -> None:
    make_set("set", episodes=24, per_shard=2)
    mixture = Mixture({"set": ShardSet(f"{server.url}/set")}, window=3)
    shard = mixture.sets["set"].index["shard"]
    for turn in range(2):
        visits = [mixture.draw(5, position) for position in range(24 * turn, 24 * (turn + 1))]
        assert sorted(visits) == list(range(24))
        for first in range(0, 24, 6):
            assert len({int(shard[episode]) for episode in visits[first : first + 6]}) == 3
        assert visits[:6] != sorted(visits[:6])
    again = Mixture({"set": ShardSet(f"{server.url}/set")}, window=3)
    assert [again.draw(5, position) for position in (30, 3, 47)] == [mixture.draw(5, p) for p in (30, 3, 47)]
    assert [mixture.draw(6, p) for p in range(24)] != [mixture.draw(5, p) for p in range(24)]


def test_sets_near_and_far_take_turns(make_set: Sets, server: Server) -> None:
    make_set("far", episodes=12, per_shard=2)
    near = make_set("near", episodes=6, per_shard=3)
    mixture = Mixture({"near": ShardSet(near), "far": ShardSet(f"{server.url}/far")}, window=2)
    visits = [mixture.draw(0, position) for position in range(36)]
    assert sorted(visits[:18]) == sorted(visits[18:]) == list(range(18))
    for first in range(0, 18, 3):  # each set evenly spread
        assert Counter(mixture.episodes[v][0] for v in visits[first : first + 3]) == {"near": 1, "far": 2}


def test_weights_hold_and_keep_to_the_window(make_set: Sets, server: Server) -> None:
    make_set("far", episodes=20, per_shard=2)
    near = make_set("near", episodes=4)
    sets = {"near": ShardSet(near), "far": ShardSet(f"{server.url}/far")}
    mixture = Mixture(sets, {"near": 1, "far": 3}, window=2)
    visits = [mixture.episodes[mixture.draw(0, position)] for position in range(4000)]
    share = sum(name == "far" for name, _ in visits) / len(visits)
    assert abs(share - 0.75) < 0.03
    drawn = Counter(index for name, index in visits if name == "far")
    assert len(drawn) == 20
    assert max(drawn.values()) < 2 * min(drawn.values())
    shard = sets["far"].index["shard"]
    for first in range(0, 4000, 16):  # 12 of 16 clips: three windows; the first one's are among its first six clips
        inside = {int(shard[index]) for name, index in visits[first : first + 6] if name == "far"}
        assert len(inside) <= 2


def test_clips_do_not_depend_on_workers_and_resume(make_set: Sets, server: Server) -> None:
    make_set("set", episodes=12, per_shard=2)
    url = f"{server.url}/set"
    alone, together = (module_of(url, num_workers=workers, window_shards=2) for workers in (0, 2))
    expected = list(alone.train_dataloader())
    found = list(together.train_dataloader())
    assert [batch["key"] for batch in found] == [batch["key"] for batch in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours["video"], theirs["video"])
    resumed = module_of(url, window_shards=2)
    resumed.load_state_dict({"position": 6, "seed": 0})
    assert [batch["key"] for batch in resumed.train_dataloader()] == [batch["key"] for batch in expected[3:]]
    assert Counter(shards_asked(server)) == {f"episodes-{number:06d}.tar": 1 for number in range(6)}


def test_the_cache_stays_small_and_training_goes_on(make_set: Sets, server: Server, tmp_path: Path) -> None:
    folder = make_set("set", episodes=24, per_shard=2)
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    module = module_of(
        f"{server.url}/set", window_shards=2, cache=str(tmp_path / "small"), cache_gigabytes=5e-9 * largest
    )
    keys: list[str] = []
    for batch in module.train_dataloader():
        keys += batch["key"]
        kept = 0
        for path in (tmp_path / "small" / "files").iterdir():
            with contextlib.suppress(FileNotFoundError):  # what is fetched ahead of time comes and goes
                kept += 0 if path.suffix == ".lock" else path.stat().st_size
        assert kept <= 5 * largest
    assert len(set(keys)) == 24


def test_a_cache_without_room_for_two_windows(make_set: Sets, server: Server) -> None:
    make_set("set", episodes=6, per_shard=2)
    with pytest.raises(ValueError, match=r"two windows of 8 shards .* raise cache_gigabytes or lower window_shards"):
        module_of(f"{server.url}/set", cache_gigabytes=1e-6)
    with pytest.raises(ValueError, match="window_shards must be at least 1, got 0"):
        module_of(f"{server.url}/set", window_shards=0)


@pytest.mark.filterwarnings("ignore:.*asked again")
def test_faults_in_the_middle_of_a_training_do_not_show(make_set: Sets, server: Server) -> None:
    make_set("set", episodes=8, per_shard=2)
    server.faults = {"episodes-000001.tar": ["cut", "500"], "episodes-000003.tar": ["wrong"], "manifest.json": ["503"]}
    batches = list(module_of(f"{server.url}/set").train_dataloader())
    assert sorted(key for batch in batches for key in batch["key"]) == [f"set-{number:03d}" for number in range(8)]


def test_a_shard_that_is_gone_follows_the_policy(make_set: Sets, server: Server) -> None:
    folder = make_set("set", episodes=8, per_shard=2)
    (folder / "episodes-000002.tar").unlink()
    with pytest.raises(ShardError, match=r"episodes-000002\.tar.* is not there"):
        list(module_of(f"{server.url}/set").train_dataloader())
    module = module_of(f"{server.url}/set", policy="skip")
    with pytest.warns(UserWarning, match="skipped"):
        keys = [key for batch in module.train_dataloader() for key in batch["key"]]
    assert len(keys) == 8 and not {"set-004", "set-005"} & set(keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert any("is not there" in fault for fault in verify_set(f"{server.url}/set"))


@pytest.mark.filterwarnings("ignore:.*asked again")
def test_a_damaged_shard_follows_the_policy(make_set: Sets, server: Server) -> None:
    folder = make_set("set", episodes=8, per_shard=2)
    path = folder / "episodes-000002.tar"
    path.write_bytes(path.read_bytes()[:-600] + b"x" + path.read_bytes()[-599:])
    module = module_of(f"{server.url}/set", policy="skip")
    with pytest.warns(UserWarning, match="skipped.*SHA-256"):
        keys = [key for batch in module.train_dataloader() for key in batch["key"]]
    assert len(keys) == 8 and not {"set-004", "set-005"} & set(keys)
    assert 6 <= Counter(shards_asked(server))["episodes-000002.tar"] <= 7  # once more ahead of time; then it is known


@pytest.mark.filterwarnings("ignore:.*asked again")
def test_what_is_in_the_cache_needs_no_server(make_set: Sets, tmp_path: Path) -> None:
    make_set("set", episodes=4, per_shard=2)
    with serving(tmp_path) as server:
        url = f"{server.url}/set"
        expected = [batch["key"] for batch in module_of(url).train_dataloader()]
    with pytest.warns(UserWarning, match="taken as it was when it was opened last"):
        module = module_of(url)
    assert [batch["key"] for batch in module.train_dataloader()] == expected
    with pytest.raises(ShardError, match="asked 6 times"):
        ShardSet(url.replace("/set", "/other"))


def test_packing_what_is_behind_a_url(make_set: Sets, server: Server, tmp_path: Path, run: Any) -> None:
    make_set("set", episodes=4)
    assert run("pack", f"{server.url}/set", "--out", tmp_path / "small", "--resize", "8") == 0
    assert [ShardSet(tmp_path / "small").key(i) for i in range(4)] == [f"set-{i:03d}" for i in range(4)]
    assert run("pack", f"{server.url}/set", "--out", tmp_path / "small", "--resize", "8") == 0  # nothing to do


@pytest.mark.filterwarnings("ignore:.*asked again")
def test_a_server_that_does_not_answer_stops_whatever_the_policy(make_set: Sets, server: Server) -> None:
    make_set("set", episodes=8, per_shard=2)
    module = module_of(f"{server.url}/set", policy="skip")
    server.faults = {f"episodes-{number:06d}.tar": ["500"] * 20 for number in range(4)}
    with pytest.raises(ShardError, match=r"500.*asked 6 times"):
        list(module.train_dataloader())


def test_a_changed_set_is_read_anew(make_set: Sets, server: Server, tmp_path: Path) -> None:
    make_set("set", episodes=4)
    url = f"{server.url}/set"
    assert ShardSet(url).episode(0) is not None
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    make_set("set", episodes=5, action_dim=2)
    changed = ShardSet(url)
    episode = changed.episode(4)
    assert len(changed) == 5 and episode is not None and episode.actions is not None
    assert episode.actions.shape[1] == 2


@pytest.mark.parametrize("name", ["../secret.tar", "a/b.tar", "pipe:x.tar"])
def test_a_manifest_that_leaves_its_folder(make_set: Sets, server: Server, name: str) -> None:
    path = make_set("set") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="not a plain file name"):
        ShardSet(f"{server.url}/set")
    assert shards_asked(server) == []


def test_nothing_there(server: Server) -> None:
    with pytest.raises(ShardError, match=r"the shard set http.*/none cannot be opened: .*manifest\.json is not there"):
        ShardSet(f"{server.url}/none")
    for text in ("simplecache::http://host/set", "pipe:cat x"):
        with pytest.raises(ShardError, match="runs a command"):
            open_source(text)


def test_recordings_of_several_cameras_are_not_fetched_whole(make_set: Sets, server: Server) -> None:
    make_set("set", episodes=4, cameras=("left", "right"))
    with pytest.raises(ValueError, match="has several cameras.* choose a camera, or name sets to validate on"):
        module_of(f"{server.url}/set", holdout_every=2)
    train, val = module_of(f"{server.url}/set", holdout_every=2, camera="left").mixtures()
    assert val is not None and (len(train), len(val)) == (2, 2)
    assert shards_asked(server) == []


S3 = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def test_s3(make_set: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    folder = make_set("set", episodes=6, per_shard=2)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (S3 | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
            monkeypatch.setenv(name, value)
        bucket = fs.S3FileSystem()
        bucket.mkdir("recordings")
        bucket.put(f"{folder}/", "recordings/arm/", recursive=True)
        assert len(ShardSet("s3://recordings/arm")) == 6
        keys = [key for batch in module_of("s3://recordings/arm").train_dataloader() for key in batch["key"]]
        assert sorted(keys) == [f"set-{number:03d}" for number in range(6)]
        assert verify_set("s3://recordings/arm") == []
        with pytest.raises(ShardError, match=r"s3://recordings/none/manifest\.json is not there"):
            ShardSet("s3://recordings/none")
    finally:
        server.stop()


HUB = """
import sys, warnings
warnings.simplefilter("error")
from ivideogpt.data import ShardSet
from ivideogpt.data.verification import verify_set
url = sys.argv[1]
shards = ShardSet(url)
print([shards.key(i) for i in range(len(shards)) if shards.episode(i) is not None], verify_set(url))
"""


def test_the_hub(make_set: Sets, tmp_path: Path) -> None:
    files = {f"train/{path.name}": path.read_bytes() for path in make_set("set", episodes=3, per_shard=2).iterdir()}
    with serve() as hub:
        hub.add("someone/arm", files, private=True)
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        variables |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}

        def reads(url: str, **more: str) -> subprocess.CompletedProcess[str]:
            words = [sys.executable, "-c", HUB, url]
            environment = os.environ | variables | more
            return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)

        done = reads("hf://datasets/someone/arm/train")
        assert done.stdout == "['set-000', 'set-001', 'set-002'] []\n", done.stderr
        for url, token in (("hf://datasets/someone/none", TOKEN), ("hf://datasets/someone/arm/train", "hf_wrong")):
            refused = reads(url, HF_TOKEN=token)
            assert refused.returncode == 1
            assert "cannot be opened" in refused.stderr and url in refused.stderr.splitlines()[-1]


def test_packing_several_cameras_behind_a_url(make_set: Sets, server: Server, tmp_path: Path, run: Any) -> None:
    make_set("set", episodes=4, cameras=("left", "right"))
    assert run("pack", f"{server.url}/set", "--out", tmp_path / "split", "--holdout", "0.25") == 0
    held = ShardSet(tmp_path / "split" / "heldout")
    assert len({held.key(i).rpartition("-")[0] for i in range(len(held))}) == 1 and len(held) == 2


def test_data_that_moved_are_the_same_data(make_set: Sets, server: Server) -> None:
    folder, other = make_set("set", episodes=4), make_set("other", episodes=4)
    near = module_of({str(folder): 1.0, str(other): 2.0}).clips_digest()
    moved = folder.rename(folder.with_name("moved"))
    assert module_of({str(moved): 1.0, str(other): 2.0}).clips_digest() == near
    assert module_of({str(moved): 2.0, str(other): 2.0}).clips_digest() != near
