"""Every operation gives PIL's bytes, for the magnitudes it documents."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from mpl_scale.augment.registry import OPS, TABLE_5, find_ops, register_op

FILL = 77
Reference = Callable[[Image.Image, float], Image.Image]


def enhance(kind: type) -> Reference:
    """The enhancer at 1 + 0.9 strength, which the operations round to 1/4096."""
    return lambda image, strength: kind(image).enhance(round((1 + 0.9 * strength) * 4096) / 4096)


def affine(*data: Callable[[float, Image.Image], float] | int) -> Reference:
    def reference(image: Image.Image, strength: float) -> Image.Image:
        matrix = [value if isinstance(value, int) else value(strength, image) for value in data]
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(FILL,) * 3
        )

    return reference


PIL_OPS: dict[str, Reference] = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "brightness": enhance(ImageEnhance.Brightness),
    "color": enhance(ImageEnhance.Color),
    "contrast": enhance(ImageEnhance.Contrast),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - math.floor(4 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 - math.floor(256 * abs(s))),
    "rotate": lambda image, s: image.rotate(30 * s, Image.Resampling.NEAREST, fillcolor=(FILL,) * 3),
    "shear_x": affine(1, lambda s, _: 0.3 * s, 0, 0, 1, 0),
    "shear_y": affine(1, 0, 0, lambda s, _: 0.3 * s, 1, 0),
    "translate_x": affine(1, 0, lambda s, image: round(s * image.width * 100 / 331), 0, 1, 0),
    "translate_y": affine(1, 0, 0, 0, 1, lambda s, image: round(s * image.height * 100 / 331)),
}


def some_images(size: tuple[int, int]) -> torch.Tensor:
    """Noise, smooth ramps of narrow range, one colour, and few levels: uint8 [28, 3, *size]."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (12, 3, *size))
    ramp = np.linspace(0, 1, size[1]) * generator.integers(1, 256, (12, 3, 1, 1)) + np.zeros((*size,))
    flat = np.broadcast_to(generator.integers(0, 256, (2, 3, 1, 1)), (2, 3, *size))
    coarse = generator.integers(0, 3, (2, 3, *size)) * 100
    return torch.from_numpy(np.concatenate([noise, ramp, flat, coarse]).astype(np.uint8))


@pytest.mark.parametrize("size", [(8, 8), (33, 20)])
@pytest.mark.parametrize("name", TABLE_5)
def test_equals_pil(name: str, size: tuple[int, int]) -> None:
    images = some_images(size)
    generator = np.random.default_rng(1)
    strength = generator.uniform(-1, 1, len(images))
    strength[:3] = (-1, 0, 1)
    before = images.clone()
    result = OPS[name](images, strength, fill=FILL)
    assert torch.equal(images, before), "the input was written to"
    for image, one, each in zip(images, result, strength, strict=True):
        expected = PIL_OPS[name](Image.fromarray(image.permute(1, 2, 0).numpy()), float(each))
        assert np.array_equal(one.permute(1, 2, 0).numpy(), np.asarray(expected)), f"strength {each}"


def test_the_default_list_is_registered_and_tested() -> None:
    assert set(TABLE_5) == set(PIL_OPS) == set(OPS)
    assert find_ops([]) == [OPS[name] for name in TABLE_5]


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(ValueError, match=r"mpl_scale\.data\.strong\.ops = 'sheer_x' is unknown; did you mean shear_x"):
        find_ops(["invert", "sheer_x"])


def test_duplicate_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'invert' is registered twice"):
        register_op("invert")(OPS["invert"])
