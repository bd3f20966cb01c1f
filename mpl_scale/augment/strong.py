"""The strong view x_s of a weak view x_u: RandAugment (Cubuk et al. 2020) or a policy (policies.py), then cutout.

Cutout is DeVries and Taylor's (2017).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mpl_scale.augment.affine import translate
from mpl_scale.augment.cutout import cutout, square_of
from mpl_scale.augment.large import are_large
from mpl_scale.augment.parameters import MATRIX, SQUARE, affine_map, unchanged
from mpl_scale.augment.policies import POLICIES
from mpl_scale.augment.registry import Given, Operation, find_ops, on_device
from mpl_scale.augment.static import LONGEST_SIDE, StaticView
from mpl_scale.config.schema import StrongConfig
from mpl_scale.philox import uniform_numpy

MAX_MAGNITUDE = 10
STREAM_LIMIT = 1 << 24
_STREAM_BASE = 0xFF << 24  # apart from the streams of mpl_scale.data and of the networks
_DRAWS_PER_OP = 4  # operation, magnitude, sign, applied
_CUTOUT = 2  # centre
_PROBABILITY = 1
_PARTNER = 2  # a number of 24 bits is too short for 130 million candidates
_CROP = 3  # rows, columns, flip
_PLACE_PER_OP = 2


@dataclass(frozen=True)
class Drawn:
    """What is done to each image.

    Attributes:
        which: int64 [U, N], position of the operation in the list; its length: none.
        strength: float64 [U, N], signed, 1 at magnitude 10.
        places: float64 [U, N, 2], where an operation that needs a place has it.
        cutout: float64 [U, 2], the centre of the final cutout.
        crop: float64 [U, 3], the final shift of rows and columns, and flip.
    """

    which: np.ndarray
    strength: np.ndarray
    places: np.ndarray
    cutout: np.ndarray
    crop: np.ndarray

    def rows(self, part: slice) -> Drawn:
        """What was drawn for some rows of the batch."""
        return Drawn(self.which[part], self.strength[part], self.places[part], self.cutout[part], self.crop[part])


class StrongView:
    """Callable on a batch; an image's result depends on its pixels, id, epoch and the seed alone.

    So it does not depend on the other images of the batch, nor on how the batch is divided over ranks. Sample Pairing
    depends on one more image, its partner's, drawn by id from all candidates: `partners` names it, the caller brings
    its pixels.
    """

    def __init__(self, config: StrongConfig, *, seed: int, stream: int, candidates: np.ndarray | None = None) -> None:
        """Args:
        config: operations, their number, magnitudes and the cutout.
        seed: the run's seed.
        stream: phases with different streams draw differently; in [0, 2**24).
        candidates: int64, sample ids of the unlabelled images, for partners; may be memory-mapped.

        Raises:
            ValueError: an unknown operation, or a stream outside its range.
        """
        if not 0 <= stream < STREAM_LIMIT:
            raise ValueError(f"stream = {stream} is outside [0, {STREAM_LIMIT}); number the phases from 0")
        self._config = config
        self._ops = find_ops(config)
        self._policy = None if config.policy is None else POLICIES[config.policy]
        self._pairing = np.array([operation.pairs for operation in self._ops] + [False])  # the last: left alone
        self._seed = seed
        self._stream = _STREAM_BASE | stream
        self._candidates = candidates
        self._last: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self.static = self._static()

    @property
    def pairs(self) -> bool:
        """Whether an operation of the list needs partners."""
        return bool(self._pairing.any())

    def partners(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The sample to mix into each image.

        Args:
            ids: int64 [U], sample ids.
            epochs: int64 [U], the epoch each sample is drawn in.

        Returns:
            int64 [U], a sample id, or -1 where no drawn operation needs one.

        Raises:
            ValueError: partners are needed and there are no candidates.
        """
        result = np.full(len(ids), -1, dtype=np.int64)
        if not self.pairs or not len(ids):
            return result
        if self._candidates is None or not len(self._candidates):
            raise ValueError(
                "mpl_scale.data.strong draws sample_pairing, which mixes in other unlabelled images, and there are "
                'none; set op_set to "no_pairing"'
            )
        uniform = self._uniform(ids, epochs)
        needed = self._pairing[self._draw(uniform).which].any(axis=1)
        first = _DRAWS_PER_OP * self._config.num_ops + _CUTOUT + _PROBABILITY
        high, low = uniform[needed, first], uniform[needed, first + 1]
        share = (np.floor(high * (1 << 24)) + low) / (1 << 24)  # 48 bits
        position = np.minimum((share * len(self._candidates)).astype(np.int64), len(self._candidates) - 1)
        result[needed] = self._candidates[position]
        return result

    def __call__(
        self, images: torch.Tensor, ids: np.ndarray, epochs: np.ndarray, partners: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The strong views.

        Args:
            images: uint8 [U, 3, H, W], the weak views.
            ids: int64 [U], sample ids.
            epochs: int64 [U], the epoch each sample is drawn in.
            partners: uint8 [U, 3, H, W], weak views of the samples that `partners` names; rows without one are not
                read. None: there are none.

        Returns:
            uint8 [U, 3, H, W].

        Raises:
            ValueError: partners are needed and not given.
        """
        if not len(images):
            return images
        size = (images.shape[2], images.shape[3])
        drawn = self._draw(self._uniform(ids, epochs))
        if partners is None and self._pairing[drawn.which].any():
            raise ValueError("mpl_scale.data.strong draws sample_pairing: give the partners' images, see StrongView")
        if self._is_static(images):
            assert self.static is not None
            parameters = self._packed(drawn, size, images.device)
            return self.static(images, parameters, partners)
        amounts = self._amounts(drawn, size)
        if not are_large(images):
            return self._view(images, drawn, amounts, partners)
        result = torch.empty_like(images, memory_format=torch.contiguous_format)
        # one large image stays in a core's cache from operation to operation
        for index, (image, out) in enumerate(zip(images.numpy(), result.numpy(), strict=True)):
            part = slice(index, index + 1)
            mixed_in = None if partners is None else partners[part]
            out[...] = self._view_of_one(np.ascontiguousarray(image), drawn.rows(part), amounts[part], mixed_in)
        return result

    def parameters(
        self, ids: np.ndarray, epochs: np.ndarray, *, size: tuple[int, int], device: torch.device
    ) -> torch.Tensor:
        """What `static` makes the strong views with, in one transfer to the device.

        Args:
            ids: int64 [U], sample ids.
            epochs: int64 [U], the epoch each sample is drawn in.
            size: the images' height and width.
            device: the images' device.

        Returns:
            int32 [U, columns]; the number of columns depends on the config alone.

        Raises:
            ValueError: an operation of the list has no static form.
        """
        return self._packed(self._draw(self._uniform(ids, epochs)), size, device)

    def _is_static(self, images: torch.Tensor) -> bool:
        """Whether a batch goes through `static`; else its images are grouped by operation.

        Grouped, each image takes part in its own operations only: on a CPU, where arithmetic costs most, that is
        several times faster. On a device the host's queueing costs most, and grouping needs six times as many operators
        (benchmarks/strong_host.py).
        """
        return self.static is not None and images.device.type != "cpu" and max(images.shape[2:]) <= LONGEST_SIDE

    def _static(self) -> StaticView | None:
        """The view of fixed shapes; None where an operation of the list has no static form."""
        config, none = self._config, np.empty(0)
        forms = [operation.static for operation in self._ops]
        if None in forms:
            return None
        drawn = frozenset(name for form in forms if form is not None for name in form(none, none.reshape(0, 2), (1, 1)))
        steps = [drawn] * config.num_ops
        if config.cutout:
            steps.append(SQUARE)
        if config.crop_pad or config.flip:
            steps.append(MATRIX)
        return StaticView(tuple(steps), config.fill)

    def _packed(self, drawn: Drawn, size: tuple[int, int], device: torch.device) -> torch.Tensor:
        """The parameters of `static`, int32 [U, columns]."""
        if self.static is None:
            missing = [operation.name for operation in self._ops if operation.static is None]
            raise ValueError(f"mpl_scale.data.strong draws {missing}, registered without `static=`: see register_op")
        config, count, steps = self._config, len(drawn.which), len(self.static.steps)
        packed, rows = unchanged(count, steps, pinned=device.type == "cuda")
        every, centres = rows.reshape(-1), drawn.places.reshape(-1, _PLACE_PER_OP)
        for operation, chosen, amount in self._chosen(drawn, size):
            assert operation.static is not None
            row = chosen + chosen // config.num_ops * (steps - config.num_ops)
            for name, values in operation.static(amount, centres[chosen], size).items():
                every[name][row] = values
        if config.cutout:
            sides = np.full(count, min(config.cutout, 2 * max(size)))
            for name, edge in square_of(sides, drawn.cutout, size).items():
                rows[name][:, config.num_ops] = edge
        if config.crop_pad or config.flip:
            right, down = self._shift(drawn.crop, size)
            flipped = config.flip & (drawn.crop[:, 2] < 0.5)
            a, c = np.where(flipped, -1.0, 1.0), np.where(flipped, size[1] + right, right)
            for name, values in affine_map(a=a, c=c, f=down).items():
                rows[name][:, -1] = values
        return packed.to(device, non_blocking=True)

    def _view(
        self, images: torch.Tensor, drawn: Drawn, amounts: np.ndarray, partners: torch.Tensor | None
    ) -> torch.Tensor:
        """The drawn operations in order, then cutout, crop and flip; images uint8 [B, 3, H, W]."""
        for number in range(self._config.num_ops):
            given = Given(self._config.fill, partners, drawn.places[:, number])
            images = self._apply_one(images, drawn.which[:, number], amounts[:, number], given)
        return self._cut_and_crop(images, drawn)

    def _view_of_one(
        self, image: np.ndarray, drawn: Drawn, amounts: np.ndarray, partners: torch.Tensor | None
    ) -> np.ndarray:
        """`_view` of one image, uint8 [3, H, W]."""
        config = self._config
        for number, position in enumerate(drawn.which[0].tolist()):
            if position < len(self._ops):
                given = Given(config.fill, partners, drawn.places[:, number])
                image = self._ops[position].on_one(image, amounts[:, number], given)
        if config.cutout or config.crop_pad or config.flip:
            image = self._cut_and_crop(torch.from_numpy(image[None]), drawn)[0].numpy()
        return image

    def _cut_and_crop(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """What follows the drawn operations."""
        config = self._config
        if config.cutout:
            images = cutout(images, np.full(len(images), config.cutout), centres=drawn.cutout, fill=config.fill)
        return self._crop_and_flip(images, drawn.crop)

    def _uniform(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """float64 [U, columns]; a column's numbers do not depend on how many columns follow it."""
        columns = (_DRAWS_PER_OP + _PLACE_PER_OP) * self._config.num_ops + _CUTOUT + _PROBABILITY + _PARTNER + _CROP
        if self._last is not None and np.array_equal(ids, self._last[0]) and np.array_equal(epochs, self._last[1]):
            return self._last[2]  # `partners` has just drawn them
        uniform = uniform_numpy(seed=self._seed, stream=self._stream, epoch=epochs, ids=ids, columns=columns)
        self._last = ids.copy(), epochs.copy(), uniform
        return uniform

    def _draw(self, uniform: np.ndarray) -> Drawn:
        """Derive every random decision from the uniform numbers [U, columns]."""
        config, rows = self._config, len(uniform)
        count = _DRAWS_PER_OP * config.num_ops
        widths = (count, _CUTOUT, _PROBABILITY, _PARTNER, _CROP)
        per_op, centre, share, _, crop, places = np.split(uniform, np.cumsum(widths), axis=1)
        per_op = per_op.reshape(rows, config.num_ops, _DRAWS_PER_OP)
        sign = np.where(per_op[..., 2] < 0.5, -1.0, 1.0)
        probability: np.ndarray | float = config.probability
        if self._policy is not None:
            row = self._policy.drawn(per_op[:, 0, 0])
            which, probability = self._policy.which[row], self._policy.probability[row]
            strength = self._policy.strength[row] * sign
        else:
            which = (per_op[..., 0] * len(self._ops)).astype(np.int64)
            magnitude = config.magnitude * (per_op[..., 1] if config.random_magnitude else 1.0)
            strength = magnitude / MAX_MAGNITUDE * sign
        if config.probability_range is not None:
            low, high = config.probability_range
            probability = low + (high - low) * share
        which[per_op[..., 3] >= probability] = len(self._ops)  # left alone
        places = places.reshape(rows, config.num_ops, _PLACE_PER_OP)
        return Drawn(which=which, strength=strength, places=places, cutout=centre, crop=crop)

    def _apply_one(self, images: torch.Tensor, which: np.ndarray, amount: np.ndarray, given: Given) -> torch.Tensor:
        """One operation per image, `which` [U] deciding; images are grouped by operation."""
        order = np.argsort(which, kind="stable")
        groups = np.split(order, np.cumsum(np.bincount(which, minlength=len(self._ops)))[: len(self._ops)])
        indices = on_device(order, images.device)
        parts = list(images.index_select(0, indices).split([len(group) for group in groups]))
        for position in range(len(self._ops)):
            group = groups[position]
            if len(group):
                parts[position] = self._ops[position](parts[position], amount[group], given.rows(group))
        return torch.empty_like(images).index_copy_(0, indices, torch.cat(parts))

    def _amounts(self, drawn: Drawn, size: tuple[int, int]) -> np.ndarray:
        """What the drawn operations take for their strengths: float64 [U, N]; size: height and width."""
        amounts = drawn.strength.copy()
        for _, chosen, amount in self._chosen(drawn, size):
            amounts.reshape(-1)[chosen] = amount
        return amounts

    def _chosen(self, drawn: Drawn, size: tuple[int, int]) -> Iterator[tuple[Operation, np.ndarray, np.ndarray]]:
        """Each operation, the places in [U, N] flattened where it is drawn, and its amounts there."""
        which = drawn.which.reshape(-1).astype(np.int16)  # of which numpy sorts by radix
        order = np.argsort(which, kind="stable")
        ends = np.cumsum(np.bincount(which, minlength=len(self._ops)))[: len(self._ops)]
        strengths = drawn.strength.reshape(-1)[order]
        first = 0
        for operation, end in zip(self._ops, ends.tolist(), strict=True):
            amount = strengths[first:end]
            if operation.amount is not None:
                amount = operation.amount(amount, self._config, size)
            yield operation, order[first:end], amount
            first = end

    def _crop_and_flip(self, images: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
        """A second shifted crop and flip: the released code's strong view ends with them."""
        config = self._config
        if config.crop_pad:
            images = translate(images, *self._shift(uniform, (images.shape[2], images.shape[3])), fill=config.fill)
        if config.flip:
            rows = on_device(np.flatnonzero(uniform[:, 2] < 0.5), images.device)
            images = images.index_copy(0, rows, images.index_select(0, rows).flip(3))
        return images

    def _shift(self, uniform: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The last crop's pixels to the right and down, float64 [U]; longer shifts show as little."""
        pad = self._config.crop_pad
        down, right = (np.floor(uniform[:, :2] * (2 * pad + 1)) - pad).T
        return right.clip(-size[1], size[1]), down.clip(-size[0], size[0])
