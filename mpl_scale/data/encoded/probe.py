"""Are these bytes an image that can be decoded? Answered from the first and last of them, in about 10 microseconds.

DALI ends the whole pipeline at an undecodable image, by design (and version 2.4 may even crash the process when a
prefetched batch holds a file that is no image), so nothing reaches the decoder that has not passed this probe.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping

MAX_PIXELS = 50_000_000
_HEAD_BYTES = 1 << 16
_TAIL_BYTES = 1 << 12
_PPM = re.compile(rb"P6\s+(\d{1,9})\s+(\d{1,9})\s+255\s")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_TRAILER = b"IEND\xaeB`\x82"
_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_TRAILER = b"\xff\xd9"
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman: what libjpeg-turbo decodes
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_JPEG_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}  # C4, C8 and CC are tables


class UnreadableImage(ValueError):
    """Why the bytes are no decodable image."""


class DecodeError(RuntimeError):
    """DALI gave up on a batch, and with that on its whole graph.

    position: of the image that DALI names, in some batch that was in flight; None: it names none.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        named = re.search(r"sample #(\d+)", message)
        self.position = int(named.group(1)) if named else None


def probe(head: bytes, tail: bytes, *, length: int | None = None) -> tuple[int, int]:
    """Height and width of a PNG, JPEG or binary PPM image, pixels.

    Args:
        head: the first bytes, or all of them.
        tail: the last bytes, or all of them.
        length: how many there are in all; None: `head` is all of them. Only a PPM's completeness depends on it.

    Raises:
        UnreadableImage: empty, no such image, truncated, of a kind that is not decoded, or above MAX_PIXELS.
    """
    if not head:
        raise UnreadableImage("the file is empty")
    if head.startswith(_PNG_MAGIC):
        height, width = _png_size(head)
        complete = _PNG_TRAILER in tail[-64:]
    elif head.startswith(_JPEG_MAGIC):
        height, width = _jpeg_size(head)
        complete = _JPEG_TRAILER in tail[-_TAIL_BYTES:]
    elif head.startswith(b"P6"):
        height, width, begin = _ppm_size(head)
        complete = begin + 3 * height * width <= (len(head) if length is None else length)
    else:
        raise UnreadableImage("neither a PNG nor a JPEG file")
    if not complete:
        raise UnreadableImage("truncated: its end marker is missing")
    if not 0 < height * width <= MAX_PIXELS:
        raise UnreadableImage(f"{height} x {width} pixels is outside 1 to {MAX_PIXELS}")
    return height, width


def ppm(pixels: bytes, *, height: int, width: int) -> bytes:
    """RGB pixels [H, W, 3] as a binary PPM file: what a decoder reads without changing a value."""
    return b"P6\n%d %d\n255\n" % (width, height) + pixels


def probe_file(path: str | bytes) -> tuple[int, int]:
    """The same for a file, reading no more of it than needed.

    Raises:
        UnreadableImage: as `probe`, or the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not hold the run
        try:
            return probe_at(descriptor, offset=0, length=os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror}") from error


def probe_at(descriptor: int, *, offset: int, length: int) -> tuple[int, int]:
    """The same for the bytes [offset, offset + length) of an open file.

    Raises:
        UnreadableImage: as `probe`, or the bytes cannot be read.
    """
    try:
        head = os.pread(descriptor, min(length, _HEAD_BYTES), offset)
        if length <= _HEAD_BYTES:
            return probe(head, head)
        tail = os.pread(descriptor, _TAIL_BYTES, offset + length - _TAIL_BYTES)
        try:
            return probe(head, tail, length=length)
        except UnreadableImage:
            if not head.startswith(_JPEG_MAGIC):
                raise
            return probe(os.pread(descriptor, length, offset), tail)  # its dimensions may follow long metadata
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror}") from error


def unreadable_error(reasons: Mapping[str, str], *, count: int | None = None) -> ValueError:
    """The error for unreadable files, from the reason of each path; count: how many there are, where not all given."""
    count = len(reasons) if count is None else count
    listed = [f"{path}: {reason}" for path, reason in list(reasons.items())[:5]]
    if count > len(listed):
        listed.append(f"and {count - len(listed)} more")
    return ValueError(f"{count} unreadable image(s), delete or replace each: {'; '.join(listed)}")


def _ppm_size(head: bytes) -> tuple[int, int, int]:
    """Height, width, and where the pixels begin."""
    match = _PPM.match(head)
    if match is None:
        raise UnreadableImage("a PPM file with another header than 'P6 width height 255'")
    return int(match[2]), int(match[1]), match.end()


def _png_size(head: bytes) -> tuple[int, int]:
    if len(head) < 26 or head[12:16] != b"IHDR":
        raise UnreadableImage("truncated: a PNG file without a complete header")
    width, height = struct.unpack(">II", head[16:24])
    if head[24] not in _PNG_DEPTHS.get(head[25], ()):
        raise UnreadableImage(f"a PNG file of colour type {head[25]} with {head[24]} bits is not defined")
    return height, width


def _jpeg_size(head: bytes) -> tuple[int, int]:
    position = 2
    while position + 9 < len(head):
        if head[position] != 0xFF:
            raise UnreadableImage(f"not a JPEG marker at byte {position}")
        marker = head[position + 1]
        if marker == 0xFF:  # padding before a marker
            position += 1
            continue
        if marker in _JPEG_FRAMES:
            if head[position + 4] != 8:
                raise UnreadableImage(f"a JPEG file of {head[position + 4]} bits a sample is not supported")
            height, width = struct.unpack(">HH", head[position + 5 : position + 9])
            return height, width
        if marker in _JPEG_OTHER_FRAMES:
            raise UnreadableImage(f"JPEG frame type {marker:#x} (lossless or arithmetic) is not supported")
        position += 2 + int.from_bytes(head[position + 2 : position + 4], "big")
    raise UnreadableImage("truncated: a JPEG file without a frame header")
