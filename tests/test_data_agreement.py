"""Our walk over headers agrees with PIL and DALI: what both decode is never refused, and read with the same size.

More variants: MPL_SCALE_FUZZ=5000 pytest tests/test_data_agreement.py
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from mpl_scale.data.decode.dali import decodes
from mpl_scale.data.encoded.header import UnreadableImage, examine
from mpl_scale.data.encoded.other_formats import pil_decode
from mpl_scale.data.encoded.probe import for_dali, probe
from tests.support.photographs import encoded, photograph

EXAMPLES = int(os.environ.get("MPL_SCALE_FUZZ", "150"))
CPU = torch.device("cpu")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(random: np.random.Generator) -> bytes:
    found = Image.Exif()
    found.endian = str(random.choice(["<", ">"]))
    found[0x010E] = "a description" * int(random.integers(1, 300))
    found[0x0112] = int(random.integers(0, 10))
    return found.tobytes()


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def jpeg(random: np.random.Generator) -> bytes:
    """Modes, subsampling, progressive scans, restart markers, metadata of all sorts, bytes between and behind."""
    mode = str(random.choice(["RGB", "L", "CMYK"]))
    options = {
        "progressive": bool(random.integers(2)),
        "optimize": bool(random.integers(2)),
        "quality": int(random.integers(5, 100)),
        "restart_marker_blocks": int(random.choice([0, 1, 7])),
    }
    if mode == "RGB":
        options["subsampling"] = int(random.integers(3))
    if random.integers(3) == 0:
        options["icc_profile"] = PROFILE * int(random.integers(1, 60))  # more than one segment
    if random.integers(2):
        options["exif"] = exif(random)
    content = encoded(picture(random).convert(mode), "JPEG", **options)
    extras = [
        b"",
        segment(0xFE, b"x" * int(random.integers(0, 60000))),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"),
        segment(0xE1, b"Exif\0\0" + exif(random)[6:]),
        segment(0xED, b"Photoshop 3.0\0" + bytes(40)),
        segment(0xE1, b"Exif\0\0"),
        b"\xff" * int(random.integers(1, 6)),  # padding before a marker
        segment(0xFE, b"x") + b"\0\0\0",  # bytes that belong to no segment
    ]
    for _ in range(int(random.integers(0, 4))):
        content = content[:2] + extras[random.integers(len(extras))] + content[2:]
    return content + trailing(random)


def png(random: np.random.Generator) -> bytes:
    """Modes and depths, chunks between header and pixels, interlaced or not, bytes behind the end."""
    mode = str(random.choice(["RGB", "L", "P", "1", "RGBA", "LA", "I;16"]))
    image = picture(random)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    info = PngImagePlugin.PngInfo()
    if random.integers(2):
        info.add_text("comment", "x" * int(random.integers(0, 80000)), zip=bool(random.integers(2)))
    options: dict = {"pnginfo": info, "compress_level": int(random.integers(10))}
    if random.integers(3) == 0:
        options["exif"] = exif(random)
    if random.integers(3) == 0:
        options["icc_profile"] = PROFILE
    if mode == "P" and random.integers(2):
        options["transparency"] = 3
    content = encoded(image, "PNG", **options)
    if random.integers(2):
        end = content.index(b"IDAT") - 4
        content = content[:end] + chunk(b"prVt", b"private") + content[end:]
    if random.integers(3) == 0:
        content = interlaced(random)
    return content + trailing(random)


def interlaced(random: np.random.Generator) -> bytes:
    """Adam7, 8 or 16 bits of RGB."""
    pixels, depth = np.asarray(picture(random)), int(random.choice([8, 16]))
    values = pixels.astype(">u2") * 257 if depth == 16 else pixels
    rows = b""
    for top, left, down, right in ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)):
        rows += b"".join(b"\0" + row.tobytes() for row in values[top::down, left::right] if row.size)
    rows += b"".join(b"\0" + row.tobytes() for row in values[1::2])
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, 2, 0, 0, 1)
    packed = zlib.compress(rows)
    half = len(packed) // 2
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", packed[:half]), chunk(b"IDAT", packed[half:]), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def others(random: np.random.Generator) -> bytes:
    """What PIL decodes for us."""
    kind, mode, options = OTHERS[random.integers(len(OTHERS))]
    return encoded(picture(random).convert(mode), kind, **options) + trailing(random)


OTHERS: list[tuple[str, str, dict]] = [
    ("WEBP", "RGB", {"quality": 40}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("BMP", "1", {}),
    ("GIF", "P", {}),
    ("GIF", "RGB", {"interlace": 0}),
    *[("TIFF", mode, {}) for mode in ("RGB", "L", "CMYK", "RGBA", "LAB", "YCbCr", "1", "P")],
    ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("PPM", "RGB", {}),
    ("PPM", "L", {}),
    ("PPM", "1", {}),
]


def picture(random: np.random.Generator) -> Image.Image:
    return photograph(int(random.integers(3)), int(random.integers(1, 90)), int(random.integers(1, 70)))


def trailing(random: np.random.Generator) -> bytes:
    return random.bytes(int(random.choice([0, 0, 1, 64, 5000, 70000])))


def damaged(random: np.random.Generator, content: bytes) -> bytes:
    """Cut, changed, or with bytes put in or taken out."""
    spoilt, place = bytearray(content), int(random.integers(len(content)))
    match random.integers(4):
        case 0:
            del spoilt[place:]
        case 1:
            spoilt[place] ^= int(random.integers(1, 256))
        case 2:
            spoilt[place:place] = random.bytes(int(random.integers(1, 9)))
        case _:
            del spoilt[place : place + int(random.integers(1, 9))]
    return bytes(spoilt)


def by_pil(content: bytes) -> tuple[int, int] | None:
    """Height and width as PIL decodes the image, stored; None: it does not."""
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
        image.load()
    except Exception:
        return None
    return image.height, image.width


def by_us(content: bytes) -> tuple[tuple[int, int] | None, str]:
    """Height and width as stored, and the reason where it is refused."""
    try:
        for_dali(np.frombuffer(content, np.uint8), max_pixels=50_000_000)
        return probe(content).stored, ""
    except UnreadableImage as error:
        return None, str(error)


@pytest.mark.parametrize("kind", [jpeg, png, others], ids=lambda kind: kind.__name__)
def test_what_pil_decodes_is_read_with_its_size(kind: Callable[[np.random.Generator], bytes]) -> None:
    """Sound variants, and damaged ones that PIL decodes all the same; every disagreement is listed."""
    disagreements = []
    for seed in range(EXAMPLES // 3):
        random = np.random.default_rng([seed, len(kind.__name__)])
        sound = kind(random)
        assert by_pil(sound) is not None, f"variant {seed} is not sound"
        for name, content in (("sound", sound), ("damaged", damaged(random, sound))):
            expected = by_pil(content)
            found, reason = by_us(content)
            if expected is not None and found != expected:
                disagreements.append(f"{name} {kind.__name__} {seed}: PIL {expected}, we {found} {reason}")
    assert not disagreements, "\n".join(disagreements)


@pytest.mark.parametrize("kind", [jpeg, png], ids=lambda kind: kind.__name__)
def test_what_our_walk_passes_is_decoded_by_dali_to_the_size_that_it_gives(
    kind: Callable[[np.random.Generator], bytes],
) -> None:
    """A crop of the whole stated size fits, and one a pixel larger would not: DALI refuses a part outside the image."""
    for seed in range(max(8, EXAMPLES // 10)):
        content = kind(np.random.default_rng([seed, 7]))
        try:
            height, width = examine(content).decoded
        except UnreadableImage:
            continue  # PIL's
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        file, start = np.frombuffer(content, np.uint8), np.zeros(2, np.int32)
        assert decodes(file, CPU, crop=(start, np.array([height, width], np.int32))), seed
        for larger in ([height + 1, width], [height, width + 1]):
            assert not decodes(file, CPU, crop=(start, np.array(larger, np.int32))), seed
        assert upright.size == (width, height), f"variant {seed}: PIL and DALI turn it differently"
        assert pil_decode(content).shape == (height, width, 3)
