"""Is this file an image that can be decoded? Answered from its first and last bytes, in about 10 microseconds.

DALI ends the whole pipeline at an undecodable image, by design (and version 2.4 may even crash the process when a
prefetched batch holds a file that is no image), so nothing reaches the decoder that has not passed this probe.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

import numpy as np

MAX_PIXELS = 50_000_000
_HEAD_BYTES = 1 << 16
_TAIL_BYTES = 1 << 12
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_TRAILER = b"IEND\xaeB`\x82"
_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_TRAILER = b"\xff\xd9"
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman: what libjpeg-turbo decodes
_JPEG_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}  # C4, C8 and CC are tables


class UnreadableImage(ValueError):
    """Why the bytes are no decodable image."""


def probe(head: bytes, tail: bytes) -> tuple[int, int]:
    """Height and width of a PNG or JPEG image, pixels.

    Args:
        head: the first bytes of the file, or all of them.
        tail: the last bytes of the file, or all of them.

    Raises:
        UnreadableImage: empty, neither PNG nor JPEG, truncated, or above MAX_PIXELS.
    """
    if not head:
        raise UnreadableImage("the file is empty")
    if head.startswith(_PNG_MAGIC):
        height, width = _png_size(head)
        complete = _PNG_TRAILER in tail[-64:]
    elif head.startswith(_JPEG_MAGIC):
        height, width = _jpeg_size(head)
        complete = _JPEG_TRAILER in tail[-_TAIL_BYTES:]
    else:
        raise UnreadableImage("neither a PNG nor a JPEG file")
    if not complete:
        raise UnreadableImage("truncated: its end marker is missing")
    if not 0 < height * width <= MAX_PIXELS:
        raise UnreadableImage(f"{height} x {width} pixels is outside 1 to {MAX_PIXELS}")
    return height, width


def probe_file(path: str) -> tuple[int, int]:
    """The same for a file, reading no more of it than needed.

    Raises:
        UnreadableImage: as `probe`, or the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
            if len(head) < _HEAD_BYTES:
                return probe(head, head)
            file.seek(-_TAIL_BYTES, 2)
            tail = file.read()
            try:
                return probe(head, tail)
            except UnreadableImage:  # a JPEG's dimensions may follow long metadata
                file.seek(0)
                return probe(file.read(), tail)
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror}") from error


def probe_files(paths: Iterable[str]) -> np.ndarray:
    """Heights and widths of all files, int32 [N, 2].

    Raises:
        ValueError: one error that names the unreadable files, the reasons and the fix.
    """
    sizes: list[tuple[int, int]] = []
    reasons: dict[str, str] = {}
    for path in paths:
        try:
            sizes.append(probe_file(path))
        except UnreadableImage as error:
            reasons[path] = str(error)
    if reasons:
        raise unreadable_error(reasons)
    return np.array(sizes, np.int32).reshape(-1, 2)


def unreadable_error(reasons: Mapping[str, str]) -> ValueError:
    """The error for unreadable files, from the reason of each path."""
    listed = [f"{path}: {reason}" for path, reason in list(reasons.items())[:5]]
    if len(reasons) > len(listed):
        listed.append(f"and {len(reasons) - len(listed)} more")
    return ValueError(f"{len(reasons)} unreadable image(s), delete or replace each: {'; '.join(listed)}")


def _png_size(head: bytes) -> tuple[int, int]:
    if len(head) < 24 or head[12:16] != b"IHDR":
        raise UnreadableImage("truncated: a PNG file without a complete header")
    width, height = struct.unpack(">II", head[16:24])
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
            height, width = struct.unpack(">HH", head[position + 5 : position + 9])
            return height, width
        if marker in _JPEG_OTHER_FRAMES:
            raise UnreadableImage(f"JPEG frame type {marker:#x} (lossless or arithmetic) is not supported")
        position += 2 + int.from_bytes(head[position + 2 : position + 4], "big")
    raise UnreadableImage("truncated: a JPEG file without a frame header")
