"""A picture of unlabelled images as the networks saw them, and what they were called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE, MOST_SIDE = 64, 192
"""Pixels of a view in the picture: smaller images are enlarged by a whole factor, larger ones reduced."""
_TEXT, _LINE, _GAP, _FONT = 150, 16, 6, 12
_INK, _RIGHT, _WRONG = (30, 30, 30), (20, 120, 40), (180, 30, 30)


@dataclass(frozen=True)
class Labelled:
    """One image. weak, strong: its views, uint8 [C, H, W]. label, truth: names of classes, truth where known.

    confidence: of the label. right: whether it is the truth.
    """

    weak: np.ndarray
    strong: np.ndarray
    label: str
    confidence: float
    truth: str | None = None
    right: bool = False


def draw_grid(images: Sequence[Labelled], *, title: str, columns: int = 2) -> Image.Image:
    """Weak view, strong view and label of each image; a wrong label is red, a right one green.

    Args:
        images: at least one, all of one size.
        title: written above.
        columns: at most that many images in a row.
    """
    side, columns = _side(images[0].weak.shape[-1]), min(columns, len(images))
    wide, high = 2 * side + 3 * _GAP + _TEXT, max(side, 3 * _LINE) + _GAP
    rows = -(-len(images) // columns)
    top = 2 * _LINE + _GAP
    page = Image.new("RGB", (columns * wide + _GAP, top + rows * high + _GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT)
    pen.text((_GAP, _GAP), title, fill=_INK, font=font)
    for number, one in enumerate(images):
        left, upper = (number % columns) * wide + _GAP, top + (number // columns) * high
        for place, view in enumerate((one.weak, one.strong)):
            page.paste(_picture(view, side), (left + place * (side + _GAP), upper))
        colour = _INK if one.truth is None else _RIGHT if one.right else _WRONG
        words = [one.label, f"{one.confidence:.1%}", *([] if one.truth is None else [f"is {one.truth}"])]
        for line, text in enumerate(words):
            at = (left + 2 * (side + _GAP), upper + line * _LINE)
            pen.text(at, _fitting(text, font), fill=colour if line == 0 else _INK, font=font)
    return page


def _side(pixels: int) -> int:
    """The side of a view in the picture."""
    return min(MOST_SIDE, pixels * -(-LEAST_SIDE // pixels))


def _picture(view: np.ndarray, side: int) -> Image.Image:
    """A view, RGB, side by side pixels; of many channels the first three, of two the first."""
    view = view[: 3 if len(view) >= 3 else 1]
    pixels = np.ascontiguousarray(np.broadcast_to(view, (3, *view.shape[1:])).transpose(1, 2, 0))
    enlarged = side >= view.shape[-1]
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)


def _fitting(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """As much of a name as there is room for. What the font cannot draw is a question mark."""
    text = "".join(sign if sign.isprintable() else "?" for sign in text.encode("latin-1", "replace").decode("latin-1"))
    text = text[:_TEXT]  # no sign is narrower than a pixel
    if font.getlength(text) <= _TEXT:
        return text
    while text and font.getlength(f"{text}...") > _TEXT:
        text = text[:-1]
    return f"{text}..."
