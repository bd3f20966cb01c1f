"""Numeric arrays of a MATLAB version 5 file, streamed: a compressed array of gigabytes is never held in memory.

Not scipy.io.loadmat: a wrong data type in a file is an index out of bounds in its C code, and ends the process (1.17).

The file is a header of 128 bytes, then elements: a tag (type, bytes) and data. An array is an element of type 14, or
one of type 15 that holds a zlib stream of it; inside are flags, dimensions, name and the values, column by column.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from mpl_scale.data.index.format import MalformedShard

_MATRIX, _COMPRESSED = 14, 15
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_VERSION_7_3 = (b"\0\2IM", b"\2\0MI")  # which begins as one of version 5
_CHUNK = 1 << 20
_MOST_VALUES = 1 << 40
_NUMERIC = range(6, 16)  # classes: double, single, and the integers


class MatArray(NamedTuple):
    """An array of a file. `values` reads it once, in order; it must be used before the next array is asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Values


class Values:
    """The values of an array in MATLAB's order (the first dimension moves fastest)."""

    def __init__(self, stream: _Stream, *, dtype: np.dtype, count: int) -> None:
        self._stream, self._dtype, self._left = stream, dtype, count

    def read(self, count: int) -> np.ndarray:
        """The next `count` values.

        Raises:
            MalformedShard: the file ends before, or its compressed data are damaged.
        """
        assert count <= self._left
        self._left -= count
        content = self._stream.read(count * self._dtype.itemsize)
        if not self._left:
            self._stream.finish()
        return np.frombuffer(content, self._dtype)


def read_arrays(file: BinaryIO) -> Iterator[MatArray]:
    """The numeric arrays of a file, in order; others (cells, structs, text) are passed over.

    Raises:
        MalformedShard: the file is none of version 5, or damaged.
    """
    size = os.fstat(file.fileno()).st_size
    header = file.read(128)
    if len(header) < 128 or header[126:128] not in (b"IM", b"MI") or header[124:128] in _VERSION_7_3:
        raise MalformedShard("no MATLAB file of version 5 (one of version 7.3 is HDF5: save it with '-v7')")
    order = "<" if header[126:128] == b"IM" else ">"
    position = 128
    while position < size:
        file.seek(position)
        tag = file.read(8)
        if len(tag) < 8:
            raise MalformedShard("it ends inside an element's tag", offset=position)
        kind, length = struct.unpack(f"{order}II", tag)
        if position + 8 + length > size:
            raise MalformedShard(f"it ends inside an element of {length} bytes", offset=position)
        stream = _Stream(file, position, length=length, compressed=kind == _COMPRESSED)
        if kind == _COMPRESSED:
            kind, _ = struct.unpack(f"{order}II", stream.read(8))
        found = _matrix(stream, order) if kind == _MATRIX else None
        if found is not None:
            yield found
        position += 8 + length  # elements of the top level are not padded when compressed; others are multiples of 8


class _Stream:
    """The bytes of an element, inflated if they are compressed."""

    def __init__(self, file: BinaryIO, start: int, *, length: int, compressed: bool) -> None:
        self._file, self._start, self._left = file, start, length
        self._inflate = zlib.decompressobj() if compressed else None
        self._ready = b""

    def read(self, count: int) -> bytes:
        """The next `count` bytes; MalformedShard where the array ends before."""
        parts, missing = [], count
        while missing > 0:
            part = self._ready[:missing] if self._ready else self._more(missing)[:missing]
            if not part:
                raise self.error("an array ends too early")
            self._ready = self._ready[len(part) :]
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def finish(self) -> None:
        """Read to the end of compressed data: only there is their checksum."""
        for _ in range(_CHUNK):
            if self._inflate is None or self._inflate.eof:
                return
            self._ready = b""
            if not self._more(4096):
                break
        if self._inflate is not None and not self._inflate.eof:
            raise self.error("compressed data that do not end")

    def error(self, reason: str) -> MalformedShard:
        """The error, at this element."""
        return MalformedShard(reason, offset=self._start)

    def skip(self, count: int) -> None:
        while count > 0:
            count -= len(self.read(min(count, _CHUNK)))

    def _more(self, wanted: int) -> bytes:
        if self._inflate is None:
            self._ready = self._file.read(min(self._left, wanted))
            self._left -= len(self._ready)
            return self._ready
        while not self._ready and not self._inflate.eof:
            packed = self._inflate.unconsumed_tail
            if not packed:
                packed = self._file.read(min(self._left, _CHUNK))
                self._left -= len(packed)
            try:
                self._ready = self._inflate.decompress(packed, max(wanted, 4096))
            except zlib.error as error:
                raise self.error(f"damaged compressed data: {error}") from error
            if not packed and not self._ready:
                break
        return self._ready


def _matrix(stream: _Stream, order: str) -> MatArray | None:
    """The array whose tag has been read; None where it is not numeric."""
    flags = _element(stream, order)
    if len(flags) < 8:
        raise stream.error("an array without flags")
    (bits,) = struct.unpack(f"{order}I", flags[:4])
    if bits & 0xFF not in _NUMERIC:
        return None
    if bits & 0x800:
        raise stream.error("an array of complex numbers")
    dimensions = _element(stream, order)
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions[: len(dimensions) // 4 * 4])
    name = _element(stream, order).decode("latin-1")
    kind, length, small = _tag(stream, order)
    if kind not in _TYPES:
        raise stream.error(f"values of type {kind}")
    dtype = np.dtype(order + _TYPES[kind])
    count = 1
    for side in shape:
        count *= side
        if side < 0 or count > _MOST_VALUES:
            raise stream.error(f"an array of shape {list(shape)[:8]}")
    if not shape or count * dtype.itemsize != length:
        raise stream.error(f"{length} bytes for {count} values of {dtype.itemsize} bytes")
    if small:
        stream = _joined(small, stream)
    return MatArray(name, shape, dtype, Values(stream, dtype=dtype, count=count))


def _joined(ready: bytes, stream: _Stream) -> _Stream:
    stream._ready = ready + stream._ready
    return stream


def _element(stream: _Stream, order: str) -> bytes:
    """The data of a small part: flags, dimensions, name."""
    _, length, small = _tag(stream, order)
    if small:
        return small[:length]
    if length > _CHUNK:
        raise stream.error(f"{length} bytes of flags, dimensions or name")
    content = stream.read(length)
    stream.skip(-length % 8)
    return content


def _tag(stream: _Stream, order: str) -> tuple[int, int, bytes]:
    """Type, bytes and, where they fit into the tag itself, the data."""
    tag = stream.read(8)
    (word,) = struct.unpack(f"{order}I", tag[:4])
    if word >> 16:
        if word >> 16 > 4:
            raise stream.error("a small element of more than 4 bytes")
        return word & 0xFFFF, word >> 16, tag[4:]
    (length,) = struct.unpack(f"{order}I", tag[4:])
    return word, length, b""
