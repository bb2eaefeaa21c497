"""TFRecords that Google's protobuf library and the definition of the CRC make, read without either."""

import random

import pytest
from published_sets import example_class, put, slow_crc32c, tfrecord

from dspo.data.readers.tfrecord import LANE, crc32c, examples
from dspo.errors import UserError


def test_crc32c():
    # RFC 3720, appendix B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([0xFF] * 32)) == 0x62A8AB43
    assert crc32c(b"123456789") == 0xE3069283
    generator = random.Random(0)
    for length in (0, 1, LANE - 1, LANE, LANE + 1, 3 * LANE + 17):
        data = generator.randbytes(length)
        assert crc32c(data) == slow_crc32c(data)


def messages():
    example = example_class()()
    features = example.features.feature
    features["name"].bytes_list.value.append("é".encode())
    features["packed"].float_list.value.extend([0.5, -2.0, 3.25])
    features["count"].int64_list.value.extend([1, -1])
    features["long"].bytes_list.value.append(bytes(1000))
    features["none"].bytes_list.SetInParent()
    return [example.SerializeToString(), b""]


def test_examples(tmp_path):
    path = tfrecord(tmp_path / "a.tfrecord", messages())
    first, second = examples(path)
    assert first == (
        f"{path}, record 1",
        {"name": ["é".encode()], "packed": [0.5, -2.0, 3.25], "long": [bytes(1000)], "none": []},
    )
    assert second == (f"{path}, record 2", {})


def test_floats_that_are_not_packed(tmp_path):
    """Proto2 writers repeat the tag for each number; readers have to take both forms."""
    floats = b"\x0d\x00\x00\x00\x3f\x0d\x00\x00\x80\x3f"  # field 1, four bytes: 0.5, then 1.0
    feature = b"\x12" + bytes([len(floats)]) + floats
    entry = b"\x0a\x01f\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    path = tfrecord(tmp_path / "a.tfrecord", [b"\x0a" + bytes([len(features)]) + features])
    assert [values for _, values in examples(path)] == [{"f": [0.5, 1.0]}]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "record 2: the file is cut short"),
        (lambda data: data[:-7], "record 2: not a TFRecord header"),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "record 1: the checksum is wrong"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "record 1: not a TFRecord header"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "record 1: not a TFRecord header"),
    ],
)
def test_damage_is_found(tmp_path, damage, message):
    whole = tfrecord(tmp_path / "whole", messages()).read_bytes()
    path = put(tmp_path / "a.tfrecord", damage(whole))
    with pytest.raises(UserError, match=message):
        list(examples(path))


def test_message_that_is_no_example(tmp_path):
    with pytest.raises(UserError, match=r"record 1: not a tf\.train\.Example"):
        list(examples(tfrecord(tmp_path / "a.tfrecord", [b"\x0a\x7fshort"])))
