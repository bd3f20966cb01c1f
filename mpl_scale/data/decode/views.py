"""How an image of any size becomes one of `image_size`: views by name, as arithmetic on sizes and random numbers.

A view moves no pixel. From an image's height and width, and for a weak view Philox numbers of (seed, epoch, sample id),
it says what DALI does with the image (dali.py): which part of it is decoded, to what size that is resized, where the
window lies in the result, and whether it is mirrored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpl_scale.config.names import Registry, require_known
from mpl_scale.config.schema import EvaluationConfig, WeakConfig

Placement = Mapping[str, np.ndarray]
"""What is done with each of n images, by step; a view always names the same steps, and DALI runs only these, in order.

crop_starts, crop_shapes: int32 [n, 2], the part that is decoded: (top, left) and (height, width), pixels.
sizes: float32 [n, 2], (height, width) it is resized to; not given: image_size.
windows: int32 [n, 2], (top, left) of the result in the resized image, pixels; what lies outside is filled.
flips: int32 [n], 1: mirrored.
"""

ATTEMPTS = 10  # of drawing a part that fits in the image; torchvision's and TensorFlow's number


@dataclass(frozen=True)
class View:
    """A view of images: what is drawn for each, and the arithmetic.

    columns: random numbers per image.
    steps: the names in every Placement.
    place: (uniform float64 [n, columns] in (0, 1), shapes int64 [n, 2] of height and width) -> Placement.
    interpolation: bilinear or bicubic, with an antialiasing filter; None: not resized, all parts have one size.
    margin: where the random numbers do no more than move the window over the whole image at image_size, and mirror it,
        whatever the image's shape: the most pixels that the window leaves the image by. None: they do more.
    """

    image_size: int
    columns: int
    steps: tuple[str, ...]
    place: Callable[[np.ndarray, np.ndarray], Placement]
    interpolation: str | None = "bilinear"
    fill: int = 0
    margin: int | None = None


WEAK_VIEWS: Registry[Callable[[WeakConfig, int], View]] = Registry("weak view")
register_weak_view = WEAK_VIEWS.register
"""Make a function `(settings, image_size) -> View` available as `mpl_scale.data.weak.kind`."""
EVALUATION_VIEWS: Registry[Callable[[EvaluationConfig, int], View]] = Registry("evaluation view")
register_evaluation_view = EVALUATION_VIEWS.register
"""The same for `mpl_scale.data.evaluation.kind`."""


def weak_view(config: WeakConfig, image_size: int) -> View:
    """The view of `mpl_scale.data.weak`; ValueError for an unknown kind, with the closest one."""
    require_known("mpl_scale.data.weak.kind", config.kind, WEAK_VIEWS)
    return WEAK_VIEWS[config.kind](config, image_size)


def evaluation_view(config: EvaluationConfig, image_size: int) -> View:
    """The view of `mpl_scale.data.evaluation`; ValueError for an unknown kind, with the closest one."""
    require_known("mpl_scale.data.evaluation.kind", config.kind, EVALUATION_VIEWS)
    return EVALUATION_VIEWS[config.kind](config, image_size)


def decoding_steps(view: View, *, resizes: bool) -> tuple[str, ...]:
    """The steps that DALI runs; resizes: False: it only decodes the parts."""
    return view.steps if resizes else tuple(step for step in view.steps if step.startswith("crop_"))


@register_weak_view("shift_crop")
def shift_crop(config: WeakConfig, image_size: int) -> View:
    """The whole image at image_size, shifted by up to `pad` pixels each way (C.2 for CIFAR-10 and SVHN)."""

    def place(uniform: np.ndarray, shapes: np.ndarray) -> Placement:
        windows = np.floor(uniform[:, :2] * (2 * config.pad + 1)).astype(np.int32) - config.pad
        return {"windows": windows} | _flips(config, uniform[:, 2])

    view = _weak(config, image_size, columns=3, steps=("windows",), place=place)
    return replace(view, margin=config.pad)


@register_weak_view("random_resized_crop")
def random_resized_crop(config: WeakConfig, image_size: int) -> View:
    """A part of random area and aspect ratio, resized (Inception's crop, as torchvision's RandomResizedCrop draws it).

    Area: U(scale) of the image's; width / height: log-uniform in `ratio`. The first of 10 draws that fits is placed
    uniformly; where none fits, the central part of the nearest allowed ratio.
    """
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])

    def place(uniform: np.ndarray, shapes: np.ndarray) -> Placement:
        height, width = shapes[:, :1], shapes[:, 1:]
        area_draws, ratio_draws = uniform[:, 3 : 3 + ATTEMPTS], uniform[:, 3 + ATTEMPTS : 3 + 2 * ATTEMPTS]
        area = height * width * (config.scale[0] + (config.scale[1] - config.scale[0]) * area_draws)
        ratio = np.exp(low + (high - low) * ratio_draws)
        tall, wide = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))  # [n, ATTEMPTS]
        fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
        first = fits.argmax(1)[:, None]
        drawn = np.concatenate([np.take_along_axis(tall, first, 1), np.take_along_axis(wide, first, 1)], axis=1)
        found = fits.any(1)[:, None]
        crops = np.where(found, drawn, _central_crops(config.ratio, shapes))
        starts = np.where(found, np.floor(uniform[:, :2] * (shapes - crops + 1)), (shapes - crops) // 2)
        return {"crop_starts": starts.astype(np.int32), "crop_shapes": crops.astype(np.int32)} | _flips(
            config, uniform[:, 2]
        )

    return _weak(config, image_size, columns=3 + 2 * ATTEMPTS, steps=("crop_starts", "crop_shapes"), place=place)


def _central_crops(ratio: tuple[float, float], shapes: np.ndarray) -> np.ndarray:
    """The largest parts with a width / height in `ratio`, float64 [n, 2]; at least one pixel."""
    height, width = shapes[:, 0].astype(np.float64), shapes[:, 1].astype(np.float64)
    tall = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    wide = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    return np.maximum(1, np.minimum(np.stack([tall, wide], axis=1), shapes))


def _flips(config: WeakConfig, uniform: np.ndarray) -> dict[str, np.ndarray]:
    return {"flips": (uniform < 0.5).astype(np.int32)} if config.flip else {}


def _weak(
    config: WeakConfig,
    image_size: int,
    *,
    columns: int,
    steps: tuple[str, ...],
    place: Callable[[np.ndarray, np.ndarray], Placement],
) -> View:
    steps += ("flips",) if config.flip else ()
    return View(image_size, columns, steps, place, interpolation=config.interpolation, fill=config.fill)


@register_evaluation_view("resize")
def resize(config: EvaluationConfig, image_size: int) -> View:
    """The whole image at image_size, whatever its aspect ratio."""
    return View(image_size, 0, (), lambda uniform, shapes: {}, interpolation=config.interpolation)


@register_evaluation_view("center_crop")
def center_crop(config: EvaluationConfig, image_size: int) -> View:
    """The shorter side at floor(image_size / crop_pct), then the central square: timm's and torchvision's evaluation.

    Both round as they do: the longer side down, the window's corner to the nearest, ties to the even pixel.
    """
    shorter = math.floor(image_size / config.crop_pct)

    def place(uniform: np.ndarray, shapes: np.ndarray) -> Placement:
        longer = shorter * shapes.max(1) // shapes.min(1)
        is_tall = shapes[:, 0] > shapes[:, 1]
        sizes = np.stack([np.where(is_tall, longer, shorter), np.where(is_tall, shorter, longer)], axis=1)
        windows = np.rint((sizes - image_size) / 2).astype(np.int32)
        return {"sizes": sizes.astype(np.float32), "windows": windows}

    return View(image_size, 0, ("sizes", "windows"), place, interpolation=config.interpolation)
