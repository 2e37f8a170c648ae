"""TFRecord files that TensorFlow wrote, checksums against published vectors, messages byte by byte, and damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ivideogpt.data.episode import Episode
from ivideogpt.data.sources.tfrecord import (
    crc32c,
    masked,
    parse_example,
    read_record,
    read_records,
    record_jobs,
    record_offsets,
)

FILE = Path(__file__).parent / "fixtures" / "bair" / "train" / "traj_0_to_1.tfrecords"


def message(field: int, content: bytes) -> bytes:
    """A protocol buffer field of bytes, of less than 128 of them."""
    return bytes([field << 3 | 2, len(content)]) + content


def example(feature: bytes, name: bytes = b"x") -> bytes:
    return message(1, message(1, message(1, name) + message(2, feature)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, B.4, and the check value of the CRC catalogue
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc_of_published_vectors(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


def test_crc_of_any_length() -> None:
    """The vectorised way gives what one byte after the other gives, at every length and across pieces."""
    data = np.random.default_rng(0).integers(0, 256, 2**18 + 70, dtype=np.uint8).tobytes()

    def one_by_one(data: bytes) -> int:
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        return crc ^ 0xFFFFFFFF

    for length in (*range(0, 140, 7), 127, 128, 129, 255, 256, 1000, 4099):
        assert crc32c(data[:length]) == one_by_one(data[:length])
    for length in (2**18 - 1, 2**18 + 1, 2**18 + 3, 2**18 + 4, 2**18 + 65):
        assert crc32c(data[:length]) == one_by_one(data[:length])


def test_file_of_tensorflow() -> None:
    offsets = list(record_offsets(FILE))
    records = list(read_records(FILE))
    assert len(offsets) == len(records) == 2
    assert offsets[0] == 0
    assert offsets[1] == len(records[0]) + 16
    assert read_record(FILE, offsets[1]) == records[1]
    features = parse_example(records[1])
    assert sorted(features) == sorted(
        f"{i}/{name}"
        for i in range(4)
        for name in ("action", "endeffector_pos", "image_aux1/encoded", "image_main/encoded")
    )
    assert list(parse_example(records[1], {"0/action"})) == ["0/action"]


def test_damaged_files(tmp_path: Path) -> None:
    whole = FILE.read_bytes()
    second = list(record_offsets(FILE))[1]
    file = tmp_path / "bad.tfrecords"

    def flipped(place: int) -> bytes:
        data = bytearray(whole)
        data[place] ^= 1
        return bytes(data)

    for data, message_ in (
        (whole[:-1], f"the record at byte {second} is cut off"),
        (whole[: second + 5], f"the record at byte {second} is cut off within its header"),
        (flipped(second + 20), f"the data of the record at byte {second} do not fit their checksum"),
        (flipped(len(whole) - 1), f"the data of the record at byte {second} do not fit their checksum"),
        (flipped(second), f"the length of the record at byte {second} does not fit its checksum"),
        (flipped(second + 9), f"the length of the record at byte {second} does not fit its checksum"),
    ):
        file.write_bytes(data)
        records = read_records(file)
        next(records)  # the first one is whole
        with pytest.raises(ValueError, match=f"bad.tfrecords: {message_}"):
            next(records)
    file.write_bytes(b"")
    assert list(read_records(file)) == []
    with pytest.raises(ValueError, match="there is no file"):
        list(read_records(tmp_path / "none"))


def test_huge_length_takes_no_memory(tmp_path: Path) -> None:
    head = (2**50).to_bytes(8, "little")
    file = tmp_path / "bad.tfrecords"
    file.write_bytes(head + masked(crc32c(head)).to_bytes(4, "little") + b"hello")
    for read in (lambda: list(record_offsets(file)), lambda: read_record(file, 0)):
        with pytest.raises(ValueError, match="the record at byte 0 .*cut off"):
            read()


def test_jobs_go_on_after_damage(tmp_path: Path) -> None:
    cut = tmp_path / "cut.tfrecords"
    cut.write_bytes(FILE.read_bytes()[:-1])

    def decode(data: bytes, key: str) -> Episode:
        raise ValueError("no episode")

    jobs = list(record_jobs([(cut, "a", None), (FILE, "b", 3)], decode))
    assert [key for key, _ in jobs] == ["a-00000", "a-rest-after-1", "b-00000", "b-00001", "b-count"]
    messages = ["record at byte 0: no episode", "is cut off", "no episode", "no episode", "holds 2 records, but 3"]
    for (_, read), text in zip(jobs, messages, strict=True):
        with pytest.raises(ValueError, match=text):
            read()


def test_lists_packed_and_not() -> None:
    floats = np.array([1.5, -2.0], "<f4").tobytes()
    one_by_one = b"".join(b"\x0d" + floats[i : i + 4] for i in (0, 4))
    for content in (message(1, floats), one_by_one):
        np.testing.assert_array_equal(
            parse_example(example(message(2, content)))["x"], np.array([1.5, -2.0], np.float32)
        )
    numbers = [0, 1, 127, 128, 300, 2**63 - 1, -1, -(2**63)]

    def varint(value: int) -> bytes:
        value &= 2**64 - 1
        out = b""
        while value >= 128:
            out += bytes([value & 127 | 128])
            value >>= 7
        return out + bytes([value])

    packed = message(1, b"".join(map(varint, numbers)))
    unpacked = b"".join(b"\x08" + varint(number) for number in numbers)
    for content in (packed, unpacked):
        values = parse_example(example(message(3, content)))["x"]
        assert isinstance(values, np.ndarray) and values.dtype == np.int64
        assert values.tolist() == numbers
    texts = parse_example(example(message(1, message(1, b"one") + message(1, b""))))["x"]
    assert isinstance(texts, list)
    assert [bytes(text) for text in texts] == [b"one", b""]


def test_empty_lists_and_unknown_fields() -> None:
    for kind, dtype in ((2, np.float32), (3, np.int64)):
        for content in (b"", message(1, b"")):
            values = parse_example(example(message(kind, content)))["x"]
            assert isinstance(values, np.ndarray) and values.dtype == dtype and values.size == 0
    assert parse_example(b"") == {}
    unknown = b"\x78\x05" + b"\x7d" + bytes(4) + b"\x79" + bytes(8) + message(9, b"?")
    assert list(parse_example(unknown + example(b""))) == ["x"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x0a\x7f", "a field ends beyond the message"),
        (b"\x0b", "wire type 3"),
        (b"\x0a", "an integer does not end"),
        (b"\xff" * 11, "an integer does not end"),
        (example(message(2, message(1, b"abc"))), "has 3 bytes, which is no multiple of 4"),
        (example(message(3, message(1, b"\x80"))), "a list of integers is cut off"),
        (example(message(3, message(1, b"\x80" * 10 + b"\x01"))), "an integer of 11 bytes"),
    ],
)
def test_refused_messages(data: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_example(data)
