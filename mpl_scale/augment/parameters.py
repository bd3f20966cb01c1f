"""What the host decides about the static strong view: one row of 32-bit numbers per image and step (static.py).

A step's parameters are those of `STEP`. An operation sets a few of them (`Operation.static`); the others stay as in
`NONE`, which leaves an image alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

BITS = 16
"""After the point in PIL's coordinates."""
_ONE = 1 << BITS
_START = _ONE + _ONE // 2  # the first pixel's centre, in an image with a frame of one pixel

_DEFAULTS: dict[str, tuple[type[np.generic], float]] = {
    # blends: the factor of the image itself, or of its partner
    "color": (np.float32, 1),
    "sharpness": (np.float32, 1),
    "share": (np.float32, 0),
    # tables: levels from `first` on become slope * level + offset + of_mean * mean luminance; then bits are masked
    "first": (np.float32, 256),
    "slope": (np.float32, 1),
    "offset": (np.float32, 0),
    "of_mean": (np.float32, 0),
    "mask": (np.int32, 255),
    "stretch": (np.int32, 0),  # 1: autocontrast's table
    "equalize": (np.int32, 0),  # 1: equalize's table
    # PIL's affine `data` for pixel centres, in fixed point, of a map into an image with a frame of one pixel
    "a": (np.int32, _ONE),
    "b": (np.int32, 0),
    "c": (np.int32, _START),
    "d": (np.int32, 0),
    "e": (np.int32, _ONE),
    "f": (np.int32, _START),
    # a square that is filled: rows [top, bottom), columns [left, right)
    "top": (np.int32, 0),
    "left": (np.int32, 0),
    "bottom": (np.int32, 0),
    "right": (np.int32, 0),
}
STEP = np.dtype([(name, kind) for name, (kind, _) in _DEFAULTS.items()])
"""Parameters of one step of one image."""
NONE = np.array(tuple(value for _, value in _DEFAULTS.values()), STEP)
"""Parameters that leave an image alone."""
COLUMNS = len(_DEFAULTS)
LINE = frozenset({"first", "slope", "offset", "of_mean"})
TABLE = LINE | {"mask", "stretch", "equalize"}
BLEND = frozenset({"color", "sharpness", "share"})
MATRIX = frozenset("abcdef")
SQUARE = frozenset({"top", "left", "bottom", "right"})

Values = Mapping[str, np.ndarray | float]
Static = Callable[[np.ndarray, np.ndarray, tuple[int, int]], Values]
"""`(amount, centres, (height, width)) -> values`

An operation's parameters by their names in `STEP`, float64 [B] or one for all. The names do not depend on arguments.

amount: float64 [B], in the units of PIL's function.
centres: float64 [B, 2] in (0, 1), a place in each image as shares of its height and width.
"""


def affine_map(**coefficients: np.ndarray) -> Values:
    """PIL's Image.transform(AFFINE, (a, b, c, d, e, f), NEAREST).

    Args:
        coefficients: float64 [B] by name, with shifts below 2**15 pixels; what is not given is the identity's.
    """
    identity = zip("abcdef", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), strict=True)
    a, b, c, d, e, f = (coefficients.get(name, default) for name, default in identity)
    centred = {**coefficients, "c": c + (0.5 * a + 0.5 * b), "f": f + (0.5 * d + 0.5 * e)}
    fixed = {name: np.floor(value * _ONE + 0.5) for name, value in centred.items() if isinstance(value, np.ndarray)}
    for name in fixed.keys() & {"c", "f"}:
        fixed[name] += _ONE  # the frame
    return fixed


def unchanged(count: int, steps: int, *, pinned: bool) -> tuple[torch.Tensor, np.ndarray]:
    """Parameters that leave all images alone: int32 [count, steps * COLUMNS], and their view as `STEP` [count, steps].

    Args:
        count: images.
        steps: of each image.
        pinned: in page-locked memory, from which a copy to a GPU need not wait.
    """
    tensor = torch.empty((count, steps * COLUMNS), dtype=torch.int32, pin_memory=pinned)
    numbers = tensor.numpy()
    numbers.reshape(-1, COLUMNS)[...] = NONE.reshape(1).view(np.int32)
    return tensor, numbers.view(STEP)
