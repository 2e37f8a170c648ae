"""Tests of the command line: quick help, one-line errors, and what `lightning` hands to whom."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from ivideogpt import cli

if TYPE_CHECKING:
    from ivideogpt.world_model import WorldModel

ROOT = Path(__file__).parents[1]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | extra


def run(*words: str, script: str = "main", **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs `ivideogpt` (or `lightning`) as its console script does."""
    code = f"import sys; from ivideogpt.cli import {script}; sys.exit({script}())"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=120, check=False)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def call(*words: str) -> int:
    """`main`, whose argument errors leave through SystemExit as argparse's do."""
    try:
        return cli.main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)


# Help and version


def test_help_lists_every_command_without_importing_torch() -> None:
    code = (
        "import sys; from ivideogpt.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('HEAVY', sorted({'torch', 'numpy', 'lightning', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert all(f"    {name}" in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert f"usage: ivideogpt {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"ivideogpt {cli.version()}\n"


def test_no_words_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    assert "usage: ivideogpt" in capsys.readouterr().out


# A user's mistakes: one line, exit code 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prdict"], "no command 'prdict'; did you mean 'predict'?"),
        (["fly"], "no command 'fly'; choose from run, predict"),
        (["run"], "the following arguments are required: RECIPE"),
        (["run", "no/such.yaml"], "no/such.yaml"),
        (["run", "no/such.yaml", "max_steps"], "'max_steps' is not KEY=VALUE"),
        (["run", "no/such.yaml", "--fast"], "unknown argument --fast"),
        (["zoo", "show", "no-such-model"], "no-such-model"),
        (["push", "no/such/folder", "user/name"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words) == 2
    assert message in error_line(capsys)


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="did you mean 'predict'"):
        cli.main(["prdict", "--debug"])


def test_messages_are_folded_into_one_line() -> None:
    assert cli.one_line(ValueError("first\n  second")) == "first second"
    assert (
        cli.one_line(FileNotFoundError(2, "No such file or directory", "a.npz")) == "a.npz: No such file or directory"
    )
    assert cli.one_line(ValueError()) == "ValueError"


# run


def test_overrides_may_stand_behind_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from ivideogpt import recipes

    calls = []
    monkeypatch.setattr(recipes, "run", lambda *words, **options: calls.append((words, options)))
    assert call("run", "r.yaml", "a=1", "--print-config", "b.c=-2", "--trust") == 0
    assert calls == [(("r.yaml", ["a=1", "b.c=-2"]), {"trust": True, "print_config": True, "revision": None})]
    assert cli.lightning_main(["run", "r.yaml", "a=1"]) == 0
    assert calls[1] == (("r.yaml", ["a=1"]), {"trust": False, "print_config": False, "revision": None})
    assert cli.lightning_main(["run", "someone/mine-v1.0", "a=1", "--revision", "v1"]) == 0  # a model on the Hub
    assert calls[2] == (("someone/mine-v1.0", ["a=1"]), {"trust": False, "print_config": False, "revision": "v1"})


# predict and evaluate


@pytest.fixture
def model(tiny_world_model: Callable[..., WorldModel], tmp_path: Path) -> str:
    return str(tiny_world_model(action_dim=4, reward=True).save_pretrained(tmp_path / "tiny"))


@pytest.fixture
def episode(tmp_path: Path) -> str:
    """A recording of 12 noisy 48x40 frames with actions and rewards."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (12, 48, 40, 3)).astype(np.uint8)
    rewards = np.arange(12, dtype=np.float32)
    np.savez(tmp_path / "episode.npz", image=image, action=rng.normal(size=(12, 4)).astype(np.float32), reward=rewards)
    return str(tmp_path / "episode.npz")


@pytest.mark.parametrize("suffix", [".gif", ".png", ".mp4"])
def test_predict_writes_what_the_name_says(suffix: str, model: str, episode: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix}"
    words = ["predict", "--model", model, "--input", episode, "--output", str(out), "--horizon", "4", "--start", "3"]
    assert call(*words) == 0
    first = out.read_bytes()
    if suffix == ".mp4":
        import av

        with av.open(str(out)) as video:
            assert sum(1 for _ in video.decode(video=0)) == 6
    else:
        with Image.open(out) as image:
            assert getattr(image, "n_frames", 1) == (6 if suffix == ".gif" else 1)
        assert call(*words) == 0
        assert out.read_bytes() == first  # the same seed
        assert call(*words, "--seed", "1") == 0
        assert out.read_bytes() != first


def test_predict_prints_scores_against_the_last_frame(
    model: str, episode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gif"
    assert call("predict", "--model", model, "--input", episode, "--output", str(out), "--temperature", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}: 10 frames predicted from 2"
    assert [line.split("  ")[1] for line in lines[1:3]] == ["prediction", "last frame repeated"]
    assert all("PSNR" in line and "SSIM" in line for line in lines[1:3])
    assert lines[3].endswith("recorded 65.00")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--output": "out.txt"}, "choose one of .gif, .mp4, .png"),
        ({"--output": "nowhere/out.gif"}, "there is no folder"),
        ({"--input": "missing.npz"}, "there is no file missing.npz"),
        ({"--input": "embedded:nothing"}, "no embedded set 'embedded:nothing'"),
        ({"--episode": "3"}, "chooses from a shard set"),
        ({"--input": "embedded:heldout", "--episode": "no-such"}, "has no episode 'no-such'; give a number below"),
        ({"--horizon": "0"}, "'0' is not a whole number from 1 on"),
        ({"--horizon": "11"}, "has 12 frames; frames 0 to 12 are needed (2 given and 11 predicted"),
        ({"--horizon": "3", "--start": "11"}, "has 12 frames; frames 11 to 15 are needed"),
        ({"--start": "11"}, "has 12 frames; frames 11 to 13 are needed"),
        ({"--temperature": "hot"}, "'hot' is not a number from 0 on"),
        ({"--model": "./missing"}, "no world model at missing"),
    ],
)
def test_predict_refuses(
    changes: dict[str, str], message: str, model: str, episode: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.gif").write_text("old")
    options = {"--model": model, "--input": episode, "--output": "out.gif"} | changes
    assert call("predict", *(word for option in options.items() for word in option)) == 2
    assert message in error_line(capsys)
    assert (tmp_path / "out.gif").read_text() == "old"


def test_predict_without_the_actions_that_it_needs(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "silent.npz", image=np.zeros((6, 32, 32, 3), np.uint8))
    words = ["--model", model, "--input", str(tmp_path / "silent.npz"), "--output", str(tmp_path / "out.gif")]
    assert call("predict", *words) == 2
    assert f"silent.npz has no actions, and {model} needs 4 a frame" in error_line(capsys)


def test_predict_with_a_published_layout_on_a_real_recording(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "bair.gif"
    golden, recording = shared / "golden" / "bair-64-act-cond", shared / "data" / "bair_sample.npz"
    assert call("predict", "--model", str(golden), "--input", str(recording), "--output", str(out)) == 0
    with Image.open(out) as image:
        assert getattr(image, "n_frames", 1) == 30


def test_evaluate_writes_results_and_their_command(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    words = ["evaluate", "--model", model, "--data", "embedded:heldout", "--out", str(out), "--horizon", "3"]
    words += ["--limit", "6", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["ivideogpt", *words])
    assert call(*words) == 0
    assert "plate-slide-v3" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["overall"]["clips"] == 6
    assert len(result["tasks"]) >= 2
    assert result["command"] == shlex.join(["ivideogpt", *words])
    (shards,) = result["hashes"]["data"].values()
    assert shards and all(len(digest) == 64 for digest in shards.values())
    assert not (tmp_path / "results.json.journal").exists()


def test_evaluate_refuses_a_folder_that_is_not_there(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", "--model", model, "--data", "embedded:heldout", "--out", "nowhere/results.json") == 2
    assert "there is no folder nowhere" in error_line(capsys)
    assert call("evaluate", "--model", model, "--data", "nowhere") == 2
    assert "there is no folder 'nowhere'" in error_line(capsys)


# zoo and doctor


def test_zoo_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    from ivideogpt.zoo.registry import entries

    assert call("zoo") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in entries())
    assert call("zoo", "list", "*bair*") == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 1 + 2
    assert call("zoo", "show", "thuml/ivideogpt-oxe") == 0
    assert "hub_id: thuml/ivideogpt-oxe-64-act-free" in capsys.readouterr().out
    assert call("zoo", "show", "ivideogpt-bair-64-act-con") == 2
    assert "did you mean 'ivideogpt-bair-64-act-cond'?" in error_line(capsys)


def test_doctor_examines_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--offline") == 0
    printed = capsys.readouterr().out
    for subject in ("python", "torch + torchvision", "GPU", "lightning command", "Hub"):
        assert subject in printed


@pytest.mark.parametrize(("reason", "status"), [(None, "ok"), ("no compiler", "note")])
def test_doctor_tells_of_each_gpu_whether_kernels_run(
    reason: str | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ivideogpt.commands import doctor
    from ivideogpt.rollout import gpu

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu, "no_kernels", lambda device: reason if device.index == 1 else None)
    first, second = doctor._gpu_kernels()
    assert (first.status, second.status) == ("ok", status)
    assert second.subject == "GPU 1 kernels" and (reason or "compiled") in second.text


def test_doctor_says_when_torchvision_belongs_to_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from ivideogpt.commands import doctor

    real = metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.1.0" if name == "torch" else real(name))
    finding = doctor._torchvision()
    assert finding.status == "broken"
    assert "found 2.1.0" in finding.text
    assert "pip install --upgrade torch torchvision" in finding.text


# lightning


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["r.yaml", "a=1"], "r.yaml"),
        (["--print-config", "r.yaml"], "r.yaml"),
        (["--accelerator", "cpu", "--devices=2", "x.py", "r.yaml"], "x.py"),
        (["job", "--command", "python x.py"], "job"),
        (["--help"], None),
    ],
)
def test_the_word_that_decides(words: list[str], target: str | None) -> None:
    assert cli.script_or_recipe(words) == target


def test_fabric_options_are_those_of_the_installed_launcher() -> None:
    import click
    from lightning.fabric.cli import _main

    assert isinstance(_main, click.Group)
    options = {name for one in _main.commands["run"].params if isinstance(one, click.Option) for name in one.opts}
    assert options <= cli.FABRIC_OPTIONS


def test_scripts_go_to_fabric(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom lightning.fabric import Fabric\n"
        "fabric = Fabric()\n"
        "print('RAN', sys.argv[1:], os.environ['LT_ACCELERATOR'], os.environ['LT_DEVICES'], fabric.world_size)\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = run("run", "--accelerator", "cpu", f"--main-port={port}", str(script), "--lr", "1", script="lightning_main")
    assert "RAN ['--lr', '1'] cpu 1 1" in done.stdout, done.stderr
    assert done.returncode == 0


def test_a_missing_script_is_fabrics_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # the hand-over replaces it
    with pytest.raises(SystemExit) as stop:
        cli.lightning_main(["run", "no_such.py"])
    assert stop.value.code == 2
    assert "no_such.py" in capsys.readouterr().err


def test_other_words_without_lightning_sdk(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.lightning_main(["login"]) == 2
    assert "'login' belongs to lightning_sdk, which is not installed" in error_line(capsys)
    assert cli.lightning_main(["run", "job"]) == 2  # a recipe's name that does not exist
    assert "job" in error_line(capsys)
    assert cli.lightning_main([]) == 0
    assert "lightning run RECIPE.yaml" in capsys.readouterr().out


@pytest.fixture
def lightning_sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs a distribution with lightning_sdk's names, as pip would lay it out."""
    package = tmp_path / "lightning_sdk"
    (package / "cli").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli" / "__init__.py").touch()
    (package / "cli" / "entrypoint.py").write_text(
        "import sys\ndef main_cli():\n    print('SDK', sys.argv)\n    sys.exit(7)\n"
    )
    info = tmp_path / "lightning_sdk-2026.1.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 2026.1.1\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nlightning = lightning_sdk.cli.entrypoint:main_cli\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # the hand-over replaces it


@pytest.mark.usefixtures("lightning_sdk")
@pytest.mark.parametrize("words", [["login"], [], ["--help"], ["run", "job", "--name", "x"], ["cp", "a.yaml", "b"]])
def test_other_words_go_to_lightning_sdk(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.lightning_main(words)
    assert stop.value.code == 7
    assert capsys.readouterr().out == f"SDK {['lightning', *words]}\n"
