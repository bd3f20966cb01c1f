"""What a step's batch is: how many images, drawn and seen how, and in which form the networks are given them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.normalise import Normalise
from mpl_scale.data.resident import ResidentImages
from mpl_scale.data.samples.plan import SamplePlan
from mpl_scale.data.samples.splits import Splits
from mpl_scale.data.samples.streams import Purpose, stream_of
from mpl_scale.data.slices import Columns

StrongViewFunction = Callable[..., torch.Tensor]
"""(weak views uint8 [U, 3, H, W], sample ids int64 [U], epochs int64 [U]) -> uint8 [U, 3, H, W]; or a PairingView."""
Kind = Literal["labelled", "unlabelled"]
_ORDER = {"labelled": Purpose.LABELLED_ORDER, "unlabelled": Purpose.UNLABELLED_ORDER}
_VIEW = {"labelled": Purpose.LABELLED_VIEW, "unlabelled": Purpose.UNLABELLED_VIEW}


@runtime_checkable
class PairingView(Protocol):
    """A strong view that mixes the weak views of other images in."""

    def partners(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """int64 [U]: the sample id of each row's other image, one of the unlabelled ones, or -1: it needs none."""

    def __call__(
        self, images: torch.Tensor, ids: np.ndarray, epochs: np.ndarray, partners: torch.Tensor | None = None
    ) -> torch.Tensor:
        """partners: uint8 [U, 3, H, W], defined in the rows that need one; None: no row does."""


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """In which form the networks are given images.

    image_size: height and width, pixels. columns: [start, stop) of the image on each width rank, not read where the
    mesh has no width; None: whole images. dtype: floating type. channels_last: memory layout.
    """

    image_size: int
    columns: Columns | None = None
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def normaliser(
        self, config: DataConfig, device: torch.device, resident: ResidentImages | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Makes network inputs of decoded images; resident vectors are inputs already, but for their dtype."""
        if resident is not None and resident.pixels.is_floating_point():
            return partial(torch.Tensor.to, dtype=self.dtype)
        return Normalise(config, device=device, dtype=self.dtype, channels_last=self.channels_last)


@dataclass(frozen=True, kw_only=True)
class BatchSpec(ImageFormat):
    """The global batches of a phase, and in which form the networks are given them.

    labelled, unlabelled: images of a batch; 0 unlabelled: none. seed: the run's. stream: phases with different streams
    draw different orders and views; in [0, 2**24). strong_view: makes x_s from x_u; None: the weak view itself. ids:
    whether batches say which unlabelled images they have.
    """

    labelled: int
    unlabelled: int
    seed: int
    stream: int
    strong_view: StrongViewFunction | None = None
    ids: bool = False

    def plan(self, kind: Kind, splits: Splits, *, rows: np.ndarray, columns: int) -> SamplePlan:
        """Which images of one kind are drawn for some rows, int64 [r]; columns: random numbers that a view needs."""
        return self._plan(kind, getattr(splits, kind), rows=rows, columns=columns)

    def places(self, splits: Splits, *, rows: np.ndarray) -> SamplePlan:
        """The places of the unlabelled images that are drawn for some rows in their list, in place of their ids."""
        return self._plan("unlabelled", np.arange(len(splits.unlabelled)), rows=rows, columns=0)

    def _plan(self, kind: Kind, ids: np.ndarray, *, rows: np.ndarray, columns: int) -> SamplePlan:
        return SamplePlan(
            ids,
            batch=getattr(self, kind),
            rows=rows,
            columns=columns,
            seed=self.seed,
            order_stream=stream_of(_ORDER[kind], self.stream),
            view_stream=stream_of(_VIEW[kind], self.stream),
        )
