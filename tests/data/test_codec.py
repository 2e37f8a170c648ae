"""Records: lossless, random access to blocks, and no corrupt byte gets through."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load

from ivideogpt.data.codec import (
    BLOCK_LENGTH,
    CorruptRecordError,
    Record,
    decode_block,
    decode_episode,
    encode_episode,
    encode_video,
)
from ivideogpt.data.episode import Episode


def opened(data: bytes) -> Record:
    return Record.open(lambda offset, size: data[offset : offset + size], len(data))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("action_dim", [None, 3])
def test_lossless(make_episode: Callable[..., Episode], length: int, action_dim: int | None) -> None:
    episode = make_episode(length, action_dim=action_dim, camera="corner", metadata={"task": "x", "n": [1, 2.5]})
    back = decode_episode(encode_episode(episode))
    np.testing.assert_array_equal(back.video, episode.video)
    for name in ("actions", "rewards", "terminations"):
        np.testing.assert_array_equal(getattr(back, name), getattr(episode, name))
    for name in ("fps", "camera", "source", "licence", "metadata"):
        assert getattr(back, name) == getattr(episode, name)


def test_noise_is_lossless() -> None:
    """Differences wrap around in uint8."""
    video = np.random.default_rng(0).integers(0, 256, (20, 5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_episode(encode_episode(Episode(video))).video, video)


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
    blocks = encode_video(episode.video)
    assert [size for _, size in reads] == [len(blocks[1]), len(blocks[3])]


def test_frames_outside(make_episode: Callable[..., Episode]) -> None:
    record = opened(encode_episode(make_episode(10)))
    for wanted in ([10], [-1]):
        with pytest.raises(IndexError, match="of an episode of 10"):
            record.frames(wanted)


def test_every_flipped_byte_is_noticed(make_episode: Callable[..., Episode]) -> None:
    """Flips each byte of a small record in turn: an error, or (in JSON's free text) a visible change, never silence."""
    data = encode_episode(make_episode(3, size=4, action_dim=1))
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


@pytest.mark.parametrize("cut", [0, 4, 100, -1, -200])
def test_truncated(make_episode: Callable[..., Episode], cut: int) -> None:
    data = encode_episode(make_episode(20))[:cut]
    with pytest.raises(CorruptRecordError):
        opened(data).episode()


def test_bad_block() -> None:
    (block,) = encode_video(np.zeros((4, 4, 4, 3), np.uint8))
    assert decode_block(block, (4, 4, 4, 3)).shape == (4, 4, 4, 3)
    for data, shape in ((block[:-1], (4, 4, 4, 3)), (block, (5, 4, 4, 3)), (block, (3, 4, 4, 3)), (b"x", (4, 4, 4, 3))):
        with pytest.raises(CorruptRecordError, match="bad image block"):
            decode_block(data, shape)
