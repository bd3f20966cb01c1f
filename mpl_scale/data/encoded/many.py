"""Headers of many images at once, by numpy: what `probe` says of the usual PNG and JPEG files, a few calls for all.

Each step looks at the same place of all images: a PNG's header, or a JPEG's next segment. What is not plain there (a
JPEG with EXIF, another ending, damage) is left to `probe`, image by image.
"""

from __future__ import annotations

import numpy as np

from mpl_scale.data.encoded.header import (
    JPEG_END,
    JPEG_FRAMES,
    JPEG_QUANTISATION,
    JPEG_START,
    PNG_DEPTHS,
    PNG_END,
    PNG_START,
)

KINDS = ("", "png", "jpeg")
"""What `kinds` counts in; "": left to `probe`."""
_MOST_SIDE = 1 << 15  # larger ones are left: their products and signs need care
_MOST_SEGMENTS = 16  # of a JPEG before its frame
_PNG_BYTES, _FRAME_BYTES = 33, 22
"""From the start of a file to the end of its header; from a marker to the end of the largest frame."""

_DEPTHS, _SKIPPED, _FRAMES = np.zeros((256, 256), bool), np.zeros(256, bool), np.zeros(256, bool)
"""Which depths a PNG of a colour type may have; which JPEG segments say nothing here; which are frames."""
for _colour, _bits in PNG_DEPTHS.items():
    _DEPTHS[_colour, list(_bits)] = True
_SKIPPED[[0xE0, *range(0xE2, 0xF0), 0xFE, 0xDD, JPEG_QUANTISATION]] = True  # APP0, APP2 to APP15, comments, DRI
_FRAMES[list(JPEG_FRAMES)] = True


def probe_many(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The headers of images that lie in one array of bytes.

    Args:
        data: uint8 [bytes].
        starts: int64 [n], each image's first byte.
        ends: int64 [n], the byte after its last.

    Returns:
        kinds, uint8 [n], and sizes, int32 [n, 2]: height and width as stored, pixels. Where kinds is 0 nothing is
        known: `probe` says what the image is, or why it is none. Elsewhere it would say just this.
    """
    kinds, sizes = np.zeros(len(starts), np.uint8), np.zeros((len(starts), 2), np.int32)
    rows = np.flatnonzero(ends - starts >= _PNG_BYTES)
    is_png = _equal(data, starts[rows], PNG_START) & _equal(data, ends[rows] - len(PNG_END), PNG_END)
    is_jpeg = _equal(data, starts[rows], JPEG_START) & _equal(data, ends[rows] - len(JPEG_END), JPEG_END)
    _png(data, starts, rows[is_png], kinds, sizes)
    _jpeg(data, starts, ends, rows[is_jpeg], kinds, sizes)
    return kinds, sizes


def _equal(data: np.ndarray, places: np.ndarray, expected: bytes) -> np.ndarray:
    """Whether the bytes from each place on are those, bool [n]."""
    found = np.ones(len(places), bool)
    for step, byte in enumerate(expected):
        found &= data[places + step] == byte
    return found


def _number(data: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
    """The big-endian number of `length` bytes at each place, int64 [n]."""
    found = np.zeros(len(places), np.int64)
    for step in range(length):
        found = found << 8 | data[places + step]
    return found


def _settle(
    rows: np.ndarray, height: np.ndarray, width: np.ndarray, kind: str, kinds: np.ndarray, sizes: np.ndarray
) -> None:
    """Note the images of possible sizes."""
    possible = (height > 0) & (height <= _MOST_SIDE) & (width > 0) & (width <= _MOST_SIDE)
    kinds[rows[possible]] = KINDS.index(kind)
    sizes[rows[possible]] = np.stack([height[possible], width[possible]], axis=1)


def _png(data: np.ndarray, starts: np.ndarray, rows: np.ndarray, kinds: np.ndarray, sizes: np.ndarray) -> None:
    at = starts[rows]
    sound = _equal(data, at + 12, b"IHDR") & _DEPTHS[data[at + 25], data[at + 24]]
    rows, at = rows[sound], at[sound]
    _settle(rows, _number(data, at + 20, 4), _number(data, at + 16, 4), "png", kinds, sizes)


def _jpeg(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray, rows: np.ndarray, kinds: np.ndarray, sizes: np.ndarray
) -> None:
    """All images take a segment at a time, until none is left before its frame."""
    at = starts[rows] + 2
    for _ in range(_MOST_SEGMENTS):
        inside = at + _FRAME_BYTES <= ends[rows]
        rows, at = rows[inside], at[inside]
        marker, length = data[at + 1], _number(data, at + 2, 2)
        sound = (data[at] == 0xFF) & (length > 2) & (at + 2 + length <= ends[rows])
        frames = sound & _FRAMES[marker]
        frames[frames] = _is_frame(data, at[frames], length[frames])
        ours = at[frames]
        _settle(rows[frames], _number(data, ours + 5, 2), _number(data, ours + 7, 2), "jpeg", kinds, sizes)
        onward = sound & _SKIPPED[marker]
        rows, at = rows[onward], (at + 2 + length)[onward]
        if not len(rows):
            break


def _is_frame(data: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Whether the segment at each marker is a frame that libjpeg-turbo decodes."""
    components = data[at + 9]
    sound = (data[at + 4] == 8) & np.isin(components, (1, 3, 4)) & (length == 8 + 3 * components.astype(np.int64))
    for component in range(4):
        sampling = data[at + 11 + 3 * component]
        across, down = sampling >> 4, sampling & 15
        possible = (across >= 1) & (across <= 4) & (down >= 1) & (down <= 4)
        sound &= possible | (component >= components)
    return sound
