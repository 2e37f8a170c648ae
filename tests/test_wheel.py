"""Builds the wheel, installs it in a clean environment and uses it from there, far from the source tree."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **extra: str) -> str:
    """Runs a command without the developer's PYTHONPATH and gives its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | extra
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel; its dependencies are read from the running one."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    executable = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", executable, "install", "--quiet", "--no-deps", "--no-index", wheel,
        cwd=folder)  # fmt: skip
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # A plain path line: the .pth files over there, an editable install of this package among them, are not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return executable


def test_it_holds_recipes_data_and_entries(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = [path.relative_to(ROOT / "src") for path in (ROOT / "src" / "ivideogpt").rglob("*") if path.is_file()]
    sources = {path.as_posix() for path in expected if "__pycache__" not in path.parts}
    recipes = {
        f"ivideogpt/_recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" for path in ROOT.glob("recipes/**/*.yaml")
    }
    assert not sources - names
    assert recipes
    assert not recipes - names
    assert "ivideogpt/py.typed" in names
    assert "ivideogpt/assets/report.html.j2" in names
    for split in ("train", "heldout"):
        assert f"ivideogpt/assets/data/metaworld/{split}/manifest.json" in names
    for file in ("tokenizer/diffusion_pytorch_model.safetensors", "transformer/model.safetensors"):
        assert f"ivideogpt/assets/models/ivideogpt-metaworld-nano/{file}" in names
    cards = {path.relative_to(ROOT / "model_cards").as_posix() for path in (ROOT / "model_cards").rglob("*.*")}
    assert {"TEMPLATE.md", "ivideogpt-oxe-64-act-free.yaml"} < cards
    assert not {f"ivideogpt/_model_cards/{name}" for name in cards} - names
    assert not [name for name in names if name.startswith(("tests/", "recipes/"))]


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    assert "License-Expression: MIT" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: torch<2.16,>=2.9" in metadata
    assert "Provides-Extra: envs" in metadata


def test_the_commands_run_from_it(python: Path, tmp_path: Path) -> None:
    commands = python.parent
    assert "usage: ivideogpt" in run(commands / "ivideogpt", "--help", cwd=tmp_path)
    assert run(commands / "ivideogpt", "--version", cwd=tmp_path).startswith("ivideogpt 0.")
    assert "lightning run RECIPE.yaml" in run(commands / "lightning", cwd=tmp_path)
    where = run(python, "-c", "import ivideogpt; print(ivideogpt.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])


def test_recipes_models_and_data_are_found_from_it(python: Path, tmp_path: Path) -> None:
    printed = run(python.parent / "ivideogpt", "run", "debug", "--print-config", cwd=tmp_path)
    assert "class_path: ivideogpt.training" in printed
    assert "thuml/ivideogpt-oxe" in run(python.parent / "ivideogpt", "zoo", cwd=tmp_path, COLUMNS="200")
    inspected = run(python.parent / "ivideogpt", "demo", "--prepare-only", "--out", "demo", cwd=tmp_path)
    assert "held-out" in inspected
    assert (tmp_path / "demo" / "data" / "heldout" / "manifest.json").is_file()
