"""Codecs by name: a block of frames as bytes and back.

    delta-zstd   the default. Every frame of a block but the first is replaced by its difference to the frame before
                 (modulo 256, so nothing is lost), and the block is compressed with zstd. `benchmarks/codecs.py`
                 compares it with others: beside zlib it encodes seven times and reads twice as fast at the same size,
                 and in blocks of 16 frames it takes 0.65-1.1 times the bytes of a compressed npz
    delta-zlib   the same with zlib and blocks of 8 frames, as older sets have it
    jpeg-90 ...  a JPEG a frame with colours at full resolution, of the quality that the name says (50 to 100); loses
                 something, so it must be asked for. At 256 px a fifth of the lossless bytes

A damaged block is noticed: zlib and zstd carry checksums of what they hold, behind a JPEG stands its CRC-32.
"""

from __future__ import annotations

import abc
import dataclasses
import io
import math
import re
import struct
import threading
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import zstandard

DEFAULT_CODEC = "delta-zstd"
NAMES = "delta-zstd, delta-zlib, jpeg-50 to jpeg-100"


class CorruptRecordError(ValueError):
    """A record whose bytes cannot be what the writer wrote."""


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """A way to store blocks of frames.

    Args:
        name: As records and manifests say it.
        block_length: Frames of a block in what is written today; a record says its own.
        ratio: Times that a block's bytes can be at most in frames; more is a lie, refused before memory is spent.
        lossless: Whether all frames come back as they were.
    """

    name: str
    block_length: int
    ratio: int
    lossless: bool = True

    @abc.abstractmethod
    def encode(self, block: np.ndarray) -> bytes:
        """Bytes of frames (T, H, W, C) uint8; T is at most `block_length`."""

    @abc.abstractmethod
    def decode(self, data: bytes, shape: Sequence[int], targets: Mapping[int, np.ndarray]) -> None:
        """Fills frames (H, W, C) uint8 with those of a block, by their number in it.

        Args:
            data: The block.
            shape: (T, H, W, C) of all its frames.
            targets: Frame numbers, each with the array that it goes to.

        Raises:
            CorruptRecordError: The bytes are not a block of that shape.
        """


class _Deltas(Codec):
    """Compresses differences to the frame before."""

    def encode(self, block: np.ndarray) -> bytes:
        differences = block.copy()
        differences[1:] -= block[:-1]
        return self._compress(differences)

    def decode(self, data: bytes, shape: Sequence[int], targets: Mapping[int, np.ndarray]) -> None:
        raw = self._decompress(data, math.prod(shape))
        differences = np.frombuffer(raw, np.uint8).reshape(shape)
        frame, scratch = differences[0], np.empty(shape[1:], np.uint8)
        # frame by frame: np.add.accumulate walks pixel by pixel, which takes far longer
        for number in range(max(targets) + 1):
            target = targets.get(number, scratch)
            if number:
                np.add(differences[number], frame, out=target)
            elif target is not scratch:
                target[:] = frame
            if number or target is not scratch:
                frame = target

    @abc.abstractmethod
    def _compress(self, data: np.ndarray) -> bytes:
        """Bytes of an array of bytes."""

    @abc.abstractmethod
    def _decompress(self, data: bytes, size: int) -> bytes:
        """The `size` bytes that were compressed."""


class _Contexts(threading.local):
    """zstd's state, which takes longer to make than a small block to read, and may serve one thread alone."""

    def __init__(self) -> None:
        self.writer = zstandard.ZstdCompressor(3, write_checksum=True)  # higher levels: `benchmarks/codecs.py`
        self.reader = zstandard.ZstdDecompressor()


_contexts = _Contexts()


class _DeltaZstd(_Deltas):
    def _compress(self, data: np.ndarray) -> bytes:
        return _contexts.writer.compress(data.data)

    def _decompress(self, data: bytes, size: int) -> bytes:
        try:
            says = zstandard.get_frame_parameters(data)
            if says.content_size != size or not says.has_checksum:  # before memory is spent on it
                raise CorruptRecordError(f"bad image block: {says.content_size} bytes where {size} are wanted")
            return _contexts.reader.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptRecordError(f"bad image block: {error}") from error


class _DeltaZlib(_Deltas):
    def _compress(self, data: np.ndarray) -> bytes:
        return zlib.compress(data.data, 6)

    def _decompress(self, data: bytes, size: int) -> bytes:
        inflater = zlib.decompressobj()
        try:
            raw = inflater.decompress(data, size + 1)  # the limit keeps a hostile block from filling the memory
        except zlib.error as error:
            raise CorruptRecordError(f"bad image block: {error}") from error
        if len(raw) != size or not inflater.eof:
            raise CorruptRecordError(f"bad image block: it does not hold the {size} bytes that are wanted")
        return raw


class _Jpeg(Codec):
    """One JPEG with 4:4:4 colours a block, and its CRC-32."""

    def encode(self, block: np.ndarray) -> bytes:
        from PIL import Image

        (frame,) = block
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "jpeg", quality=int(self.name.removeprefix("jpeg-")), subsampling=0)
        return file.getvalue() + struct.pack("<I", zlib.crc32(file.getvalue()))

    def decode(self, data: bytes, shape: Sequence[int], targets: Mapping[int, np.ndarray]) -> None:
        from PIL import Image

        frames, height, width, _ = shape
        if frames != 1 or len(data) < 4 or struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
            raise CorruptRecordError("bad image block: its CRC-32 differs")
        try:
            image = Image.open(io.BytesIO(data[:-4]), formats=("JPEG",))
            if (image.size, image.mode) != ((width, height), "RGB"):  # before memory is spent on it
                raise CorruptRecordError(
                    f"bad image block: {image.mode} {image.size} where {width} x {height} is wanted"
                )
            targets[0][:] = np.asarray(image)
        except (OSError, SyntaxError, Image.DecompressionBombError, ValueError) as error:
            if isinstance(error, CorruptRecordError):
                raise
            raise CorruptRecordError(f"bad image block: {error}") from error


_LOSSLESS = {
    # ratios: a block of zstd has 4 bytes for 128 KB at least; deflate needs 2 bits for 258 bytes
    "delta-zstd": _DeltaZstd("delta-zstd", 16, 32_768),
    "delta-zlib": _DeltaZlib("delta-zlib", 8, 1032),
}


def codec_named(name: str) -> Codec:
    """The codec of that name.

    Raises:
        ValueError: There is none.
    """
    if name in _LOSSLESS:
        return _LOSSLESS[name]
    if isinstance(name, str) and re.fullmatch(r"jpeg-([5-9]\d|100)", name):
        return _Jpeg(name, 1, 1032, lossless=False)
    raise ValueError(f"codec {name!r} is not known; there are {NAMES}")


def psnr(error: float, count: int) -> float | None:
    """Decibel of a sum of squared errors over `count` values of 0..255; None where nothing is lost."""
    return None if error == 0 else 10 * math.log10(255**2 * count / error)
