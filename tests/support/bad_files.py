"""Files as they are found among millions: damaged, mislabelled, unusual; and what becomes of each.

GOOD kinds decode, however odd they look. In the place of BAD kinds, and of what is NO_FILE, stands another image.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.photographs import encoded, photograph

WIDTH, HEIGHT = 120, 90


def _image(mode: str = "RGB") -> Image.Image:
    return photograph(0, WIDTH, HEIGHT).convert(mode)


def _jpeg(mode: str = "RGB", **options: object) -> bytes:
    return encoded(_image(mode), "JPEG", **options)


def _png(mode: str = "RGB", **options: object) -> bytes:
    return encoded(_image(mode), "PNG", **options)


def _put(data: bytes, position: int, replacement: bytes) -> bytes:
    return data[:position] + replacement + data[position + len(replacement) :]


def _frame(data: bytes) -> int:
    """Where the JPEG's baseline frame header begins."""
    return data.index(b"\xff\xc0")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_of(width: int, height: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _sixteen_bits() -> bytes:
    levels = np.asarray(_image("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(levels), "PNG")


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _two_exif_blocks() -> bytes:
    """PIL takes the first orientation; DALI 2.x may end the process."""
    whole = _jpeg(exif=_exif(8))
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(_exif(4)) + 2) + _exif(4) + whole[2:]


def _thumbnail_then_cut() -> bytes:
    """Cut in its pixels, but with an end marker among the last 4 kB: that of the thumbnail in its metadata."""
    whole = _jpeg(quality=60)
    thumbnail = encoded(photograph(0, 16, 12), "JPEG", quality=30)
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 8) + b"Thumb\0" + thumbnail
    pixels = whole.index(b"\xff\xda")
    return whole[:2] + segment + whole[2 : pixels + 900]


GOOD: dict[str, Callable[[], bytes]] = {
    "cmyk.jpg": lambda: _jpeg("CMYK"),
    "grey.jpg": lambda: _jpeg("L"),
    "progressive.jpg": lambda: _jpeg(progressive=True),
    "turned.jpg": lambda: _jpeg(exif=_exif(6)),
    "garbage_after_end.jpg": lambda: _jpeg() + b"\x93garbage" * 60,
    "cut_but_ended.jpg": lambda: _jpeg()[: len(_jpeg()) // 2] + b"\xff\xd9",  # the rest is grey, as with PIL
    "wrong_huffman_codes.jpg": lambda: _put(_jpeg(), _jpeg().index(b"\xff\xda") + 1200, b"\x12\x34\x56\x78" * 20),
    "png_in_truth.jpg": _png,
    "jpeg_in_truth.png": _jpeg,
    "palette.png": lambda: _png("P"),
    "grey.png": lambda: _png("L"),
    "grey_alpha.png": lambda: _png("LA"),
    "alpha.png": lambda: _png("RGBA"),
    "one_bit.png": lambda: _png("1"),
    "sixteen_bits.png": _sixteen_bits,
    "gif_in_truth.jpg": lambda: encoded(_image("P"), "GIF"),
    "arithmetic.jpg": lambda: _put(_jpeg(), _frame(_jpeg()), b"\xff\xc9"),  # what it makes of Huffman codes
    "two_exif_blocks.jpg": lambda: _two_exif_blocks(),
    "lossless.webp": lambda: encoded(_image(), "WEBP", lossless=True),
    "lossy.webp": lambda: encoded(_image(), "WEBP"),
    "turned.webp": lambda: encoded(_image(), "WEBP", exif=_exif(6)),
    "plain.bmp": lambda: encoded(_image(), "BMP"),
    "palette.bmp": lambda: encoded(_image("P"), "BMP"),
    "packed.tiff": lambda: encoded(_image(), "TIFF", compression="tiff_lzw"),
    "cmyk.tiff": lambda: encoded(_image("CMYK"), "TIFF"),
    "grey.pgm": lambda: encoded(_image("L"), "PPM"),
    "animated.gif": lambda: encoded(_image(), "GIF", save_all=True, append_images=[_image("L").convert("RGB")]),
    "long_garbage_after_end.jpg": lambda: _jpeg() + b"\x93garbage" * 1000,
    "garbage_after_end.png": lambda: _png() + b"\x93garbage" * 1000,
    "garbage_between_segments.jpg": lambda: _jpeg()[:20] + b"\0\0\0" + _jpeg()[20:],
    "one_pixel.png": lambda: encoded(photograph(0, 1, 1)),
    "one_pixel.jpg": lambda: encoded(photograph(0, 1, 1), "JPEG"),
    "one_row.jpg": lambda: encoded(photograph(0, 300, 1), "JPEG"),
}

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.jpg": (lambda: b"", "the file is empty"),
    "two_bytes.jpg": (lambda: b"\xff\xd8", "neither a PNG nor a JPEG"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "neither a PNG nor a JPEG"),
    "gif_cut.jpg": (lambda: encoded(_image("P"), "GIF")[:900], "a gif file that PIL cannot decode"),
    "webp_cut.jpg": (lambda: encoded(_image(), "WEBP")[:-300], "a webp file that PIL cannot"),
    "float.tiff": (lambda: encoded(_image("F"), "TIFF"), "numbers without a known range"),
    "cut.jpg": (lambda: _jpeg()[: len(_jpeg()) // 2], "truncated"),
    "cut_in_header.jpg": (lambda: _jpeg()[:100], "truncated"),
    "header_only.jpg": (lambda: _jpeg()[: _jpeg().index(b"\xff\xda")] + b"\xff\xd9", "without pixels"),
    "cut_after_thumbnail.jpg": (_thumbnail_then_cut, "DALI cannot decode it"),
    "lossless.jpg": (lambda: _put(_jpeg(), _frame(_jpeg()), b"\xff\xc3"), "not supported"),
    "no_rows.jpg": (lambda: _put(_jpeg(), _frame(_jpeg()) + 5, b"\0\0\0\0"), "0 x 0 pixels"),
    "twelve_bits.jpg": (lambda: _put(_jpeg(), _frame(_jpeg()) + 4, b"\x0c"), ""),
    "seven_channels.jpg": (lambda: _put(_jpeg(), _frame(_jpeg()) + 9, b"\x07"), "wrong length"),
    "huffman_table.jpg": (
        lambda: _put(_jpeg(), _jpeg().index(b"\xff\xc4") + 5, b"\xff" * 16),
        "more codes than there are",
    ),
    "huge_frame.jpg": (lambda: _put(_jpeg(), _frame(_jpeg()) + 5, struct.pack(">HH", 65000, 65000)), "pixels"),
    "cut.png": (lambda: _png()[: len(_png()) // 2], "truncated"),
    "cut_but_ended.png": (lambda: _png()[: len(_png()) // 2] + _chunk(b"IEND", b""), "leaves the file"),
    "flipped_bit.png": (lambda: _flipped(_png()), "wrong checksum"),
    "bad_zlib.png": (lambda: _put(_png(), _png().index(b"IDAT") + 4, b"\0\0\0\0"), "wrong checksum"),
    "header_crc.png": (lambda: _put(_png(), 29, b"\0\0\0\0"), "wrong checksum"),
    "no_pixels.png": (lambda: _png()[:33] + _chunk(b"IEND", b""), "without header or pixels"),
    "bomb.png": (lambda: _png_of(12000, 9000, zlib.compress(b"")), "pixels"),
    "huge.png": (lambda: _png_of(90000, 90000, zlib.compress(b"")), "pixels"),
}
"""Content and the reason that is given."""

NO_FILE: dict[str, Callable[[Path], object]] = {
    "missing.jpg": lambda path: None,
    "folder.jpg": lambda path: path.mkdir(),
    "dangling.jpg": lambda path: path.symlink_to(path.with_name("nowhere.jpg")),
    "pipe.jpg": lambda path: os.mkfifo(path),
}
"""What stands in the place of a file."""


def _flipped(data: bytes) -> bytes:
    position = data.index(b"IDAT") + 40
    return _put(data, position, bytes([data[position] ^ 0xFF]))


def corrupt_body(path: Path) -> None:
    """Flip bits of the compressed pixels and mend their checksum: only a decode can tell."""
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT")
    data[start + 20] ^= 0xFF
    stop = start + 4 + int.from_bytes(data[start - 4 : start], "big")
    data[stop : stop + 4] = zlib.crc32(data[start:stop]).to_bytes(4, "big")
    path.write_bytes(data)


SPOIL = {
    "corrupt": (corrupt_body, "DALI cannot decode it"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "truncated"),
    "deleted": (lambda path: path.unlink(), "cannot be read: No such file or directory"),
}
