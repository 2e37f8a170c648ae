"""One episode as the bytes of one safetensors record, of which a clip decompresses only the blocks it needs.

The video is cut into blocks of `BLOCK_LENGTH` frames. Within a block every frame but the first is replaced by its
difference to the frame before (modulo 256, so nothing is lost) and the block is compressed with zlib. Measured on
Meta-World / BAIR / RT-1 frames as a fraction of the raw bytes:

    block of          1       4       8       16 frames
    no difference     0.41/0.90/0.50  0.19/0.86/0.50  0.15/0.85/0.50  0.13/0.84/0.50
    difference                        0.17/0.56/0.44  0.13/0.50/0.43  0.11/0.47/0.42
    to the first                      0.18/0.60/0.45  0.15/0.57/0.46  0.13/0.62/0.46

Decoding takes 0.05-0.1 ms a frame at 64 px in all of them, so 8 is the compromise between size and the frames that a
clip decodes for nothing. zlib level 9 costs five times the time for 2 %; a spatial difference in the first frame gains
5 %: neither is worth it.

    blocks          uint8 (N,)                all compressed blocks one after another
    block_offsets   int64 (blocks + 1,)       where each begins
    actions         float32 (T, A)            absent without actions
    rewards         float32 (T,)              absent without rewards
    terminations    uint8 (T,)
    __metadata__    {"episode": JSON}         shape, codec, fps, camera, source, licence, metadata, checksum
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save as save_safetensors

from ivideogpt.data.episode import Episode

BLOCK_LENGTH = 8
CODEC = "delta-zlib"
_DTYPES = {"U8": np.uint8, "I64": np.int64, "F32": np.float32}
_MAX_HEADER = 16 * 2**20  # bytes; a larger header is a corrupt length, not an episode


class CorruptRecordError(ValueError):
    """A record whose bytes cannot be what the writer wrote."""


def encode_video(video: np.ndarray, block_length: int = BLOCK_LENGTH) -> list[bytes]:
    """Compresses a video (T, H, W, C) uint8 into blocks of `block_length` frames."""
    blocks = []
    for first in range(0, len(video), block_length):
        block = video[first : first + block_length].copy()
        block[1:] -= video[first : first + len(block) - 1]
        blocks.append(zlib.compress(block.tobytes(), 6))
    return blocks


def decode_block(data: bytes, shape: Sequence[int]) -> np.ndarray:
    """Decompresses one block into frames of `shape` (frames, H, W, C).

    Raises:
        CorruptRecordError: The bytes are not a block of that shape.
    """
    size = int(np.prod(shape))
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data, size + 1)  # the limit keeps a hostile block from filling the memory
    except zlib.error as error:
        raise CorruptRecordError(f"bad image block: {error}") from error
    if len(raw) != size or not inflater.eof:
        raise CorruptRecordError(f"bad image block: it does not hold the {size} bytes of shape {tuple(shape)}")
    return np.add.accumulate(np.frombuffer(raw, np.uint8).reshape(shape), axis=0, dtype=np.uint8)


def encode_episode(episode: Episode, block_length: int = BLOCK_LENGTH) -> bytes:
    """Encodes an episode as the bytes of a safetensors file."""
    blocks = encode_video(episode.video, block_length)
    assert episode.terminations is not None
    tensors: dict[str, np.ndarray] = {
        "block_offsets": np.cumsum([0] + [len(block) for block in blocks], dtype=np.int64),
        "terminations": episode.terminations.astype(np.uint8),
    }
    if episode.actions is not None:
        tensors["actions"] = np.ascontiguousarray(episode.actions)
    if episode.rewards is not None:
        tensors["rewards"] = np.ascontiguousarray(episode.rewards)
    header = {
        "shape": list(episode.video.shape),
        "codec": CODEC,
        "block_length": block_length,
        "fps": float(episode.fps),
        "camera": episode.camera,
        "source": episode.source,
        "licence": episode.licence,
        "metadata": episode.metadata,
        "checksum": _checksum(tensors),
    }
    tensors["blocks"] = np.frombuffer(b"".join(blocks), np.uint8)
    return save_safetensors(tensors, {"episode": json.dumps(header, sort_keys=True)})


def _checksum(tensors: dict[str, np.ndarray]) -> int:
    """CRC-32 of everything but the blocks (zlib checks those itself)."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].tobytes(), zlib.crc32(name.encode(), value))
    return value


@dataclasses.dataclass
class Record:
    """An encoded episode of which only what is asked for is read.

    `read(offset, size)` returns bytes of the record; offsets count from its first byte.
    """

    read: Callable[[int, int], bytes]
    size: int
    header: dict[str, Any]
    tensors: dict[str, np.ndarray]  # everything but the blocks
    _blocks_at: int = 0

    @classmethod
    def open(cls, read: Callable[[int, int], bytes], size: int) -> Record:
        """Reads the header and the small tensors of a record of `size` bytes and checks them.

        Raises:
            CorruptRecordError: Anything that an intact record cannot hold.
        """
        if size < 8:
            raise CorruptRecordError(f"{size} bytes are too few for a record")
        (header_size,) = struct.unpack("<Q", read(0, 8))
        if header_size > min(size - 8, _MAX_HEADER):
            raise CorruptRecordError(f"header of {header_size} bytes in a record of {size}")
        try:
            entries = json.loads(read(8, header_size))
            header = json.loads(entries.pop("__metadata__")["episode"])
            tensors = {}
            spans = {name: _span(entry, size - 8 - header_size) for name, entry in entries.items()}
            for name, (begin, end) in spans.items():
                if name != "blocks":
                    array = np.frombuffer(read(8 + header_size + begin, end - begin), _DTYPES[entries[name]["dtype"]])
                    tensors[name] = array.reshape(entries[name]["shape"])
            blocks_at, blocks_end = spans["blocks"]
            offsets, shape = tensors["block_offsets"], header["shape"]
            expected = -(-shape[0] // header["block_length"]) + 1
            bad_offsets = len(offsets) != expected or offsets[0] != 0 or (np.diff(offsets) <= 0).any()
            if bad_offsets or offsets[-1] != blocks_end - blocks_at:
                raise CorruptRecordError(f"block offsets {offsets.tolist()[:4]}... do not fit a video of shape {shape}")
            if header["codec"] != CODEC:
                raise CorruptRecordError(f"codec {header['codec']!r} is not known (known: {CODEC!r})")
            if header["checksum"] != _checksum(tensors):
                raise CorruptRecordError("checksum of actions, rewards and terminations differs")
        except CorruptRecordError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptRecordError(f"unreadable header: {type(error).__name__}: {error}") from error
        return cls(read, size, header, tensors, 8 + header_size + blocks_at)

    def __len__(self) -> int:
        return self.header["shape"][0]

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decodes the frames with these numbers, in this order, repeats allowed: uint8 (len(indices), H, W, C).

        Raises:
            IndexError: A frame that the episode does not have.
            CorruptRecordError: A block that is not what was written.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        length, height, width, channels = self.header["shape"]
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < length):
            raise IndexError(f"frames {wanted.tolist()} of an episode of {length}")
        block_length, offsets = self.header["block_length"], self.tensors["block_offsets"]
        out = np.empty((len(wanted), height, width, channels), np.uint8)
        for block in np.unique(wanted // block_length):
            first = int(block) * block_length
            data = self.read(self._blocks_at + int(offsets[block]), int(offsets[block + 1] - offsets[block]))
            decoded = decode_block(data, (min(block_length, length - first), height, width, channels))
            here = wanted // block_length == block
            out[here] = decoded[wanted[here] - first]
        return out

    def episode(self) -> Episode:
        """Decodes everything.

        Raises:
            CorruptRecordError: A bad block, or values that no episode may hold.
        """
        header, tensors = self.header, self.tensors
        try:
            return Episode(
                video=self.frames(np.arange(len(self))),
                actions=tensors.get("actions"),
                rewards=tensors.get("rewards"),
                terminations=tensors["terminations"].astype(bool),
                fps=header["fps"],
                camera=header["camera"],
                source=header["source"],
                licence=header["licence"],
                metadata=header["metadata"],
            )
        except (KeyError, TypeError) as error:
            raise CorruptRecordError(f"unreadable record: {error}") from error


def decode_episode(data: bytes) -> Episode:
    """Decodes the bytes of one record, as a plain WebDataset yields them under `safetensors`."""
    return Record.open(lambda offset, size: data[offset : offset + size], len(data)).episode()


def _span(entry: dict[str, Any], limit: int) -> tuple[int, int]:
    """Begin and end of a tensor, checked against dtype, shape and the bytes there are."""
    begin, end = entry["data_offsets"]
    size = int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(_DTYPES[entry["dtype"]]).itemsize
    if not 0 <= begin <= end <= limit or end - begin != size:
        raise CorruptRecordError(f"tensor at {begin}..{end} with shape {entry['shape']} in {limit} bytes")
    return begin, end
