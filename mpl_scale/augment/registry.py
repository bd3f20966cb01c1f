"""Augmentation operations by name, and the named lists of them that a config may draw from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mpl_scale.augment.large import OfOne, are_large
from mpl_scale.augment.parameters import Static
from mpl_scale.augment.policies import POLICIES
from mpl_scale.config.names import Registry, require_known
from mpl_scale.config.schema import StrongConfig

CHUNK_BYTES = 1 << 16
"""Images an operation sees at once on a CPU: its intermediates, of four bytes a pixel, then stay near the core."""
BAND_BYTES = 5 << 15
"""The part of one larger image that an operation sees at once: its intermediates still fit a second-level cache."""


@dataclass(frozen=True)
class Given:
    """What an operation may need beside the images and the amount.

    Attributes:
        fill: value of pixels that come from outside the image, 0 to 255.
        partners: uint8 [B, 3, H, W], the images to mix in; None where no operation of the list asks for them.
        centres: float64 [B, 2] in (0, 1), a place in each image as shares of its height and width.
    """

    fill: int = 0
    partners: torch.Tensor | None = None
    centres: np.ndarray | None = None

    def rows(self, which: slice | np.ndarray) -> Given:
        """What belongs to some rows of the batch."""
        if self.partners is None and self.centres is None:
            return self
        partners = self.partners
        if partners is not None:
            index = which if isinstance(which, slice) else on_device(which, partners.device)
            partners = partners[index]
        return Given(self.fill, partners, None if self.centres is None else self.centres[which])


Apply = Callable[[torch.Tensor, np.ndarray, Given], torch.Tensor]
"""`(images, amount, given) -> images`

images: uint8 [B, 3, H, W], contiguous, and so is the result; each image is treated by itself and none is written to.
amount: float64 [B] on the host, in the units of PIL's function (degrees, pixels, factor, bits, threshold).
"""
Amount = Callable[[np.ndarray, StrongConfig, tuple[int, int]], np.ndarray]
"""`(strength, limits, (height, width)) -> amount`, float64 [B]; see magnitudes.py."""


@dataclass(frozen=True)
class Operation:
    """One operation: what it does to images, and how far it goes at a strength.

    Attributes:
        name: in the registry.
        apply: the operation, in torch.
        amount: its argument at a strength of magnitude / 10, signed; None: it has no magnitude.
        pairs: whether it needs `Given.partners`.
        of_one: the same, to the byte, for one large image on a CPU; None: that is cheapest as a batch of one.
        static: the same, to the byte, as parameters of the passes in static.py; None: the images are grouped by
            operation on every device, where a list has this one.
    """

    name: str
    apply: Apply
    amount: Amount | None = None
    pairs: bool = False
    of_one: OfOne | None = None
    static: Static | None = None

    def __call__(self, images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
        """Apply; on a CPU to a few images at a time, or to large ones one by one."""
        images = images.contiguous()
        if are_large(images):
            result = torch.empty_like(images)
            for index, (image, out) in enumerate(zip(images.numpy(), result.numpy(), strict=True)):
                part = slice(index, index + 1)
                out[...] = self.on_one(image, amount[part], given.rows(part))
            return result
        count = max(1, CHUNK_BYTES // max(1, math.prod(images.shape[1:])))
        if images.device.type != "cpu" or len(images) <= count:
            return self.apply(images, amount, given)
        result = torch.empty_like(images)
        for first in range(0, len(images), count):
            part = slice(first, first + count)
            result[part] = self.apply(images[part], amount[part], given.rows(part))
        return result

    def on_one(self, image: np.ndarray, amount: np.ndarray, given: Given) -> np.ndarray:
        """Apply to one large image on a CPU, uint8 [3, H, W], contiguous, and so is the result; amount: float64 [1]."""
        if self.of_one is not None:
            return self.of_one(image, float(amount[0]), given.fill)
        return self.apply(torch.from_numpy(image[None]), amount, given)[0].numpy()


OPS: Registry[Operation] = Registry("augmentation")


def register_op(
    name: str,
    *,
    amount: Amount | None = None,
    pairs: bool = False,
    of_one: OfOne | None = None,
    static: Static | None = None,
) -> Callable[[Apply], Apply]:
    """Make an operation available in `mpl_scale.data.strong.ops`; see `Operation` for the arguments."""

    def add(apply: Apply) -> Apply:
        OPS[name] = Operation(name, apply, amount, pairs, of_one, static)
        return apply

    return add


_COLOURS = ("autocontrast", "brightness", "color", "contrast", "equalize", "invert", "sharpness", "posterize")
_GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OP_SETS: Registry[tuple[str, ...]] = Registry("set of augmentations")
"""`mpl_scale.data.strong.op_set`. The first three are Table 5; no_pairing: without Sample Pairing."""
OP_SETS["cifar10"] = (*_COLOURS, "sample_pairing", "solarize", *_GEOMETRY)
OP_SETS["imagenet"] = OP_SETS["cifar10"]
OP_SETS["svhn"] = (*_COLOURS, "solarize", "shear_x", "shear_y", "translate_y")
OP_SETS["no_pairing"] = (*_COLOURS, "solarize", *_GEOMETRY)
OP_SETS["released_code"] = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "color", "contrast", "brightness"),
    *("sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "cutout"),
)
DEFAULT_SET = "no_pairing"
OF_ANY_CHANNELS = (*_GEOMETRY, "cutout", "sample_pairing", "brightness", "invert", "posterize", "solarize")
"""Operations that treat each channel by itself and alike: for images that are neither grey nor RGB."""


def refuse_colours(config: StrongConfig, channels: int) -> None:
    """ValueError where the strong view of images of these channels has operations that are for 1 or 3 alone."""
    if channels in (1, 3) or not config.num_ops:
        return
    if refused := sorted({operation.name for operation in find_ops(config)}.difference(OF_ANY_CHANNELS)):
        raise ValueError(
            f"mpl_scale.data.strong draws {', '.join(refused)}, for images of 1 or 3 channels, and "
            f"mpl_scale.model.in_chans = {channels}; set strong.ops to some of {', '.join(OF_ANY_CHANNELS)}"
        )


def find_ops(config: StrongConfig) -> list[Operation]:
    """The operations that a config draws from: those of `policy`, `ops`, or those of `op_set`.

    Raises:
        ValueError: an unknown name, with the closest one.
    """
    if config.policy is not None:
        require_known("mpl_scale.data.strong.policy", config.policy, POLICIES)
        return [OPS[name] for name in POLICIES[config.policy].ops]
    for name in config.ops:
        require_known("mpl_scale.data.strong.ops", name, OPS)
    if config.ops:
        return [OPS[name] for name in config.ops]
    op_set = config.op_set or DEFAULT_SET
    require_known("mpl_scale.data.strong.op_set", op_set, OP_SETS)
    return [OPS[name] for name in OP_SETS[op_set]]


def bands(images: torch.Tensor) -> list[slice]:
    """The rows of images [B, 3, H, W] in bands, on a CPU small enough for their wide copies to stay in its cache."""
    height = images.shape[2]
    count = math.ceil(images.numel() / BAND_BYTES) if images.device.type == "cpu" else 1
    step = max(1, math.ceil(height / max(1, count)))
    return [slice(first, min(first + step, height)) for first in range(0, height, step)]


def per_image(values: np.ndarray, images: torch.Tensor, *, dtype: type[np.generic] = np.int32) -> torch.Tensor:
    """Whole numbers [B] of the host as a tensor [B, 1, 1, 1] on the images' device."""
    return on_device(values.astype(dtype).reshape(-1, 1, 1, 1), images.device)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array of the host on a device. To a GPU it goes from pinned memory: a pageable copy waits for the stream."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
