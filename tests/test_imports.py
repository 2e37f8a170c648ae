"""Holds the direction of imports, and what each layer may use, by reading the source (nothing is imported)."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ivideogpt"
FILES = sorted(SOURCE.rglob("*.py"))

# Each layer may import itself and what stands in a lower row.
LAYERS = [
    {"config", "layout", "drawing", "charts"},
    {"models", "data"},
    {"metrics", "rollout", "zoo"},
    {"world_model"},
    {"training", "control"},
    {"recipes"},
    {"cli", "commands", "report", "play"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Within the lowest row the configuration may know the layout; what is published is checked by who measured it.
SIDEWAYS = {("config", "layout"), ("zoo", "metrics"), ("cli", "commands"), ("commands", "cli"), ("commands", "report")}

# Plain arithmetic only: no framework, no files, no logging.
NOT_IN_MODELS = set(
    "lightning pytorch_lightning logging os io pathlib json pickle yaml safetensors huggingface_hub".split()
)
# Extras and test oracles: where they are used they are imported inside the function.
NOT_AT_TOP = set(
    "gymnasium metaworld mujoco av h5py peft pyarrow ray lpips piqa scipy transformers lightning_sdk wandb".split()
)


def name_of(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def layer_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(file: Path, top_only: bool = False) -> set[str]:
    """The absolute dotted names that a file imports, anywhere in it or only when it is itself imported."""
    package = ["ivideogpt", *file.relative_to(SOURCE).parts[:-1]]
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if top_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file: Path) -> None:
    layer = layer_of(file)
    if layer == "__init__":  # the public face re-exports from every layer
        return
    assert layer in RANK, f"{name_of(file)}: give the layer {layer!r} a row in LAYERS"
    for name in imported(file):
        parts = name.split(".")
        if name == "ivideogpt":  # the public face, which everything below it must do without
            assert layer in LAYERS[-1], f"{name_of(file)} ({layer}) imports the package's public face"
        if len(parts) < 2 or parts[0] != "ivideogpt" or parts[1] not in RANK:
            continue
        allowed = parts[1] == layer or RANK[parts[1]] < RANK[layer] or (layer, parts[1]) in SIDEWAYS
        assert allowed, f"{name_of(file)} ({layer}) imports {name}"


@pytest.mark.parametrize("file", [file for file in FILES if layer_of(file) == "models"], ids=name_of)
def test_models_are_plain_arithmetic(file: Path) -> None:
    assert not {name.split(".")[0] for name in imported(file)} & NOT_IN_MODELS


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_extras_are_imported_where_used(file: Path) -> None:
    assert not {name.split(".")[0] for name in imported(file, top_only=True)} & NOT_AT_TOP


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short_and_say_what_they_are(file: Path) -> None:
    text = file.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{name_of(file)} does not begin with a docstring"
    assert len(text.splitlines()) <= 400


def test_the_walk_finds_the_package() -> None:
    assert {"config", "layout", "models", "cli"} <= {layer_of(file) for file in FILES}
    assert "torch" in {name.split(".")[0] for name in imported(SOURCE / "models" / "transformer.py")}
