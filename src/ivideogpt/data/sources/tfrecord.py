"""Reads TFRecord files and the tf.train.Example messages in them without TensorFlow.

A file is a row of records, all numbers little-endian:

    uint64 length | uint32 masked CRC-32C of those 8 bytes | `length` bytes of data | uint32 masked CRC-32C of the data

An Example is a protocol buffer: a map from names to lists of bytes, floats or integers.

The CRC is linear in the data, so a block of 64 bytes is one table look-up for each of its bytes, all blocks at once,
and neighbouring blocks are then joined pair by pair, as a zero block in front of the data changes nothing.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Container, Iterable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.sources.frames import Job, failing

Feature = np.ndarray | list[memoryview]  # float32 (N,), int64 (N,), or N byte strings

PART_RECORDS = 64
"""Records of one part of a long file."""

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_BLOCK = 64  # bytes; its tables of 64 KiB stay in the second-level cache
_PIECE = 2**18  # bytes summed at once, so that what lies between stays in the cache too


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


_TABLE = _byte_table()
_TABLE_LIST = [int(entry) for entry in _TABLE]  # plain integers are faster one by one


def _advance(crc: np.ndarray) -> np.ndarray:
    """The remainders after one more zero byte."""
    return (crc >> np.uint32(8)) ^ _TABLE[crc & np.uint32(255)]


def _block_tables() -> np.ndarray:
    """Remainders (_BLOCK, 256) of a block that holds one byte at one place and zeros elsewhere."""
    tables = [_TABLE]
    for _ in range(_BLOCK - 1):
        tables.append(_advance(tables[-1]))
    return np.stack(tables[::-1])


_BLOCK_TABLES = _block_tables()


def _shift(tables: np.ndarray, crc: np.ndarray) -> np.ndarray:
    """Applies a linear map, given as the images (4, 256) of each byte, to remainders."""
    parts = np.ascontiguousarray(crc, "<u4").view(np.uint8).reshape(-1, 4)
    return tables[0][parts[:, 0]] ^ tables[1][parts[:, 1]] ^ tables[2][parts[:, 2]] ^ tables[3][parts[:, 3]]


@cache
def _shift_tables(level: int) -> np.ndarray:
    """The map of `_BLOCK * 2**level` zero bytes as tables (4, 256)."""
    if level:
        half = _shift_tables(level - 1)
        return np.stack([_shift(half, row) for row in half])
    tables = np.arange(256, dtype=np.uint32)[None] << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(_BLOCK):
        tables = _advance(tables)
    return tables


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of `data`.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    view = memoryview(data).cast("B")
    if len(view) < 2 * _BLOCK:
        return _few(view, 0xFFFFFFFF) ^ 0xFFFFFFFF
    crc, start = 0xFFFFFFFF, 0
    while start < len(view):
        piece = view[start : start + _PIECE]
        crc = _few(piece, crc) if len(piece) < 4 else _many(np.frombuffer(piece, np.uint8), crc)
        start += len(piece)
    return crc ^ 0xFFFFFFFF


def _few(view: memoryview, crc: int) -> int:
    for byte in view:
        crc = (crc >> 8) ^ _TABLE_LIST[(crc ^ byte) & 255]
    return crc


def _many(data: np.ndarray, crc: int) -> int:
    """Carries a remainder on over bytes (N,), N >= 4."""
    blocks = np.zeros(-(-len(data) // _BLOCK) * _BLOCK, np.uint8)
    front = len(blocks) - len(data)
    blocks[front:] = data
    # what was summed so far is the same as a change of the first four bytes
    blocks[front : front + 4] ^= np.frombuffer(struct.pack("<I", crc), np.uint8)
    columns = np.ascontiguousarray(blocks.reshape(-1, _BLOCK).T)
    sums = _BLOCK_TABLES[0].take(columns[0])
    for table, column in zip(_BLOCK_TABLES[1:], columns[1:], strict=True):
        sums ^= table.take(column)
    level = 0
    while len(sums) > 1:
        if len(sums) % 2:
            sums = np.concatenate([np.zeros(1, np.uint32), sums])
        sums = _shift(_shift_tables(level), sums[::2]) ^ sums[1::2]
        level += 1
    return int(sums[0])


def masked(crc: int) -> int:
    """The CRC as TFRecord files keep it: turned by 15 bits, plus a constant."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def record_offsets(path: str | Path) -> Iterator[int]:
    """Offset of each record of a file in turn; only the headers are read.

    Raises:
        ValueError: A damaged header or a file that ends within a record, after the offsets of the records before it.
    """
    path = Path(path)
    with _open(path) as stream:
        size = path.stat().st_size
        offset = 0
        while offset < size:
            end = offset + 16 + _length(stream, path, offset)
            if end > size:
                raise ValueError(f"{path}: the record at byte {offset} is cut off: {end} bytes needed, {size} there")
            yield offset
            offset = end
            stream.seek(offset)


def read_record(path: str | Path, offset: int) -> bytes:
    """Data of the record at `offset`.

    Raises:
        ValueError: There is no whole record, or one of its checksums is wrong.
    """
    path = Path(path)
    with _open(path) as stream:
        stream.seek(offset)
        length = _length(stream, path, offset)
        if offset + 16 + length > path.stat().st_size:  # before a wrong length takes all memory
            raise ValueError(f"{path}: the record at byte {offset} of {length} bytes is cut off")
        data = stream.read(length)
        tail = stream.read(4)
    if len(data) < length or len(tail) < 4:
        raise ValueError(f"{path}: the record at byte {offset} of {length} bytes is cut off")
    if masked(crc32c(data)) != int.from_bytes(tail, "little"):
        raise ValueError(f"{path}: the data of the record at byte {offset} do not fit their checksum")
    return data


def read_records(path: str | Path) -> Iterator[bytes]:
    """Data of every record of a file; raises ValueError as `record_offsets` and `read_record` do."""
    for offset in record_offsets(path):
        yield read_record(path, offset)


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None


def _length(stream: IO[bytes], path: Path, offset: int) -> int:
    head = stream.read(12)
    if len(head) < 12:
        raise ValueError(f"{path}: the record at byte {offset} is cut off within its header")
    if masked(crc32c(head[:8])) != int.from_bytes(head[8:], "little"):
        raise ValueError(f"{path}: the length of the record at byte {offset} does not fit its checksum")
    return int.from_bytes(head[:8], "little")


def record_jobs(
    files: Iterable[tuple[Path, str, int | None]], decode: Callable[[bytes, str], Episode]
) -> Iterator[Job]:
    """The episodes of files that hold one episode a record, each read when its job is called.

    Damage that hides the rest of a file becomes a job that raises, so that the other files are still read.

    Args:
        files: (file, prefix of its keys, records it should hold or None).
        decode: Makes an episode of a record's data and its key.
    """
    for path, prefix, expected in files:
        count = 0
        try:
            for offset in record_offsets(path):
                key = f"{prefix}-{count:05d}"
                yield key, partial(_episode_at, path, offset, key, decode)
                count += 1
            if expected is not None and count != expected:
                reason = f"{path} holds {count} records, but {expected} are said to be there"
                yield f"{prefix}-count", partial(failing, reason, max(expected - count, 1))
        except (ValueError, OSError) as error:
            yield f"{prefix}-rest-after-{count}", partial(failing, str(error), max((expected or 0) - count, 1))


@dataclasses.dataclass(frozen=True)
class RecordJobs:
    """The episodes of files that hold one a record, as (key, how to read it); see `record_jobs`.

    Args:
        files: (file, prefix of its keys, records it should hold or None).
        decode: Makes an episode of a record's data and its key.
        between: First and last but one record, where it is a part of one file; with None for the last, all that is
            there behind the first, and what is wrong with the file.
        count: Records of a part.
        size: Bytes of a part, about.
    """

    files: tuple[tuple[Path, str, int | None], ...]
    decode: Callable[[bytes, str], Episode]
    between: tuple[int, int | None] = (0, None)
    count: int = 0
    size: int = 0

    def __iter__(self) -> Iterator[Job]:
        return islice(record_jobs(self.files, self.decode), *self.between)

    def parts(self) -> Iterator[RecordJobs]:
        """The same in parts of about `PART_RECORDS` records; of files only headers are read, to count them."""
        for file in self.files:
            path, _, expected = file
            count = expected
            if count is None:
                count = sum(1 for _ in record_jobs([file], self.decode))
            size = path.stat().st_size if path.is_file() else 0
            starts = range(0, max(count - PART_RECORDS // 2, 1), PART_RECORDS)
            for start in starts:
                last = start == starts[-1]
                end = count if last else start + PART_RECORDS
                yield dataclasses.replace(
                    self,
                    files=(file,),
                    between=(start, None if last else end),
                    count=end - start,
                    size=size * (end - start) // max(count, 1),
                )


def _episode_at(path: Path, offset: int, key: str, decode: Callable[[bytes, str], Episode]) -> Episode:
    try:
        return decode(read_record(path, offset), key)
    except (ValueError, OSError) as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}, record at byte {offset}: {text}") from error


def parse_example(data: bytes | memoryview, names: Container[str] | None = None) -> dict[str, Feature]:
    """Features of a serialised tf.train.Example.

    Args:
        data: The message.
        names: Features wanted; None gives all.

    Raises:
        ValueError: Not such a message.
    """
    features: dict[str, Feature] = {}
    for field, content in _fields(memoryview(data)):
        if field != 1 or not isinstance(content, memoryview):
            continue
        for inner, entry in _fields(content):
            if inner != 1 or not isinstance(entry, memoryview):
                continue
            name, value = "", memoryview(b"")
            for place, part in _fields(entry):
                if isinstance(part, memoryview) and place == 1:
                    name = bytes(part).decode("utf-8", "replace")
                elif isinstance(part, memoryview) and place == 2:
                    value = part
            if names is None or name in names:
                features[name] = _feature(value)
    return features


def _feature(data: memoryview) -> Feature:
    """The one list of a tf.train.Feature; an empty one is a list of no floats."""
    feature: Feature = np.zeros(0, np.float32)
    for kind, content in _fields(data):
        if kind not in (1, 2, 3) or not isinstance(content, memoryview):
            continue
        values = [value for field, value in _fields(content) if field == 1]
        if kind == 1:
            feature = [value for value in values if isinstance(value, memoryview)]
        elif kind == 2:  # packed in one piece, or one number a field: both are runs of four bytes
            joined = b"".join(value for value in values if isinstance(value, memoryview))
            if len(joined) % 4:
                raise ValueError(f"a list of floats has {len(joined)} bytes, which is no multiple of 4")
            feature = np.frombuffer(joined, "<f4").astype(np.float32, copy=False)
        else:
            parts = [_varints(v) if isinstance(v, memoryview) else _signed(v) for v in values]
            feature = np.concatenate([np.zeros(0, np.int64), *parts])
    return feature


def _signed(value: int) -> np.ndarray:
    return np.array([value & 0xFFFFFFFFFFFFFFFF], np.uint64).view(np.int64)


def _varints(data: memoryview) -> np.ndarray:
    """Packed variable-length integers -> int64 (N,)."""
    raw = np.frombuffer(data, np.uint8)
    last = raw < 128  # the last byte of each number
    if last.all():
        return raw.astype(np.int64)
    if not last[-1]:
        raise ValueError("a list of integers is cut off")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError(f"an integer of {lengths.max()} bytes; 10 are the most")
    places = np.arange(len(raw)) - np.repeat(starts, lengths)
    bits = (raw & 127).astype(np.uint64) << (7 * places).astype(np.uint64)  # the tenth byte's spare bits fall off
    return np.bitwise_or.reduceat(bits, starts).view(np.int64)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(number, content) of each field of a message; four and eight bytes come as bytes, variable ones as an int."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"not a tf.train.Example: wire type {kind}")
        if position + size > len(data):
            raise ValueError("not a tf.train.Example: a field ends beyond the message")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """One variable-length integer and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("not a tf.train.Example: an integer does not end")
