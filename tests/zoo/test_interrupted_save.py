"""A save that runs out of disk, or is killed at any moment, leaves all of the old model or all of the new one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ivideogpt.zoo.folder import finish_interrupted_save, replacing_files

# Forks one child per moment of the save, which kills itself there. A child that does not get so far exits by itself.
SCRIPT = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
from ivideogpt.world_model import WorldModel
from ivideogpt.zoo import folder as folder_module, tensors

torch.set_num_threads(1)
folder = Path(sys.argv[1])
old = WorldModel.from_pretrained(folder)
new = WorldModel.from_pretrained(folder)
for parameter in new.parameters():
    parameter.data += 1.0
new.extras["recipe"] = "new"

def which():
    found = WorldModel.from_pretrained(folder)
    tensors = found.state_dict()
    for name, model in (("old", old), ("new", new)):
        if found.extras == model.extras and all(torch.equal(t, tensors[k]) for k, t in model.state_dict().items()):
            return name
    return "mixed"

def in_child(prepare):
    child = os.fork()
    if child == 0:
        try:
            prepare()
            new.save_pretrained(folder)
        except OSError as error:
            print("refused:", error, file=sys.stderr)
            os._exit(3)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def kill_at_call(module, name, number):
    real, calls = getattr(module, name), [0]
    def counted(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    setattr(module, name, counted)

report = {}
for module, name in ((tensors, "save_file"), (os, "fsync"), (os, "rename"), (os, "replace")):
    for number in range(1, 30):
        status = in_child(lambda: kill_at_call(module, name, number))
        found = which()
        left = sorted(item.name for item in folder.iterdir() if item.name.startswith(".ivideogpt-saved"))
        report.setdefault(name, []).append([os.WIFSIGNALED(status), found, left])
        if found != "old":
            old.save_pretrained(folder)
        if not os.WIFSIGNALED(status):
            break

def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

status = in_child(small_files)
report["full disk"] = [os.WEXITSTATUS(status), which()]
old.save_pretrained(folder)  # clears up after the dead
report["left"] = sorted(item.name for item in folder.iterdir())
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed") / "model"
    make = (
        "import sys, torch\n"
        "from ivideogpt.config import TokenizerConfig, TransformerConfig, WorldModelConfig\n"
        "from ivideogpt.world_model import WorldModel\n"
        "tokens = TokenizerConfig(resolution=32, block_channels=(8, 32, 32), layers_per_block=1, latent_channels=4,\n"
        "    norm_num_groups=4, codebook_size=8, dynamics_codebook_size=8, max_attention_resolution=8)\n"
        "transformer = TransformerConfig(tokens.vocab_size, 1, 2, embed_dim=32, mlp_dim=48, max_positions=256)\n"
        "WorldModel(WorldModelConfig(tokens, transformer)).save_pretrained(sys.argv[1])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", make + SCRIPT, str(folder)], capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stderr
    return {**json.loads(run.stdout), "stderr": run.stderr}


@pytest.mark.parametrize("call", ["save_file", "fsync", "rename", "replace"])
def test_a_kill_leaves_one_whole_model(report: dict[str, Any], call: str) -> None:
    """Killed in front of the first, second, ... call; the last entry is the save that was not killed any more."""
    *killed, last = report[call]
    assert last[:2] == [False, "new"]
    assert killed
    assert all(was_killed for was_killed, _, _ in killed)
    expected = {"save_file": {"old"}, "rename": {"old"}, "replace": {"new"}, "fsync": {"old", "new"}}[call]
    assert {which for _, which, _ in killed} == expected
    assert [left for _, _, left in report[call]] == [[]] * len(report[call])  # the first load finished what was left


def test_a_full_disk_leaves_the_old_model(report: dict[str, Any]) -> None:
    assert report["full disk"] == [3, "old"]
    assert "diffusion_pytorch_model.safetensors: Error while serializing" in report["stderr"]
    assert report["left"] == ["ivideogpt.json", "tokenizer", "transformer"]  # nothing of any dead process


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        with replacing_files(folder) as staging:
            (staging / "file").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_staging_folders_of_the_living_stay(tmp_path: Path) -> None:
    with replacing_files(tmp_path) as outer:
        (outer / "one").write_text("1")
        with replacing_files(tmp_path) as inner:
            (inner / "two").write_text("2")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["one", "two"]


def test_an_unfinished_save_that_cannot_be_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / ".ivideogpt-saved").mkdir()
    (tmp_path / ".ivideogpt-saved" / "tokenizer").write_text("a file")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(
        OSError, match=r"holds a save that was interrupted \(.ivideogpt-saved\), and it cannot be finished"
    ):
        finish_interrupted_save(tmp_path)
    assert (tmp_path / ".ivideogpt-saved" / "tokenizer").read_text() == "a file"
