"""One episode as the bytes of one safetensors record, of which a clip decompresses only the blocks it needs.

The video is cut into blocks of a few frames, each compressed alone by a codec (see `blocks`), which the record names.

    blocks          uint8 (N,)                all compressed blocks one after another
    block_offsets   int64 (blocks + 1,)       where each begins
    actions         float32 (T, A)            absent without actions
    rewards         float32 (T,)              absent without rewards
    terminations    uint8 (T,)
    __metadata__    {"episode": JSON}         shape, codec, block_length, fps, camera, source, licence, metadata,
                                              checksum, and squared_error over all values where something is lost
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save as save_safetensors

from ivideogpt.data.blocks import DEFAULT_CODEC, Codec, CorruptRecordError, codec_named
from ivideogpt.data.episode import Episode
from ivideogpt.data.safetensors_header import read_header

__all__ = ["CorruptRecordError", "Record", "decode_episode", "encode_episode", "encode_video"]

_TYPES = {"blocks": "u1", "block_offsets": "<i8", "actions": "<f4", "rewards": "<f4", "terminations": "u1"}
_HEAD = 8192  # bytes read at first: most often all that stands in front of the blocks


def encode_video(video: np.ndarray, codec: Codec) -> list[bytes]:
    """Compresses a video (T, H, W, C) uint8 into blocks of `codec.block_length` frames."""
    length = codec.block_length
    return [codec.encode(np.ascontiguousarray(video[n : n + length])) for n in range(0, len(video), length)]


def encode_episode(episode: Episode, codec: str = DEFAULT_CODEC) -> bytes:
    """Encodes an episode as the bytes of a safetensors file.

    Raises:
        ValueError: No codec has that name.
    """
    coder = codec_named(codec)
    blocks = encode_video(episode.video, coder)
    assert episode.terminations is not None
    tensors: dict[str, np.ndarray] = {
        "block_offsets": np.cumsum([0] + [len(block) for block in blocks], dtype=np.int64),
        "terminations": episode.terminations.astype(np.uint8),
    }
    if episode.actions is not None:
        tensors["actions"] = np.ascontiguousarray(episode.actions)
    if episode.rewards is not None:
        tensors["rewards"] = np.ascontiguousarray(episode.rewards)
    header: dict[str, Any] = {
        "shape": list(episode.video.shape),
        "codec": codec,
        "block_length": coder.block_length,
        "fps": float(episode.fps),
        "camera": episode.camera,
        "source": episode.source,
        "licence": episode.licence,
        "metadata": episode.metadata,
        "checksum": _checksum(tensors),
    }
    if not coder.lossless:
        header["squared_error"] = _squared_error(episode.video, blocks, coder)
    tensors["blocks"] = np.frombuffer(b"".join(blocks), np.uint8)
    return save_safetensors(tensors, {"episode": json.dumps(header, sort_keys=True)})


def _squared_error(video: np.ndarray, blocks: Sequence[bytes], codec: Codec) -> int:
    """Sum over all values of what was written, read back."""
    error, back = 0, np.empty(video.shape[1:], np.uint8)
    for number, block in enumerate(blocks):
        first = number * codec.block_length
        shape = (min(codec.block_length, len(video) - first), *back.shape)
        for inside in range(shape[0]):
            codec.decode(block, shape, {inside: back})
            error += int(((video[first + inside].astype(np.int64) - back) ** 2).sum())
    return error


def _checksum(tensors: dict[str, np.ndarray]) -> int:
    """CRC-32 of everything but the blocks (those have their own)."""
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
    codec: Codec
    _blocks_at: int

    @classmethod
    def open(cls, read: Callable[[int, int], bytes], size: int) -> Record:
        """Reads the header and the small tensors of a record of `size` bytes and checks them.

        Raises:
            CorruptRecordError: Anything that an intact record cannot hold.
        """
        head = read(0, min(size, _HEAD))

        def part(begin: int, count: int) -> bytes:
            return head[begin : begin + count] if begin + count <= len(head) else read(begin, count)

        try:
            metadata, found = read_header(part, size)
            header = json.loads(metadata["episode"])
            tensors = {}
            for name, tensor in found.items():
                if name not in _TYPES or tensor.dtype != _TYPES[name]:  # unknown ones would be read for nothing
                    raise CorruptRecordError(f"tensor {name!r} of type {tensor.dtype} is none of a record")
                if name != "blocks":
                    tensors[name] = tensor.array(part(tensor.begin, tensor.end - tensor.begin))
            blocks = found["blocks"]
            codec = codec_named(header["codec"])
            _check_shape(header, tensors, blocks.end - blocks.begin, codec)
            squared = 0 if codec.lossless else header["squared_error"]
            if type(squared) is not int or not 0 <= squared <= 255**2 * math.prod(header["shape"]):
                raise CorruptRecordError(f"a squared error of {squared!r}")
            if header["checksum"] != _checksum(tensors):
                raise CorruptRecordError("checksum of actions, rewards and terminations differs")
        except CorruptRecordError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptRecordError(f"unreadable header: {type(error).__name__}: {error}") from error
        return cls(read, size, header, tensors, codec, blocks.begin)

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
        places: dict[int, int] = {}  # of each frame in `out`
        repeats = [
            (place, frame) for place, frame in enumerate(wanted.tolist()) if places.setdefault(frame, place) != place
        ]
        blocks: dict[int, dict[int, np.ndarray]] = {}
        for frame, place in places.items():
            blocks.setdefault(frame // block_length, {})[frame % block_length] = out[place]
        for first, last in _runs(sorted(blocks)):  # one reading for neighbours, which may come from afar
            begin, end = int(offsets[first]), int(offsets[last + 1])
            data = self.read(self._blocks_at + begin, end - begin)
            for block in range(first, last + 1):
                frames = min(block_length, length - block * block_length)
                mine = data[int(offsets[block]) - begin : int(offsets[block + 1]) - begin]
                self.codec.decode(mine, (frames, height, width, channels), blocks[block])
        for place, frame in repeats:
            out[place] = out[places[frame]]
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


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of neighbours in ascending numbers."""
    firsts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    lasts = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return list(zip(firsts, lasts, strict=True))


def _check_shape(header: dict[str, Any], tensors: dict[str, np.ndarray], stored: int, codec: Codec) -> None:
    """Checks the shape of the video against its blocks, so that a lie is refused before memory is spent on it."""
    shape, block_length, offsets = header["shape"], header["block_length"], tensors["block_offsets"]
    if (
        len(shape) != 4
        or shape[3] != 3
        or not all(type(value) is int and value > 0 for value in (*shape, block_length))
    ):
        raise CorruptRecordError(f"a video of shape {shape} in blocks of {block_length}")
    sizes = np.diff(offsets)
    bad_offsets = offsets.shape != (-(-shape[0] // block_length) + 1,) or offsets[0] != 0 or (sizes <= 0).any()
    if bad_offsets or offsets[-1] != stored:
        raise CorruptRecordError(f"block offsets {offsets.tolist()[:4]}... do not fit a video of shape {shape}")
    frame, last = math.prod(shape[1:]), shape[0] - (len(sizes) - 1) * block_length
    frames = [block_length] * (len(sizes) - 1) + [last]
    if any(count * frame > int(size) * codec.ratio for count, size in zip(frames, sizes, strict=True)):
        raise CorruptRecordError(f"{stored} bytes cannot hold a video of shape {shape}")
    for name, tensor in tensors.items():
        if name != "block_offsets" and tensor.shape[:1] != (shape[0],):
            raise CorruptRecordError(f"{name} of shape {tensor.shape} for {shape[0]} frames")
