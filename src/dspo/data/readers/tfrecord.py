"""TFRecord files of ``tf.train.Example`` messages, without TensorFlow.

A record is: length (uint64, little endian), its masked CRC-32C (uint32), the bytes, their masked CRC-32C. Sources:
tensorflow/core/lib/io/record_writer.h, tensorflow/core/example/{example,feature}.proto, RFC 3720 (the CRC).
"""

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspo.errors import UserError

Feature = list[bytes] | list[float]
Words = NDArray[np.uint32]

LANE = 512  # bytes that are worked through one by one while all lanes of a record go side by side


def examples(path: Path) -> Iterator[tuple[str, dict[str, Feature]]]:
    """Yield ("FILE, record N", features by name), bytes and floats; integers are left out.

    Raises :class:`UserError` for a file that is cut short, and for records whose checksum or form is wrong.
    """
    with path.open("rb") as file:
        number = 0
        while head := file.read(12):
            number += 1
            where = f"{path}, record {number}"
            if len(head) < 12 or _masked(head[:8]) != struct.unpack_from("<I", head, 8)[0]:
                raise UserError(f"{where}: not a TFRecord header; the file is damaged or no TFRecord. Fetch it again.")
            (length,) = struct.unpack_from("<Q", head)
            body = file.read(length + 4)
            if len(body) < length + 4:
                raise UserError(f"{where}: the file is cut short. Fetch it again.")
            if _masked(body[:length]) != struct.unpack_from("<I", body, length)[0]:
                raise UserError(f"{where}: the checksum is wrong; the file is damaged. Fetch it again.")
            try:
                yield where, parse_example(body[:length])
            except (ValueError, IndexError, struct.error):
                raise UserError(f"{where}: not a tf.train.Example message. Fetch the file again.") from None


def parse_example(message: bytes) -> dict[str, Feature]:
    """Example { Features features = 1 }, Features { map<string, Feature> feature = 1 }."""
    features: dict[str, Feature] = {}
    for _, block in _fields(message, 1):
        for _, entry in _fields(block, 1):
            parts = dict(_fields(entry, 1, 2))
            value = _feature(parts.get(2, b""))
            if value is not None:
                features[parts[1].decode("utf-8")] = value
    return features


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of the data.

    The CRC's register is linear in register and data: a lane is worked through from an empty register, all lanes at
    once, and joined to what came before by the register's own change over as many zero bytes.
    """
    whole = len(data) // LANE * LANE
    lanes = np.frombuffer(data[:whole], np.uint8).reshape(-1, LANE)
    register = 0xFFFFFFFF
    zeros = _after_zeros()
    for lane in _advance(np.zeros(len(lanes), np.uint32), lanes).tolist():
        shifted = 0
        for place in range(4):
            shifted ^= zeros[place][register >> 8 * place & 0xFF]
        register = shifted ^ lane
    table = _table().tolist()
    for byte in data[whole:]:
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _table() -> Words:
    """The register after one byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1).astype(np.uint32)
    return table


@cache
def _after_zeros() -> list[list[int]]:
    """[4][256]: the register after ``LANE`` zero bytes, for each value of each of its bytes."""
    values = np.arange(256, dtype=np.uint32)
    zeros = np.zeros((256, LANE), np.uint8)
    return [_advance(values << np.uint32(8 * place), zeros).tolist() for place in range(4)]


def _advance(registers: Words, lanes: NDArray[np.uint8]) -> Words:
    """Registers [n] after the bytes [n, LANE]."""
    table = _table()
    for column in lanes.T:
        registers = table[(registers ^ column) & 0xFF] ^ (registers >> 8)
    return registers


def _feature(message: bytes) -> Feature | None:
    """Feature { oneof: BytesList bytes_list = 1, FloatList float_list = 2, Int64List int64_list = 3 }."""
    for field, values in _fields(message, 1, 2):
        if field == 1:
            return [value for _, value in _fields(values, 1)]
        packed = b"".join(value for _, value in _fields(values, 1))  # packed or not, four bytes each
        return list(struct.unpack(f"<{len(packed) // 4}f", packed))
    return None


def _fields(message: bytes, *wanted: int) -> Iterator[tuple[int, bytes]]:
    """Yield (field number, bytes) of the wanted fields of a protocol buffer message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = _varint(message, at)
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(message):
            raise ValueError("cut short")
        if field in wanted:
            yield field, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
