"""The part of protocol buffers that a tf.train.Example needs, read without TensorFlow.

Example { features = 1: Features }       Features { feature = 1: map entry { key = 1, value = 2: Feature } }
Feature { bytes_list = 1 | float_list = 2 | int64_list = 3 }, each with repeated `value = 1`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from mpl_scale.data.index.format import MalformedShard

_CONTINUED = bytes(range(128, 256))  # a byte of a number that another one follows
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Feature(NamedTuple):
    """The first value of a feature: of bytes where they lie in the record; an integer as it is; a float is passed over.

    kind: of the values, for messages; None where there is none. values: how many there are, of all features of that
    name; of floats, 1.
    """

    span: tuple[int, int] | None = None  # offset and length, bytes
    integer: int | None = None
    kind: Literal["bytes", "floats", "integers"] | None = None
    values: int = 0


def read_example(record: bytes) -> dict[str, Feature]:
    """The features of one serialised Example by name.

    Raises:
        MalformedShard: the bytes are no Example; its offset is within the record.
    """
    features: dict[str, Feature] = {}
    for _, start, end in _messages(record, 0, len(record), field=1):
        for _, entry, entry_end in _messages(record, start, end, field=1):
            key, value = None, Feature()
            for number, kind, begin, stop in _fields(record, entry, entry_end):
                if kind == _BYTES and number == 1:
                    key = record[begin:stop].decode("utf-8", errors="replace")
                elif kind == _BYTES and number == 2:
                    more = _feature(record, begin, stop)
                    value = more._replace(values=value.values + more.values)
            if key is not None:
                before = features.get(key, Feature()).values  # of a key that stands twice; of a map, the last one wins
                features[key] = value._replace(values=before + value.values)
    return features


def _feature(record: bytes, start: int, end: int) -> Feature:
    found = Feature()
    for number, kind, begin, stop in _fields(record, start, end):
        if kind != _BYTES:
            continue
        for inner, inner_kind, first, last in _fields(record, begin, stop):
            if inner != 1:
                continue
            if number == 1 and inner_kind == _BYTES:
                found = Feature(found.span or (first, last - first), kind="bytes", values=found.values + 1)
            elif number == 2:
                found = Feature(kind="floats", values=1)
            elif number == 3 and inner_kind in (_VARINT, _BYTES) and last > first:  # plain or packed
                integer = _signed(_varint(record, first, last)[0]) if found.integer is None else found.integer
                ends = len(record[first:last].translate(None, _CONTINUED))  # the last byte of each number
                found = Feature(integer=integer, kind="integers", values=found.values + ends)
    return found


def _messages(record: bytes, start: int, end: int, *, field: int) -> Iterator[tuple[int, int, int]]:
    for number, kind, begin, stop in _fields(record, start, end):
        if number == field and kind == _BYTES:
            yield number, begin, stop


def _fields(record: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, first byte, one past the last byte) of each field of a message."""
    position = start
    while position < end:
        tag, position = _varint(record, position, end)
        number, kind = tag >> 3, tag & 7
        begin = position
        if kind == _VARINT:
            _, position = _varint(record, position, end)
        elif kind == _BYTES:
            length, begin = _varint(record, position, end)
            position = begin + length
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        else:
            raise MalformedShard(f"no tf.train.Example: wire type {kind}", offset=begin)
        if position > end or number == 0:
            raise MalformedShard("no tf.train.Example: a field leaves its message", offset=begin)
        yield number, kind, begin, position


def _varint(record: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 64:
        byte = record[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, position
        shift += 7
    raise MalformedShard("no tf.train.Example: a number does not end", offset=position)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
