"""Token sets: what `ivideogpt data tokenize` writes, refuses, survives; read by others' code too."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ivideogpt
from ivideogpt import cli
from ivideogpt.data import Episode, ShardError, ShardSet, ShardSetWriter, TokenSet
from ivideogpt.data.tokenized import verify_token_set
from ivideogpt.data.tokenized_plan import ClipPlan, PlanSettings
from ivideogpt.recipes.results import save_tokenizer
from ivideogpt.training.tokenization import tokenize_clips
from ivideogpt.zoo.fingerprint import tokenizer_hash

NANO = "ivideogpt-metaworld-nano"


@pytest.fixture
def model(tiny_world_model) -> Any:
    return tiny_world_model(action_dim=3, reward=True)


def frames_of(source: str | Path, key: str, indices: list[int]) -> torch.Tensor:
    """Frames (1, T, C, H, W) of an episode in [0, 1]."""
    sets = ShardSet(source)
    episode = sets.episode([sets.key(i) for i in range(len(sets))].index(key))
    assert episode is not None
    return torch.from_numpy(episode.video[indices]).permute(0, 3, 1, 2)[None].float() / 255


def test_nano_round_trip_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens, actions and rewards are those of the recordings; the command without --device is float32 on a CPU."""
    out = tmp_path / "tokens"
    words = ["data", "tokenize", "embedded:heldout", "--model", NANO, "--out", str(out), "--segment-length", "5"]
    assert cli.main([*words, "--clips-per-episode", "2", "--device", "cpu"]) == 0
    assert "holds 32 clips of 564 tokens" in capsys.readouterr().out
    tokens, wm = TokenSet(out, verify=True), ivideogpt.from_pretrained(NANO)
    assert len(tokens) == 32 and tokens.manifest["counts"] == {
        "shards": 1, "clips": 32, "tokens": 32 * 564, "bytes": (out / "tokens-000000.safetensors").stat().st_size,
    }  # fmt: skip
    assert tokens.manifest["tokenizer_hash"] == tokenizer_hash(wm.tokenizer)
    assert (tokens.manifest["dtype"], tokens.manifest["model"], tokens.manifest["action_dim"]) == ("float32", NANO, 4)
    sets = ShardSet("embedded:heldout")
    for number in (0, 1, 2, 31):
        clip = tokens[number]
        episode = sets.episode(clip["episode"])
        assert episode is not None and sets.key(clip["episode"]) == clip["key"]
        chosen = list(range(clip["start"], clip["start"] + 5))
        expected, labels = wm.tokenizer.tokenize(frames_of("embedded:heldout", clip["key"], chosen))
        assert torch.equal(clip["tokens"], expected[0])
        assert torch.equal(wm.layout.labels(clip["tokens"][None]), labels)
        np.testing.assert_array_equal(clip["actions"], episode.actions[chosen])  # type: ignore[index]
        np.testing.assert_array_equal(clip["rewards"], episode.rewards[chosen])  # type: ignore[index]
    assert {tokens[0]["start"], tokens[1]["start"]} == {0, len(sets.episode(0)) - 5}  # type: ignore[arg-type]
    assert verify_token_set(out) == []


def test_a_folder_with_a_tokenizer_alone_is_enough(model, shards: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "alone", model.tokenizer, {}, "")
    out = tmp_path / "tokens"
    words = ["data", "tokenize", str(shards), "--model", str(tmp_path / "alone"), "--out", str(out)]
    assert cli.main([*words, "--segment-length", "4", "--every", "3", "--workers", "0", "--device", "cpu"]) == 0
    tokens = TokenSet(out)
    assert [tokens[i]["start"] for i in range(3)] == [0, 3, 6]  # of 10 frames a clip of 4 starts at 0..6
    assert tokens.manifest["tokenizer_hash"] == tokenizer_hash(model.tokenizer)


def test_shards_are_plain_safetensors_of_16_bits(model, shards: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file

    tokenize_clips(model.tokenizer, [str(shards)], tmp_path / "t", 4, clips_per_episode=2, shard_clips=5)
    files = sorted((tmp_path / "t").glob("*.safetensors"))
    assert [path.name for path in files] == [f"tokens-00000{i}.safetensors" for i in range(3)]
    tensors = load_file(files[0])
    kinds = {name: (str(array.dtype), array.shape) for name, array in tensors.items()}
    length = model.layout.sequence_length(4)
    assert kinds == {
        "tokens": ("uint16", (5, length)), "actions": ("float32", (5, 4, 3)), "rewards": ("float32", (5, 4)),
        "key": ("uint8", (5, len("square-000"))), "source": ("uint16", (5,)), "episode": ("int32", (5,)),
        "start": ("int32", (5,)), "draw": ("uint16", (5,)), "crc32": ("uint32", (5,)),
    }  # fmt: skip
    tokens = TokenSet(tmp_path / "t")
    rows = np.concatenate([load_file(path)["tokens"] for path in files])
    assert len(tokens) == len(rows) == 12
    assert all(torch.equal(tokens[i]["tokens"], torch.from_numpy(rows[i].astype(np.int64))) for i in range(12))
    assert bytes(tensors["key"][2]).decode() == tokens[2]["key"] == "square-001"
    with safe_open(files[2], "np") as file:
        about = json.loads(file.metadata()["ivideogpt-tokens"])
    assert (about["shard"], about["settings"]["segment_length"]) == (2, 4)
    copy = pickle.loads(pickle.dumps(tokens))  # noqa: S301 - as a worker that is spawned gets it
    assert torch.equal(copy[7]["tokens"], tokens[7]["tokens"])
    with pytest.raises(IndexError, match="clip 12 of 12"):
        tokens[12]


def test_goal_stride_and_no_actions(model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with ShardSetWriter(tmp_path / "set") as writer:
        for index in range(2):
            video = rng.integers(0, 255, (14, 32, 32, 3), np.uint8)
            writer.write(f"e-{index}", Episode(video, None, None, fps=6.0, source="test/noise"))
    tokenize_clips(model.tokenizer, [str(tmp_path / "set")], tmp_path / "t", 5, stride=None, goal=True, every=4,
                   clips_per_episode=None)  # fmt: skip
    tokens = TokenSet(tmp_path / "t")
    assert [tokens[i]["start"] for i in range(len(tokens))] == [0, 4] * 2
    assert (tokens.manifest["action_dim"], tokens.manifest["has_rewards"]) == (None, False)
    assert set(tokens[1]) == {"tokens", "key", "source", "episode", "start", "draw"}
    chosen = [10, 4, 6, 8, 10]  # at 6 Hz every second frame is 3 Hz; the goal is the clip's last frame
    expected, _ = model.tokenizer.tokenize(frames_of(tmp_path / "set", "e-0", chosen))
    assert torch.equal(tokens[1]["tokens"], expected[0])


def test_draws_are_of_the_clip_and_are_the_training_augmentation(model, shards: Path, tmp_path: Path) -> None:
    from ivideogpt.data.transforms import Augmentation, augment, to_uint8

    make: dict[str, Any] = dict(clips_per_episode=1, draws=3, seed=5)
    tokenize_clips(model.tokenizer, [str(shards)], tmp_path / "a", 4, batch_size=18, **make)
    tokenize_clips(model.tokenizer, [str(shards)], tmp_path / "b", 4, batch_size=18, num_workers=2, **make)
    tokens = TokenSet(tmp_path / "a")
    assert [(tokens[i]["key"], tokens[i]["draw"]) for i in (0, 2, 3)] == [
        ("square-000", 0), ("square-000", 2), ("square-001", 0),
    ]  # fmt: skip
    clips = []
    for clip in map(tokens.__getitem__, range(18)):
        seed = (5, 0, clip["episode"], 0, clip["draw"], 6)
        video = to_uint8(frames_of(shards, clip["key"], [0, 1, 2, 3]))
        clips.append(augment(video, Augmentation(), [seed], 32))
    expected, _ = model.tokenizer.tokenize(torch.cat(clips))
    assert torch.equal(torch.stack([tokens[i]["tokens"] for i in range(18)]), expected)
    assert not torch.equal(tokens[0]["tokens"], tokens[1]["tokens"])
    assert tokens.manifest["augmentation"]["hue"] == 0.05 and tokens.manifest["draws"] == 3
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_a_shorter_context_is_another_tokenizer(tiny_world_model) -> None:
    first, same, other = (tiny_world_model(seed=seed).tokenizer for seed in (0, 0, 1))
    assert tokenizer_hash(first) == tokenizer_hash(same) != tokenizer_hash(other)
    before = tokenizer_hash(same)
    same.set_context_length(1)
    assert tokenizer_hash(same) != before
    with torch.no_grad():
        first.quantize.embedding.weight[3, 0] += 1e-6
    assert tokenizer_hash(first) != before
    dropout = tiny_world_model(seed=0, attention_dropout=0.3).tokenizer
    assert tokenizer_hash(dropout) == before  # it changes no token


def test_other_settings_are_refused(model, tiny_world_model, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    assert tokenize_clips(model.tokenizer, [str(shards)], out, 4, shard_clips=7).made == 24
    again = tokenize_clips(model.tokenizer, [str(shards)], out, 4, shard_clips=7)
    assert (again.made, again.complete) == (0, True)
    with pytest.raises(ValueError, match=r"other settings: segment_length 4 there and 5 here; choose another folder"):
        tokenize_clips(model.tokenizer, [str(shards)], out, 5, shard_clips=7)
    (out / "manifest.json").unlink()  # as after a kill: the shards say it themselves
    with pytest.raises(ValueError, match=r"other settings: tokenizer_hash [0-9a-f]{64} there and [0-9a-f]{64} here"):
        tokenize_clips(tiny_world_model(seed=1).tokenizer, [str(shards)], out, 4, shard_clips=7)
    assert tokenize_clips(model.tokenizer, [str(shards)], out, 4, shard_clips=7).complete
    with pytest.raises(ValueError, match="is no token set but 'ivideogpt-shards'.* choose another folder"):
        tokenize_clips(model.tokenizer, [str(shards)], shards, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        tokenize_clips(model.tokenizer, [str(shards)], tmp_path / "file", 4)


def test_parts_make_the_same_set(model, shards: Path, tmp_path: Path) -> None:
    def make(name: str, **more: Any) -> Any:
        return tokenize_clips(model.tokenizer, [str(shards)], tmp_path / name, 4, shard_clips=5, batch_size=4, **more)

    make("whole")
    assert [make("parts", part=(i, 3)).complete for i in (3, 1, 2)] == [False, False, True]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(ValueError, match="part 4/3"):
        make("parts", part=(4, 3))


KILLED = """
import sys, time
import torch, ivideogpt
from ivideogpt.training.tokenization import tokenize_clips
torch.set_num_threads(1)
wm = ivideogpt.from_pretrained(sys.argv[1])

def slow(done, total):
    print(done, flush=True)
    time.sleep(0.5)

tokenize_clips(wm.tokenizer, [sys.argv[2]], sys.argv[3], 4, shard_clips=4, batch_size=4, progress=slow)
"""


def test_kill_and_resume(model, shards: Path, tmp_path: Path) -> None:
    """A real kill after the second shard: what was whole stays, and nothing differs from an unbroken run."""
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "t"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(shards), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 8:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("tokens-*")}
    assert 2 <= len(before) < 6
    with pytest.raises(ShardError, match=r"it was begun: give `ivideogpt data tokenize` again"):
        TokenSet(out)
    (out / ".tokens-000005.safetensors.elsewhere-1.partial").write_bytes(b"half")
    time.sleep(0.01)
    torch.set_num_threads(1)
    done = tokenize_clips(model.tokenizer, [str(shards)], out, 4, shard_clips=4, batch_size=4)
    assert (done.made, done.complete) == (24 - 4 * len(before), True)
    assert all((out / name).stat().st_mtime_ns == when for name, when in before.items())
    assert not list(out.glob(".*"))
    tokenize_clips(model.tokenizer, [str(shards)], tmp_path / "whole", 4, shard_clips=4, batch_size=4)
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def damaged(folder: Path, change: Callable[[Path], None], tmp_path: Path) -> Path:
    """A copy of a token set whose first shard was changed."""
    copy = Path(shutil.copytree(folder, tmp_path / f"damaged-{len(list(tmp_path.iterdir()))}"))
    change(copy / "tokens-000000.safetensors")
    return copy


def test_damage_is_found(model, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "t"
    tokenize_clips(model.tokenizer, [str(shards)], whole, 4, clips_per_episode=1)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        row = TokenSet(whole)[4]["tokens"].numpy().astype(np.uint16).tobytes()
        data[data.index(row) + 40] ^= 1
        path.write_bytes(data)

    flipped = damaged(whole, flip, tmp_path)
    assert torch.equal(TokenSet(flipped)[0]["tokens"], TokenSet(whole)[0]["tokens"])
    with pytest.raises(ShardError, match=r"tokens-000000.safetensors: clip 4 is damaged \(CRC-32\)"):
        TokenSet(flipped)[4]
    with pytest.raises(ShardError, match="is corrupt: its SHA-256 is not the manifest's"):
        TokenSet(flipped, verify=True)
    assert cli.main(["data", "verify", str(flipped)]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert cli.main(["data", "verify", str(whole)]) == 0
    assert "6 clips: whole" in capsys.readouterr().out

    short = damaged(whole, lambda path: os.truncate(path, path.stat().st_size - 9), tmp_path)
    with pytest.raises(ShardError, match="is truncated or changed"):
        TokenSet(short)
    with pytest.raises(ShardError, match="tokens-000000.safetensors is missing"):
        TokenSet(damaged(whole, Path.unlink, tmp_path))
    (short / "manifest.json").unlink()
    with pytest.raises(ShardError, match="is no whole shard of tokens"):  # not taken for a whole one on resume
        tokenize_clips(model.tokenizer, [str(shards)], short, 4, clips_per_episode=1)
    manifest = json.loads((flipped / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "../t/tokens-000000.safetensors"
    (flipped / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="not of the kind tokens-000000"):
        TokenSet(flipped)


@pytest.mark.filterwarnings("ignore:episode square-")
def test_bad_episodes_are_left_out_and_named(model, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "set"))
    path, offset, size = ShardSet(copy).place(0)
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 0xFF
    path.write_bytes(data)
    options: dict[str, Any] = {"clips_per_episode": 3, "shard_clips": 3}
    with pytest.raises(ShardError, match="episode square-000: "):
        tokenize_clips(model.tokenizer, [str(copy)], tmp_path / "a", 4, **options)
    done = tokenize_clips(model.tokenizer, [str(copy)], tmp_path / "b", 4, policy="skip", **options)
    assert done.skipped == ["square-000"] and done.complete
    tokens = TokenSet(tmp_path / "b", verify=True)  # the first shard has no clip at all
    assert len(tokens) == 15 and tokens.manifest["skipped"] == ["square-000"]
    assert {tokens[i]["key"] for i in range(15)} == {f"square-00{i}" for i in range(1, 6)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--segment-length", "2"], "segment_length 2 must exceed the tokenizer's context_length 2"),
        (["--context-length", "3"], "context_length 3"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--target-rate", "-1"], "--target-rate must be a positive number"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    fixed = ["data", "tokenize", "embedded:heldout", "--model", NANO, "--out", str(tmp_path / "t"), "--device", "cpu"]
    assert cli.main([*fixed, *words]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "t").exists()
    with pytest.raises(SystemExit):
        cli.main([*fixed, "--part", "0/2"])
    assert "'0/2' is no part" in capsys.readouterr().err


def test_plan_counts_without_decoding(shards: Path) -> None:
    plan = ClipPlan([str(shards)], PlanSettings(4, 2, 32, clips_per_episode=None, every=1, draws=2))
    assert len(plan) == 6 * 7 * 2  # ten frames: 7 starts
    assert [plan[i]["start"] for i in (0, 1, 2, 13)] == [0, 0, 1, 6]
    with pytest.raises(ValueError, match="give one of clips_per_episode and every"):
        PlanSettings(4, 2, 32, every=1)
