"""Finds damage in what `torch.save` wrote: its archives hold a checksum of each record, which `torch.load` ignores."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO


def check_archive(path: str | os.PathLike[str], places: Iterable[tuple[int, int]] | None = None) -> None:
    """Reads a file that `torch.save` wrote and compares its checksums (CRC-32).

    Args:
        path: the file.
        places: offset and length of each archive in it, where it holds several; None if it is one.

    Raises:
        ValueError: if a record is damaged.
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        if places is None:
            _check(file, Path(path))
            return
        for offset, length in sorted(places):
            file.seek(offset)
            _check(io.BytesIO(file.read(length)), Path(path))


def _check(file: IO[bytes], path: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error  # in the table of its records
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged!r} is wrong")


def write_checksum(path: Path) -> None:
    """Writes the checksum of a file that has none inside to ``NAME.crc32`` beside it."""
    _checksum_file(path).write_text(f"{zlib.crc32(path.read_bytes()):08x}", encoding="ascii")


def check_checksum(path: Path) -> None:
    """Compares a file with what :func:`write_checksum` wrote, where it did.

    Raises:
        ValueError: if it is another.
    """
    noted = _checksum_file(path)
    if noted.is_file() and noted.read_bytes().strip() != b"%08x" % zlib.crc32(path.read_bytes()):
        raise ValueError(f"{path} is damaged: its checksum is wrong")


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.crc32")
