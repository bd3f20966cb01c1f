"""Is this a sound PNG, JPEG or PPM file, how large is it, which way up? Answered in one walk over its segments.

Decoders are written for honest files: a frame of seven components, a table of impossible codes or a chunk whose
checksum is wrong can make one write where it must not, and end the process later and elsewhere. DALI ends the whole
pipeline at an undecodable image, by design. So DALI gets no file that has not passed here. What does not pass may be
sound all the same, of a kind that DALI does not decode: other_formats.py asks PIL.

A camera held upright writes a landscape image and a note, the EXIF orientation. DALI turns such an image, so the
heights and widths that crops are drawn from must be those of the turned image. (PIL turns only on request, and timm
never asks: there a network sees these images lying on their side.)
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

MOST_PIXELS = 1 << 31
"""Above that a header is taken for damage, and mpl_scale.data.max_pixels ends there: 6 GB of RGB."""
_TAIL_BYTES = 1 << 12
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a segment
JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman: what libjpeg-turbo decodes
_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}  # C4, C8 and CC are tables
_HUFFMAN, JPEG_QUANTISATION, _SCAN, _END, _APP1 = 0xC4, 0xDB, 0xDA, 0xD9, 0xE1
_PPM = re.compile(rb"P6\s+(\d{1,9})\s+(\d{1,9})\s+255\s")
_EXIF = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # turned by a quarter

Buffer = bytes | memoryview
"""Slices of a memoryview copy nothing."""


class UnreadableImage(ValueError):
    """Why the bytes are no decodable image."""


class Header(NamedTuple):
    """Facts from an image's header. kind: its format. height, width: as stored, pixels.

    sideways: whether the decoded image has height and width swapped. by_pil: whether PIL decodes it, not DALI.
    """

    kind: str
    height: int
    width: int
    sideways: bool = False
    by_pil: bool = False

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width as stored."""
        return self.height, self.width

    @property
    def decoded(self) -> tuple[int, int]:
        """Height and width as decoded."""
        return (self.width, self.height) if self.sideways else (self.height, self.width)

    @property
    def label(self) -> str:
        """The format's name, as messages show it."""
        return f"{self.kind} (decoded by PIL)" if self.by_pil else self.kind


def examine(encoded: Buffer, *, tail: Buffer | None = None, length: int | None = None, inside: bool = True) -> Header:
    """The header of a PNG, JPEG or binary PPM image that DALI can be given.

    Args:
        encoded: the file, or its start.
        tail: its last bytes; None: `encoded` is the whole file.
        length: of the file, bytes; None: `encoded` is the whole file.
        inside: also check what is between header and end: checksums, tables.

    Raises:
        UnreadableImage: empty, no such image, truncated, damaged, of a kind that DALI does not decode, or above
            MOST_PIXELS. Where `encoded` is only the start, the reason may be that it ends too early.
    """
    tail = encoded[-_TAIL_BYTES:] if tail is None else tail
    start = bytes(encoded[: len(PNG_START)])
    if not start:
        raise UnreadableImage("the file is empty")
    if start == PNG_START:
        header = _png(encoded, ended=PNG_END in bytes(tail[-64:]), inside=inside)
    elif start.startswith(JPEG_START):
        header = _jpeg(encoded, ended=JPEG_END in bytes(tail), inside=inside)
    elif start.startswith(b"P6"):
        header = _ppm(encoded, length=len(encoded) if length is None else length)
    else:
        raise UnreadableImage("neither a PNG nor a JPEG file, nor another that is read")
    require_possible(header)
    return header


def require_possible(header: Header) -> None:
    """UnreadableImage where an image has no pixels, or more than any decoder is asked for."""
    if not 0 < header.height * header.width <= MOST_PIXELS:
        raise UnreadableImage(f"{header.height} x {header.width} pixels is outside 1 to {MOST_PIXELS}")


def _ppm(encoded: Buffer, *, length: int) -> Header:
    match = _PPM.match(encoded)
    if match is None:
        raise UnreadableImage("a PPM file with another header than 'P6 width height 255'")
    height, width = int(match[2]), int(match[1])
    if match.end() + 3 * height * width > length:
        raise _truncated()
    return Header("ppm", height, width)


def _png(encoded: Buffer, *, ended: bool, inside: bool) -> Header:
    """Chunk after chunk: within the file, with the right checksum, pixels between header and end."""
    if len(encoded) < 33 or encoded[12:16] != b"IHDR":
        raise UnreadableImage("truncated: a PNG file without a complete header")
    width, height, depth, colour = struct.unpack_from(">IIBB", encoded, 16)
    if depth not in PNG_DEPTHS.get(colour, ()):
        raise UnreadableImage(f"a PNG file of colour type {colour} with {depth} bits is not defined")
    if ended and not inside:
        return Header("png", height, width)
    position, kind, pixels, turned, sideways = len(PNG_START), b"", False, False, False
    while kind != b"IEND":
        if position + 12 > len(encoded):
            raise UnreadableImage("a PNG file whose chunks end before its end marker") if ended else _truncated()
        length, kind = struct.unpack_from(">I4s", encoded, position)
        stop = position + 8 + length
        if stop + 4 > len(encoded):
            raise UnreadableImage(f"a PNG chunk of {length} bytes that leaves the file") if ended else _truncated()
        if inside and zlib.crc32(encoded[position + 4 : stop]) != struct.unpack_from(">I", encoded, stop)[0]:
            raise UnreadableImage(f"a PNG chunk {kind!r} with a wrong checksum")
        if kind == b"eXIf":
            if turned:
                raise UnreadableImage("several EXIF blocks: DALI 2.x may end the process at them")
            turned = True
            sideways = _orientation(bytes(encoded[position + 8 : stop])) in _SIDEWAYS
        pixels |= kind == b"IDAT"
        position = stop + 4
    if not pixels:
        raise UnreadableImage("a PNG file without header or pixels")
    return Header("png", height, width, sideways)


def _jpeg(encoded: Buffer, *, ended: bool, inside: bool) -> Header:
    """Segment after segment up to the first scan: within the file, with possible frames and tables."""
    position, size, turn = 2, None, None
    while position + 4 <= len(encoded):
        if encoded[position] != 0xFF:
            raise UnreadableImage(f"not a JPEG marker at byte {position}")
        marker = encoded[position + 1]
        if marker == 0xFF or marker in _ALONE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == _END:
            break
        length = int.from_bytes(encoded[position + 2 : position + 4], "big")
        body = encoded[position + 4 : position + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise UnreadableImage(f"a JPEG segment {marker:#x} that leaves the file") if ended else _truncated()
        if marker in JPEG_FRAMES:
            size = _frame(body)
            if ended and not inside:
                return Header("jpeg", *size, turn in _SIDEWAYS)
        elif marker in _OTHER_FRAMES:
            raise UnreadableImage(f"JPEG frame type {marker:#x} (lossless or arithmetic) is not supported")
        elif marker == _HUFFMAN:
            _check_huffman(bytes(body))
        elif marker == JPEG_QUANTISATION and not body:
            raise UnreadableImage("an empty JPEG quantisation table")
        elif marker == _APP1 and body[: len(_EXIF)] == _EXIF:
            if turn is not None:
                raise UnreadableImage("several EXIF blocks: DALI 2.x may end the process at them")
            if len(body) < len(_EXIF) + 8:
                raise UnreadableImage("an empty EXIF block: DALI 2.x refuses it")
            turn = _orientation(bytes(body[len(_EXIF) :]))
        elif marker == _SCAN:
            if size is None:
                raise UnreadableImage("a JPEG scan before its frame")
            if not ended and re.search(JPEG_END, encoded[position:]) is None:  # much may follow the image
                raise _truncated()
            return Header("jpeg", *size, turn in _SIDEWAYS)
        position += 2 + length
    raise UnreadableImage("a JPEG file without pixels") if ended else _truncated()


def _truncated() -> UnreadableImage:
    return UnreadableImage("truncated: its end marker is missing")


def _frame(body: Buffer) -> tuple[int, int]:
    """Height and width, of: precision, height, width, components of three bytes each."""
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise UnreadableImage("a JPEG frame header of the wrong length")
    if body[0] != 8:
        raise UnreadableImage(f"JPEG samples of {body[0]} bits; 8 are supported")
    if body[5] not in (1, 3, 4):
        raise UnreadableImage(f"a JPEG frame of {body[5]} components; 1, 3 and 4 are supported")
    for component in range(body[5]):
        sampling = body[7 + 3 * component]
        if not (1 <= sampling >> 4 <= 4 and 1 <= sampling & 15 <= 4):
            raise UnreadableImage(f"an impossible JPEG sampling factor {sampling:#x}")
    height, width = struct.unpack_from(">HH", body, 1)
    return height, width


def _check_huffman(body: bytes) -> None:
    """Tables of 16 counts and as many symbols; no more codes of a length than there are."""
    position = 0
    while position < len(body):
        counts = body[position + 1 : position + 17]
        free = 1
        for count in counts:
            free = 2 * free - count
            if free < 0:
                raise UnreadableImage("a JPEG Huffman table with more codes than there are")
        position += 17 + sum(counts)
    if position != len(body):
        raise UnreadableImage("a JPEG Huffman table of the wrong length")


def _orientation(tiff: bytes) -> int:
    """The orientation in image file directory 0; 1 (upright) where it does not say. Damaged metadata count as none."""
    if tiff[:2] not in (b"II", b"MM"):
        return 1
    little = tiff.startswith(b"II")

    def number(start: int, length: int) -> int:
        return int.from_bytes(tiff[start : start + length], "little" if little else "big")

    directory = number(4, 4)
    for entry in range(number(directory, 2)):
        start = directory + 2 + 12 * entry
        if start + 12 > len(tiff):
            break
        if number(start, 2) == _ORIENTATION_TAG:
            return number(start + 8, 2)
    return 1
