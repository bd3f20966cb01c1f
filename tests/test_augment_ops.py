"""Every operation gives PIL's bytes, at every strength it can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from mpl_scale.augment import OP_SETS, OPS, Given, find_ops, register_op
from mpl_scale.augment.affine import transform
from mpl_scale.augment.large import are_large
from mpl_scale.config.schema import StrongConfig

FILL = 77
LIMITS = {"distance": StrongConfig(), "level": StrongConfig(magnitude_rule="level", magnitude=16.0)}
Reference = Callable[[Image.Image, float], Image.Image]


def enhance(kind: type) -> Reference:
    """The enhancer, whose factor the operations round to 1/4096."""
    return lambda image, factor: kind(image).enhance(round(factor * 4096) / 4096)


def affine(*data: float | None) -> Reference:
    """Image.transform; None stands for the amount."""

    def reference(image: Image.Image, amount: float) -> Image.Image:
        matrix = [amount if value is None else value for value in data]
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill(image)
        )

    return reference


def fill(image: Image.Image) -> int | tuple[int, ...]:
    """In the image's mode, L or RGB."""
    return FILL if image.mode == "L" else (FILL,) * 3


PIL_OPS: dict[str, Reference] = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "brightness": enhance(ImageEnhance.Brightness),
    "color": enhance(ImageEnhance.Color),
    "contrast": enhance(ImageEnhance.Contrast),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "rotate": lambda image, degrees: image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=fill(image)),
    "shear_x": affine(1, None, 0, 0, 1, 0),
    "shear_y": affine(1, 0, 0, None, 1, 0),
    "translate_x": affine(1, 0, None, 0, 1, 0),
    "translate_y": affine(1, 0, 0, 0, 1, None),
}
STRENGTHS = np.outer([-1.0, 1.0], [0.1, 0.37, 0.5, 0.9, 1.0]).flatten()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Some hundred small operations: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def some_images(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Noise, smooth ramps of narrow range, one colour, and few levels in turn: uint8 [count, 3, *size]."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 3, *size))
    ramp = np.linspace(0, 1, size[1]) * generator.integers(1, 256, (count, 3, 1, 1)) + np.zeros(size)
    images[1::4] = ramp[1::4]
    images[2::8] = generator.integers(0, 256, (count, 3, 1, 1))[2::8]
    images[3::4] = generator.integers(0, 3, (count, 3, *size))[3::4] * 100
    return torch.from_numpy(images.astype(np.uint8))


def check(name: str, images: torch.Tensor, strengths: np.ndarray, *, limits: StrongConfig) -> None:
    operation, before = OPS[name], images.clone()
    size = (images.shape[2], images.shape[3])
    amount = strengths if operation.amount is None else operation.amount(strengths, limits, size)
    result = operation(images, amount, Given(fill=FILL))
    assert torch.equal(images, before), "the input was written to"
    assert result.is_contiguous()
    if are_large(images):  # what a GPU does
        for part in range(0, len(images), 2):
            rows = slice(part, part + 2)
            assert torch.equal(operation.apply(images[rows], amount[rows], Given(fill=FILL)), result[rows])
    for image, one, each in zip(images, result, amount, strict=True):
        expected = PIL_OPS[name](Image.fromarray(image.permute(1, 2, 0).numpy()), float(each))
        assert np.array_equal(one.permute(1, 2, 0).numpy(), np.asarray(expected)), f"{name}({each}) at {size}"


@pytest.mark.parametrize("size", [32, 224, 512])
@pytest.mark.parametrize("name", PIL_OPS)
def test_equals_pil_at_every_size(name: str, size: int) -> None:
    check(name, some_images(10, (size, size)), STRENGTHS, limits=LIMITS["distance"])


@pytest.mark.parametrize("size", [(33, 20), (224, 224)])
@pytest.mark.parametrize("name", PIL_OPS)
def test_equals_pil_on_grey_images(name: str, size: tuple[int, int]) -> None:
    """Three equal channels stay equal, and each is what PIL makes of mode L."""
    grey = some_images(10, size)[:, 0]
    operation = OPS[name]
    amount = STRENGTHS if operation.amount is None else operation.amount(STRENGTHS, LIMITS["distance"], size)
    result = operation(grey.unsqueeze(1).repeat(1, 3, 1, 1), amount, Given(fill=FILL))
    for image, one, each in zip(grey, result, amount, strict=True):
        expected = np.asarray(PIL_OPS[name](Image.fromarray(image.numpy()), float(each)))
        assert expected.ndim == 2
        assert all(np.array_equal(channel.numpy(), expected) for channel in one)


def test_only_large_images_on_a_cpu_are_done_one_by_one() -> None:
    assert are_large(torch.empty(1, 3, 224, 224))
    for images in (torch.empty(1000, 3, 32, 32), torch.empty(1, 3, 224, 224, device="meta")):
        assert not are_large(images)


@pytest.mark.parametrize("rule", LIMITS)
@pytest.mark.parametrize(
    "size", [(1, 1), (2, 5), (8, 8), (33, 20), (17, 300), (150, 97), (2, 6000), (11000, 1)], ids=str
)
@pytest.mark.parametrize("name", PIL_OPS)
def test_equals_pil_on_odd_shapes_and_random_strengths(name: str, size: tuple[int, int], rule: str) -> None:
    strengths = np.random.default_rng(1).uniform(-1, 1, 24) * LIMITS[rule].magnitude / 10
    strengths[:2] = (0.0, -0.0)
    check(name, some_images(24, size), strengths, limits=LIMITS[rule])


@pytest.mark.parametrize("size", [(20, 33), (224, 224)])
@pytest.mark.parametrize("name", OPS)
def test_a_batch_of_one_or_of_other_strides_is_the_same(name: str, size: tuple[int, int]) -> None:
    images, operation = some_images(7, size), OPS[name]
    given = Given(FILL, images.roll(1, 0), np.random.default_rng(2).uniform(size=(7, 2)))
    strength = STRENGTHS[:7]
    amount = strength if operation.amount is None else operation.amount(strength, LIMITS["distance"], size)
    whole = operation(images, amount, given)
    single = [operation(images[i : i + 1], amount[i : i + 1], given.rows(slice(i, i + 1))) for i in range(7)]
    assert torch.equal(whole, torch.cat(single))
    assert torch.equal(whole, operation(images.to(memory_format=torch.channels_last), amount, given))


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (512, 512), (33, 20)])
def test_sample_pairing_is_pils_blend(size: tuple[int, int]) -> None:
    images, partners = some_images(10, size), some_images(11, size)[1:]
    amount = OPS["sample_pairing"].amount(STRENGTHS, StrongConfig(), size)  # type: ignore[misc]
    assert amount.max() == 0.4
    result = OPS["sample_pairing"](images, amount, Given(partners=partners))
    for image, partner, one, share in zip(images, partners, result, amount, strict=True):
        pair = (Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in (image, partner))
        expected = Image.blend(*pair, round(share * 4096) / 4096)
        assert np.array_equal(one.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_large_images_are_looked_up_in_64_bits() -> None:
    """Coordinates of sides above 4,096 pixels do not fit 16-bit fixed point in 32 bits."""
    images = some_images(1, (3, 5000))
    matrix = np.array([[0.9, 1.9, 300.0, 0.0001, 1.0, -0.5]])
    expected = Image.fromarray(images[0].permute(1, 2, 0).numpy()).transform(
        (5000, 3), Image.Transform.AFFINE, matrix[0], Image.Resampling.NEAREST, fillcolor=(FILL,) * 3
    )
    result = transform(images, matrix, fill=FILL)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(result, np.asarray(expected))


def test_amounts_of_the_released_code() -> None:
    """Level 16 of 10 (FIDELITY: rotate 48, shear 0.48, translate 6.4 pixels, enhance 2.98, posterize 6 bits)."""
    config, strength = StrongConfig(preset="released_code"), np.array([1.6])
    expected = {"rotate": 48, "shear_x": 0.48, "color": 2.98, "posterize": 6, "solarize": 409 % 256, "cutout": 12}
    for name, amount in {**expected, "translate_y": round(6.4)}.items():
        assert OPS[name].amount(strength, config, (32, 32)) == pytest.approx(amount), name  # type: ignore[misc]


def test_named_lists_are_table_5() -> None:
    assert set(PIL_OPS) | {"sample_pairing", "cutout"} == set(OPS)
    assert OP_SETS["cifar10"] == OP_SETS["imagenet"]
    assert set(OP_SETS["imagenet"]) == set(PIL_OPS) | {"sample_pairing"}
    assert len(OP_SETS["imagenet"]) == len(OP_SETS["released_code"]) == 15
    assert set(OP_SETS["imagenet"]) - set(OP_SETS["svhn"]) == {"sample_pairing", "rotate", "translate_x"}
    assert set(OP_SETS["released_code"]) == set(PIL_OPS) | {"cutout"}
    assert find_ops(StrongConfig(op_set="svhn")) == [OPS[name] for name in OP_SETS["svhn"]]
    assert find_ops(StrongConfig()) == [OPS[name] for name in OP_SETS["no_pairing"]]


def test_unknown_names_suggest_the_closest() -> None:
    with pytest.raises(ValueError, match=r"mpl_scale\.data\.strong\.ops = 'sheer_x' is unknown; did you mean shear_x"):
        find_ops(StrongConfig(ops=["invert", "sheer_x"]))
    with pytest.raises(ValueError, match=r"mpl_scale\.data\.strong\.op_set = 'cifar' is unknown; did you mean cifar10"):
        find_ops(StrongConfig(op_set="cifar"))


def test_duplicate_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'invert' is registered twice"):
        register_op("invert")(OPS["invert"].apply)
