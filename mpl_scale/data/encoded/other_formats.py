"""What DALI is not given and PIL decodes: WebP, BMP, GIF (the first frame), TIFF, other PNM; unusual PNG and JPEG.

PIL's classes are called directly, by a file's first bytes: Image.open would try every format it knows (PostScript
starts a program) and has a limit of pixels of its own, which mpl_scale.data.max_pixels could not raise.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from mpl_scale.data.encoded.header import Buffer, Header, UnreadableImage, require_possible

_FORMATS: tuple[tuple[str, bytes, bytes, Callable[[io.BytesIO], ImageFile]], ...] = (
    ("jpeg", b"\xff\xd8\xff", b"", JpegImagePlugin.JpegImageFile),
    ("png", b"\x89PNG\r\n\x1a\n", b"", PngImagePlugin.PngImageFile),
    ("webp", b"RIFF", b"WEBP", WebPImagePlugin.WebPImageFile),
    ("bmp", b"BM", b"", BmpImagePlugin.BmpImageFile),
    ("gif", b"GIF87a", b"", GifImagePlugin.GifImageFile),
    ("gif", b"GIF89a", b"", GifImagePlugin.GifImageFile),
    ("tiff", b"II*\0", b"", TiffImagePlugin.TiffImageFile),
    ("tiff", b"MM\0*", b"", TiffImagePlugin.TiffImageFile),
    ("tiff", b"II+\0", b"", TiffImagePlugin.TiffImageFile),
    ("tiff", b"MM\0+", b"", TiffImagePlugin.TiffImageFile),
    *((f"pnm P{kind}", b"P%d" % kind, b"", PpmImagePlugin.PpmImageFile) for kind in range(1, 7)),
)
"""Name, first bytes, bytes from the eighth on, PIL's class."""


def pil_header(encoded: Buffer) -> Header:
    """The header of an image that PIL opens.

    Raises:
        UnreadableImage: of no format that is read here, or PIL cannot open it.
    """
    kind, make = _format(encoded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = make(io.BytesIO(encoded))
        except Exception as error:  # whatever PIL meets in damaged files: OSError, SyntaxError, struct.error, ...
            raise UnreadableImage(f"a {kind} file that PIL cannot open: {error}") from error
    header = Header(kind, image.height, image.width, by_pil=True)
    require_possible(header)
    return header


def pil_decode(encoded: Buffer) -> np.ndarray:
    """The pixels, uint8 [H, W, 3], the right way up; 16 bits are scaled to 8 as DALI does, alpha is dropped.

    Raises:
        UnreadableImage: of no format that is read here, damaged, or of numbers without a known range.
    """
    kind, make = _format(encoded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = make(io.BytesIO(encoded))
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or (upright.mode == "I" and kind.startswith(("pnm", "png"))):
                grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if upright.mode in ("I", "F"):
                raise UnreadableImage(f"a {kind} file of numbers without a known range; convert it to 8 bits")
            return np.asarray(upright.convert("RGB"))
        except UnreadableImage:
            raise
        except Exception as error:  # as above
            raise UnreadableImage(f"a {kind} file that PIL cannot decode: {error}") from error


def _format(encoded: Buffer) -> tuple[str, Callable[[io.BytesIO], ImageFile]]:
    start = bytes(encoded[:16])
    for kind, first, eighth, make in _FORMATS:
        if start.startswith(first) and start.startswith(eighth, 8):
            return kind, make
    raise UnreadableImage("neither a PNG nor a JPEG file, nor another that is read")
