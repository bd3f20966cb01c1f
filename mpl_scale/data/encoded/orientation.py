"""Which way up an image is: its EXIF orientation, which DALI applies when it decodes.

A camera held upright writes a landscape image and a note. DALI turns such an image, so the heights and widths that
crops are drawn from must be those of the turned image. (PIL turns only on request, and timm never asks: there a
network sees these images lying on their side.)
"""

from __future__ import annotations

_JPEG_MAGIC = b"\xff\xd8"
_PNG_EXIF = b"eXIf"
_EXIF = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # turned by a quarter


def lies_on_its_side(encoded: bytes) -> bool:
    """Whether height and width of the decoded image are those of the header, swapped.

    Args:
        encoded: a JPEG or PNG file, or as much of its start as holds the metadata. Damaged metadata count as none.
    """
    tiff = _jpeg_exif(encoded) if encoded.startswith(_JPEG_MAGIC) else _png_exif(encoded)
    return _orientation(tiff) in _SIDEWAYS


def _jpeg_exif(encoded: bytes) -> bytes:
    """The TIFF structure in the first APP1 segment that is EXIF; empty: there is none."""
    position = 2
    while position + 4 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker == 0xDA:  # the pixels begin
            break
        length = int.from_bytes(encoded[position + 2 : position + 4], "big")
        if marker == 0xE1 and encoded.startswith(_EXIF, position + 4):
            return encoded[position + 4 + len(_EXIF) : position + 2 + length]
        position += 2 + length
    return b""


def _png_exif(encoded: bytes) -> bytes:
    """The content of the eXIf chunk, which is a TIFF structure; empty: there is none."""
    if _PNG_EXIF not in encoded:  # nearly always
        return b""
    position = 8
    while position + 8 <= len(encoded):
        length = int.from_bytes(encoded[position : position + 4], "big")
        if encoded.startswith(_PNG_EXIF, position + 4):
            return encoded[position + 8 : position + 8 + length]
        position += 12 + length
    return b""


def _orientation(tiff: bytes) -> int:
    """The orientation in image file directory 0; 1 (upright) where it does not say."""
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
