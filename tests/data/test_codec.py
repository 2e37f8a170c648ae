"""Records: lossless, random access to blocks, and no corrupt byte gets through."""

from __future__ import annotations

import io
import json
import resource
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from PIL import Image
from safetensors.numpy import load

from ivideogpt.data.blocks import DEFAULT_CODEC, codec_named
from ivideogpt.data.codec import CorruptRecordError, Record, decode_episode, encode_episode, encode_video
from ivideogpt.data.episode import Episode

BLOCK_LENGTH = codec_named(DEFAULT_CODEC).block_length
LOSSLESS = ["delta-zstd", "delta-zlib"]


def opened(data: bytes) -> Record:
    return Record.open(lambda offset, size: data[offset : offset + size], len(data))


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("action_dim", [None, 3])
def test_lossless(make_episode: Callable[..., Episode], codec: str, length: int, action_dim: int | None) -> None:
    episode = make_episode(length, action_dim=action_dim, camera="corner", metadata={"task": "x", "n": [1, 2.5]})
    back = decode_episode(encode_episode(episode, codec))
    np.testing.assert_array_equal(back.video, episode.video)
    for name in ("actions", "rewards", "terminations"):
        np.testing.assert_array_equal(getattr(back, name), getattr(episode, name))
    for name in ("fps", "camera", "source", "licence", "metadata"):
        assert getattr(back, name) == getattr(episode, name)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_noise_is_lossless(codec: str) -> None:
    """Differences wrap around in uint8."""
    video = np.random.default_rng(0).integers(0, 256, (20, 5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_episode(encode_episode(Episode(video), codec)).video, video)


def test_a_record_is_a_safetensors_file(make_episode: Callable[..., Episode]) -> None:
    tensors = load(encode_episode(make_episode(10)))
    assert set(tensors) == {"blocks", "block_offsets", "actions", "rewards", "terminations"}


def test_only_the_blocks_of_the_clip_are_read(make_episode: Callable[..., Episode]) -> None:
    episode = make_episode(5 * BLOCK_LENGTH)
    data = encode_episode(episode)
    reads: list[tuple[int, int]] = []

    def read(offset: int, size: int) -> bytes:
        reads.append((offset, size))
        return data[offset : offset + size]

    record = Record.open(read, len(data))
    reads.clear()
    wanted = [BLOCK_LENGTH + 1, 2 * BLOCK_LENGTH - 1, BLOCK_LENGTH + 1, 3 * BLOCK_LENGTH]
    np.testing.assert_array_equal(record.frames(wanted), episode.video[wanted])
    blocks = encode_video(episode.video, codec_named(DEFAULT_CODEC))
    assert [size for _, size in reads] == [len(blocks[1]), len(blocks[3])]
    reads.clear()
    wanted = [2 * BLOCK_LENGTH, 5, BLOCK_LENGTH, 4 * BLOCK_LENGTH]
    np.testing.assert_array_equal(record.frames(wanted), episode.video[wanted])
    assert [size for _, size in reads] == [sum(map(len, blocks[:3])), len(blocks[4])]  # neighbours at once


def test_frames_outside(make_episode: Callable[..., Episode]) -> None:
    record = opened(encode_episode(make_episode(10)))
    for wanted in ([10], [-1]):
        with pytest.raises(IndexError, match="of an episode of 10"):
            record.frames(wanted)


@pytest.mark.parametrize("codec", [*LOSSLESS, "jpeg-95"])
def test_every_flipped_byte_is_noticed(make_episode: Callable[..., Episode], codec: str) -> None:
    """Flips each byte of a small record in turn: an error, or (in JSON's free text) a visible change, never silence."""
    data = encode_episode(make_episode(3, size=4, action_dim=1), codec)
    original = decode_episode(data)
    header_end = 8 + int.from_bytes(data[:8], "little")
    silent = []
    for position in range(len(data)):
        spoilt = bytearray(data)
        spoilt[position] ^= 0x55
        try:
            back = decode_episode(bytes(spoilt))
        except (ValueError, IndexError, MemoryError):
            continue
        arrays = all(
            np.array_equal(getattr(back, name), getattr(original, name)) for name in ("video", "actions", "rewards")
        )
        assert arrays, f"byte {position} changed the recording unnoticed"
        silent.append(position)
    assert all(position < header_end for position in silent)


@pytest.mark.parametrize("codec", [*LOSSLESS, "jpeg-90"])
@pytest.mark.parametrize("cut", [0, 4, 100, -1, -200])
def test_truncated(make_episode: Callable[..., Episode], cut: int, codec: str) -> None:
    data = encode_episode(make_episode(20), codec)[:cut]
    with pytest.raises(CorruptRecordError):
        opened(data).episode()


SHAPE = (4, 8, 8, 3)


def decoded(name: str, data: bytes, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    out = np.empty(shape, np.uint8)
    codec_named(name).decode(data, shape, {number: out[number] for number in range(shape[0])})
    return out


@pytest.mark.parametrize("name", LOSSLESS)
def test_bad_block(name: str) -> None:
    video = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    (block,) = encode_video(video, codec_named(name))
    np.testing.assert_array_equal(decoded(name, block), video)
    for data, shape in (
        *((block[:cut], SHAPE) for cut in range(len(block))), (block, (5, 8, 8, 3)), (block, (3, 8, 8, 3)),
    ):  # fmt: skip
        with pytest.raises(CorruptRecordError, match="bad image block"):
            decoded(name, data, shape)


def test_bytes_behind_a_block() -> None:
    """Those of zlib are left alone, as before: what counts of a block is checked by its checksum."""
    (block,) = encode_video(np.zeros(SHAPE, np.uint8), codec_named("delta-zstd"))
    with pytest.raises(CorruptRecordError, match="unused data"):
        decoded("delta-zstd", block + b"x")


def limited_memory(size: int) -> tuple[int, int]:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size, limits[1]))
    return limits


def bombs() -> list[tuple[str, bytes]]:
    huge = bytes(2**28)
    stream = zstandard.ZstdCompressor(9, write_checksum=True).compressobj()  # does not say how much it holds
    image = io.BytesIO()
    Image.new("RGB", (16_000, 16_000)).save(image, "jpeg")
    jpeg = image.getvalue()
    return [
        ("delta-zlib", zlib.compress(huge)),
        ("delta-zstd", zstandard.ZstdCompressor(9, write_checksum=True).compress(huge)),
        ("delta-zstd", stream.compress(huge) + stream.flush()),
        ("jpeg-90", jpeg + struct.pack("<I", zlib.crc32(jpeg))),
    ]


def test_bombs_take_no_memory() -> None:
    """Each unpacks to 256 MB or more, or says so, where 768 bytes are wanted."""
    for name, data in bombs():
        shape = (1, 8, 8, 3) if name.startswith("jpeg") else SHAPE
        limits = limited_memory(2**26)
        try:
            with pytest.raises(CorruptRecordError, match="bad image block"):
                decoded(name, data, shape)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def rewritten(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """A record whose header is changed: change(safetensors' own entries, what we say of the episode)."""
    (size,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + size])
    episode = json.loads(entries["__metadata__"]["episode"])
    change(entries, episode)
    entries["__metadata__"]["episode"] = json.dumps(episode)
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, m: m.update(shape=[20, 40_000, 40_000, 3]), "cannot hold a video"),
        (lambda e, m: m.update(shape=[32, 10**9, 10**9, 3]), "cannot hold a video"),
        (lambda e, m: m.update(shape=[10**12, 16, 16, 3]), "block offsets"),
        (lambda e, m: m.update(shape=[10**12, 16, 16, 3], block_length=10**12), "block offsets"),
        (lambda e, m: m.update(shape=[20, 16, 16, 4]), "a video of shape"),
        (lambda e, m: m.update(shape=[20, 0, 16, 3]), "a video of shape"),
        (lambda e, m: m.update(shape=[20, -16, -16, 3]), "a video of shape"),
        (lambda e, m: m.update(shape=[20.0, 16, 16, 3]), "a video of shape"),
        (lambda e, m: m.update(block_length=0), "in blocks of 0"),
        (lambda e, m: m.update(shape=[19, 16, 16, 3]), "for 19 frames"),
        (lambda e, m: m.update(codec="delta-pickle"), "codec 'delta-pickle' is not known"),
        (lambda e, m: m.update(codec=["jpeg-90"]), "unreadable header"),
        (lambda e, m: e.update(extra=e["rewards"]), "tensor 'extra' of type float32 is none of a record"),
        (lambda e, m: e["rewards"].update(dtype="I64"), "tensor 'rewards' of shape"),
        (lambda e, m: e["rewards"].update(shape=[2**62, 2**62]), "tensor 'rewards' of shape"),
        (lambda e, m: e["rewards"].update(data_offsets=[0, 10**12]), "tensor 'rewards' of shape"),
        (lambda e, m: e.pop("block_offsets"), "KeyError: 'block_offsets'"),
    ],
)
def test_headers_that_lie(
    make_episode: Callable[..., Episode], change: Callable[[dict[str, Any], dict[str, Any]], None], message: str
) -> None:
    data = encode_episode(make_episode(20))
    opened(rewritten(data, lambda entries, episode: None))
    with pytest.raises(CorruptRecordError, match=message):
        opened(rewritten(data, change))


def test_a_large_header(make_episode: Callable[..., Episode]) -> None:
    """Larger than what is read at first."""
    episode = make_episode(250, action_dim=30, metadata={"text": "x" * 20_000})
    back = decode_episode(encode_episode(episode))
    np.testing.assert_array_equal(back.actions, episode.actions)
    assert back.metadata == episode.metadata


@pytest.mark.parametrize(("quality", "least"), [(90, 30), (100, 40)])
def test_jpeg_says_what_it_loses(quality: int, least: float) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    video = np.stack([np.stack([np.roll(ramp, n)] * 64) for n in range(5)])[..., None].repeat(3, -1)
    video[..., 1] = video[..., 1].swapaxes(1, 2)
    record = opened(encode_episode(Episode(video), f"jpeg-{quality}"))
    back = record.frames([3, 1, 3])
    error = ((record.frames(range(5)).astype(int) - video) ** 2).sum()
    assert record.header["squared_error"] == error
    assert 10 * np.log10(255**2 * video.size / error) > least
    np.testing.assert_array_equal(back[0], back[2])
    assert abs(back[1].astype(int) - video[1]).mean() < 5


@pytest.mark.parametrize("value", [-1, 2**80, 1.5, "x", None])
def test_an_error_that_lies(make_episode: Callable[..., Episode], value: Any) -> None:
    data = encode_episode(make_episode(20), "jpeg-90")
    with pytest.raises(CorruptRecordError, match="a squared error of"):
        opened(rewritten(data, lambda entries, episode: episode.update(squared_error=value)))


def test_jpeg_of_another_size_or_kind() -> None:
    for image in (Image.new("RGB", (9, 8)), Image.new("L", (8, 8))):
        file = io.BytesIO()
        image.save(file, "jpeg")
        data = file.getvalue() + struct.pack("<I", zlib.crc32(file.getvalue()))
        with pytest.raises(CorruptRecordError, match="where 8 x 8 is wanted"):
            decoded("jpeg-90", data, (1, 8, 8, 3))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    with pytest.raises(CorruptRecordError, match="bad image block"):
        decoded("jpeg-90", file.getvalue() + struct.pack("<I", zlib.crc32(file.getvalue())), (1, 8, 8, 3))


@pytest.mark.parametrize("name", ["jpeg", "jpeg-49", "jpeg-101", "jpeg-9", "jpeg-95\n", "h264", ""])
def test_unknown_codecs(name: str) -> None:
    with pytest.raises(ValueError, match="is not known; there are delta-zstd, delta-zlib, jpeg-50 to jpeg-100"):
        codec_named(name)


def test_threads_share_nothing(make_episode: Callable[..., Episode]) -> None:
    """The state of zstd may serve one thread alone."""
    episodes = [make_episode(40, size=64, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(encode_episode, episodes * 8))
        for episode, back in zip(episodes * 8, pool.map(decode_episode, records), strict=True):
            np.testing.assert_array_equal(back.video, episode.video)
