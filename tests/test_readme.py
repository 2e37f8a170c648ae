"""Runs what the README shows: its commands, its Python with the printed output, and checks its tables and links."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from ivideogpt import cli
from ivideogpt.zoo.registry import EMBEDDED, entries

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Command of the README -> words that make it cheap; everything else runs as it stands there.
CHEAPER = {
    "ivideogpt run debug": ["--print-config"],  # run for real by the recipes' tests
    "ivideogpt run demo": ["transformer.trainer.max_steps=1", "transformer.trainer.limit_val_batches=0"],
    "ivideogpt evaluate": ["--limit", "4"],
    "ivideogpt predict": ["--horizon", "4"],
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command line in a bash block, without its comment."""
    lines = [line.partition(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def nano() -> Path:
    """The embedded model's folder."""
    folder = EMBEDDED / "ivideogpt-metaworld-nano"
    assert folder.is_dir(), f"the embedded model is not there: {folder}"
    return folder


@pytest.fixture
def my_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with recordings as the README describes them: a square that the actions push around.

    `.npz` files with four numbers an action and rewards, and videos with seven and none.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_recordings").mkdir()
    (tmp_path / "my_videos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        actions = rng.uniform(-4, 4, (16, 4)).astype(np.float32)
        image = np.full((16, 96, 128, 3), 90, np.uint8)
        place = np.array([40.0, 60.0])
        for frame in range(16):
            top, left = place.astype(int)
            image[frame, top : top + 16, left : left + 16] = (200, 60, 40)
            place += actions[frame, :2]
        rewards = np.concatenate([[0], actions[:-1, 0]]).astype(np.float32)
        np.savez(tmp_path / "my_recordings" / f"{number}.npz", image=image, action=actions, reward=rewards)
        write_mp4(tmp_path / "my_videos" / f"push_{number}.mp4", image)
        np.save(tmp_path / "my_videos" / f"push_{number}.npy", np.concatenate([actions, actions[:, :3]], axis=1))


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """A video of `frames` (T, H, W, 3), as a camera's."""
    av = pytest.importorskip("av", reason="the extra `video`")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_recordings_of_ones_own_take_at_most_ten_lines() -> None:
    section = README.partition("## Bring your own recordings")[2].partition("\n## ")[0]
    shown = re.findall(r"^```bash\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) == 2 and all(0 < len(block.splitlines()) <= 10 for block in shown)


def test_every_command_is_one_that_is_run_here() -> None:
    assert {shlex.split(line)[0] for line in commands()} == {"pip", "make", "ivideogpt"}


@pytest.mark.filterwarnings("ignore::ivideogpt.zoo.changing.ActionLayerWarning")  # of actions with seven numbers
def test_the_commands_run(
    nano: Path, my_recordings: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [line for line in commands() if line.startswith("ivideogpt ")]
    assert len(lines) >= 8
    for line in lines:
        extra = next((words for start, words in CHEAPER.items() if line.startswith(start)), [])
        words = [*shlex.split(line)[1:], *extra]
        monkeypatch.setattr(sys, "argv", ["ivideogpt", *words])
        assert cli.main(words) == 0, f"{line}\n{capfd.readouterr().err}"
    written = {"rollout.gif", "results.json", "my_data", "my_run", "my_results.json", "tuned.html"}
    written |= {"my_video_data", "my_video_run", "my_video_results.json"}
    assert written <= {path.name for path in Path().iterdir()}


def test_make_knows_the_targets() -> None:
    targets = [shlex.split(line)[1] for line in commands() if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_extras_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"'\.\[(\w+)\]'", README))
    assert named == set(project["optional-dependencies"]) - {"dev"}
    assert "pip install ." in commands()


def test_the_python_prints_what_it_says(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code, *others), (output,) = blocks("python"), blocks("text")
    assert len([line for line in code.splitlines() if line]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == output
    for code in others:
        exec(compile(code, "README.md", "exec"), {})


def test_the_table_of_commands_is_complete() -> None:
    assert re.findall(r"^\| `ivideogpt (\w+)", README, flags=re.MULTILINE) == list(cli.COMMANDS)


def test_the_results_are_those_of_their_files() -> None:
    number = r"(-?[\d.]+)"
    row = rf"\[result\]\((.*?\.json)\)\) \| {number} \({number} to {number}\) \| {number} \| {number} \| {number} \|"
    found = re.findall(row, README)
    assert len(found) == 3
    for file, *shown in found:
        overall = json.loads((ROOT / file).read_text())["overall"]
        low, high = overall["interval"]["psnr"]
        values = [overall["model"]["psnr"], low, high, overall["model"]["ssim"], overall["repeat_last_frame"]["psnr"]]
        values.append(overall["reward"]["pearson_r"])
        assert shown == [f"{value:.{digits}f}" for value, digits in zip(values, (2, 2, 2, 3, 2, 2), strict=True)], file


def test_the_zoo_table_says_what_the_registry_says() -> None:
    rows = re.findall(r"^\| `(ivideogpt-[\w-]+)`.*?\| (\d+) \| (\d+)(.*?)\| (\d*) ?\| (yes)? ?\|", README, re.MULTILINE)
    shown = {
        name: (int(px), int(t0), "goal" in goal, action, bool(reward)) for name, px, t0, goal, action, reward in rows
    }
    assert shown == {
        name: (one.resolution, one.context_length, one.goal, str(one.action_dim or ""), one.rewards)
        for name, one in entries().items()
    }


PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/data.md", "docs/evaluation.md", "recipes/README.md"]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / name).read_text())
    assert not [link for link in links if not ((ROOT / name).parent / link).exists()]


def test_the_citation_is_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "MIT"
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2405.15223"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("target", ["demo"])
def test_make_does_its_own_set_up(target: str, nano: Path, tmp_path: Path) -> None:
    """In a fresh copy; `make test` itself would run this test again."""
    for part in ("src", "recipes", "model_cards"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path)
    subprocess.run(["make", target, f"PYTHON={sys.executable}"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    again = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "pip" not in again.stdout
