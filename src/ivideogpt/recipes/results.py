"""What a stage leaves behind: weights in the published layout, their fingerprint, and the stage's record.

OUTPUT/recipe.yaml              the resolved recipe
OUTPUT/STAGE/stage.json         the record: state, settings, inputs, time; a finished stage is skipped by it
OUTPUT/STAGE/tokenizer/, transformer/, ivideogpt.json, recipe.yaml   the weights, or an adapter's files
OUTPUT/STAGE/checkpoints/, metrics.csv, tensorboard/, strips/        the training's own
OUTPUT/model/                   the last world model of the recipe
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.zoo import published
from ivideogpt.zoo.adapter import is_adapter
from ivideogpt.zoo.checkpoint import ADAPTER_FILES, TOKENIZER_CONFIG, TOKENIZER_WEIGHTS, load_parts
from ivideogpt.zoo.folder import finish_interrupted_save, replacing_files
from ivideogpt.zoo.side_file import SIDE_FILE, read_side_file, side_file_text
from ivideogpt.zoo.tensors import build_on_meta, check_header, read_header, read_tensors, write_tensors

RECORD = "stage.json"


def save_tokenizer(folder: Path, tokenizer: CompressiveTokenizer, extras: dict[str, Any], recipe: str) -> None:
    """Writes a tokenizer alone, in the layout that a whole world model has, so that it can be loaded from there.

    Raises:
        OSError: if something cannot be written; the old files are then whole.
    """
    with replacing_files(folder) as staging:
        (staging / "tokenizer").mkdir()
        write_tensors(tokenizer.state_dict(), staging / TOKENIZER_WEIGHTS, {}, None)
        fields = published.tokenizer_fields(tokenizer.config, None)
        (staging / TOKENIZER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        dropout = tokenizer.config.attention_dropout
        (staging / SIDE_FILE).write_text(
            side_file_text({**extras, "tokenizer_attention_dropout": dropout}), encoding="utf-8"
        )
        (staging / "recipe.yaml").write_text(recipe, encoding="utf-8")


def load_tokenizer(folder: Path, device: str = "cpu") -> CompressiveTokenizer:
    """Tokenizer in ``folder``, be it one that was saved alone, a whole world model, or an adapter: its base's.

    Args:
        folder: of the tokenizer.
        device: where the weights go; on ``meta`` none is read.

    Raises:
        ValueError: if a file is missing or not what it should be.
    """
    finish_interrupted_save(folder)
    if is_adapter(folder):
        return load_parts(folder).tokenizer
    for name in (TOKENIZER_CONFIG, TOKENIZER_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no tokenizer: there is no {name}")
    dropout = read_side_file(folder).get("tokenizer_attention_dropout", 0.1)
    fields = published.read_json(folder / TOKENIZER_CONFIG)
    config = published.tokenizer_config(fields, folder / TOKENIZER_CONFIG, dropout)
    header = read_header(folder / TOKENIZER_WEIGHTS)
    tokenizer = build_on_meta(lambda: CompressiveTokenizer(config), folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    check_header(header, shapes, folder / TOKENIZER_CONFIG)
    tokenizer.load_state_dict(read_tensors(header, torch.device(device), None), assign=True)
    return tokenizer


def fingerprint(folder: Path) -> str:
    """Hash of the weights and configurations in ``folder``."""
    digest = hashlib.sha256()
    paths = [path for part in ("tokenizer", "transformer") for path in sorted((folder / part).glob("*"))]
    for path in [*paths, *(folder / name for name in ADAPTER_FILES if (folder / name).is_file())]:
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """Record of the stage in ``folder``; None where it never began.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / RECORD
    return published.read_json(path) if path.is_file() else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replaces the record of the stage in ``folder``, as one."""
    write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a text file as one; what dies in the middle leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Lines that say where two settings differ: ``trainer.max_steps: 100 -> 200``.

    In a list of classes, such as callbacks, those of one name are compared, and others are there or not.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and (by_name := _named(old, new)) is not None:
        before, after = by_name
        if list(before) == list(after) or before.keys() != after.keys():
            yield from differences(before, after, where)
        elif old != new:  # the same ones
            yield f"{where}: their order was {', '.join(before)} and is {', '.join(after)}"
    elif old != new:
        first, second = _show(old, new)
        yield f"{where}: {first} -> {second}"


def _named(*lists: list[Any]) -> list[dict[str, Any]] | None:
    """Classes in ``lists`` by their names; None where something else is in one, or a name twice."""
    found = []
    for items in lists:
        if not items or not all(isinstance(item, dict) and "class_path" in item for item in items):
            return None
        named = {str(item["class_path"]).rpartition(".")[2]: item for item in items}
        if len(named) < len(items):
            return None
        found.append(named)
    return found


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()
_WIDTH = 70
"""Characters of a value that are shown."""


def _show(old: Any, new: Any) -> tuple[str, str]:
    """Two values, long ones cut to where they begin to differ."""
    texts = repr(old), repr(new)
    if max(map(len, texts)) <= _WIDTH:
        return texts
    pairs = enumerate(zip(*texts, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(map(len, texts)))
    start = same - _WIDTH // 3 if same > _WIDTH // 3 + len("...") else 0
    first, second = (_cut(text, start) for text in texts)
    return first, second


def _cut(text: str, start: int) -> str:
    rest = text[start:]
    return ("..." if start else "") + (rest if len(rest) <= _WIDTH else f"{rest[: _WIDTH - 3]}...")
