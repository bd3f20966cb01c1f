"""Is the inside of this PNG or JPEG file sound? Answered for the whole file, before a decoder sees it.

The probe looks at a file's ends; this walks its segments. Decoders are written for honest files: a frame of seven
components, a table of impossible codes or a chunk whose checksum is wrong can make one write where it must not, and end
the process later and elsewhere. PNG chunks carry checksums, which cost far less than decoding.
"""

from __future__ import annotations

import struct
import zlib

from mpl_scale.data.encoded.probe import UnreadableImage

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC = b"\xff\xd8"
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a segment
_FRAMES = {0xC0, 0xC1, 0xC2}
_HUFFMAN, _QUANTISATION, _SCAN, _END = 0xC4, 0xDB, 0xDA, 0xD9


def check_structure(encoded: bytes) -> None:
    """Raise UnreadableImage, with the reason, where the file is damaged inside. Other formats pass."""
    if encoded.startswith(_PNG_MAGIC):
        _check_png(encoded)
    elif encoded.startswith(_JPEG_MAGIC):
        _check_jpeg(encoded)


def _check_png(encoded: bytes) -> None:
    """Chunk after chunk: within the file, with the right checksum, pixels between header and end."""
    position, kinds = len(_PNG_MAGIC), list[bytes]()
    while not kinds or kinds[-1] != b"IEND":
        if position + 12 > len(encoded):
            raise UnreadableImage("a PNG file whose chunks end before its end marker")
        length, kind = struct.unpack_from(">I4s", encoded, position)
        stop = position + 8 + length
        if stop + 4 > len(encoded):
            raise UnreadableImage(f"a PNG chunk of {length} bytes that leaves the file")
        if zlib.crc32(encoded[position + 4 : stop]) != struct.unpack_from(">I", encoded, stop)[0]:
            raise UnreadableImage(f"a PNG chunk {kind!r} with a wrong checksum")
        kinds.append(kind)
        position = stop + 4
    if kinds[0] != b"IHDR" or b"IDAT" not in kinds:
        raise UnreadableImage("a PNG file without header or pixels")


def _check_jpeg(encoded: bytes) -> None:
    """Segment after segment up to the first scan: within the file, with possible frames and tables."""
    position, frame = 2, False
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
            raise UnreadableImage(f"a JPEG segment {marker:#x} that leaves the file")
        if marker in _FRAMES:
            _check_frame(body)
            frame = True
        elif marker == _HUFFMAN:
            _check_huffman(body)
        elif marker == _QUANTISATION and not body:
            raise UnreadableImage("an empty JPEG quantisation table")
        elif marker == _SCAN:
            if not frame:
                raise UnreadableImage("a JPEG scan before its frame")
            return
        position += 2 + length
    raise UnreadableImage("a JPEG file without pixels")


def _check_frame(body: bytes) -> None:
    """Precision, height, width, components of three bytes each."""
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
