"""Training batches: this data rank's rows of the global batch of each step, endlessly (DESIGN 7).

One DALI run per step decodes labelled and unlabelled images together, each file once. The weak view is that decode
(shifted crop and flip); the strong view is computed from the weak pixels on the device.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np
import torch

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.dali import DecodePipeline, DecodeRequest
from mpl_scale.data.normalise import Normalise
from mpl_scale.data.plan import Draws, SamplePlan
from mpl_scale.data.slices import Columns, WidthExchange, share
from mpl_scale.data.splits import Splits
from mpl_scale.data.streams import Purpose, stream_of
from mpl_scale.mesh import Mesh
from mpl_scale.types import Batch

StrongViewFunction = Callable[[torch.Tensor, np.ndarray, np.ndarray], torch.Tensor]
"""(weak views uint8 [U, 3, H, W], sample ids int64 [U], epochs int64 [U]) -> uint8 [U, 3, H, W]"""


class TrainLoader:
    """An endless iterator of `Batch`, from `start_step` on.

    The global batch of a step depends on the configuration, the seed and the step alone: not on the number of ranks,
    nor on where the run started. The ranks of one width group receive the same rows: given `columns`, each decodes a
    share of them and receives its own columns of all; otherwise each decodes whole images of all.
    """

    def __init__(
        self,
        *,
        config: DataConfig,
        splits: Splits,
        image_size: int,
        labelled_batch: int,
        unlabelled_batch: int,
        mesh: Mesh,
        seed: int,
        stream: int,
        start_step: int,
        strong_view: StrongViewFunction | None,
        columns: Columns | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Args:
        config: the data section.
        splits: sample ids to draw from.
        image_size: height and width of the views, pixels.
        labelled_batch: labelled images of the global batch.
        unlabelled_batch: unlabelled images of the global batch; 0: none.
        mesh: this rank's place; the global batches must divide by its data ranks.
        seed: the run's seed.
        stream: phases with different streams draw different orders and views; in [0, 2**24).
        start_step: the first step to yield.
        strong_view: makes x_s from x_u; None: the weak view itself.
        columns: [start, stop) of the image on each width rank; None: whole images. Not read where the mesh has no
            width.
        dtype: floating type of the images.

        Raises:
            ValueError: batches that do not divide, or too few images.
        """
        check_batches(
            config, splits, labelled_batch=labelled_batch, unlabelled_batch=unlabelled_batch, data_ranks=mesh.data
        )
        labelled_rows = _rows_of_rank(labelled_batch, mesh)
        unlabelled_rows = _rows_of_rank(unlabelled_batch, mesh)
        self._share, own_rows = slice(0, len(labelled_rows)), unlabelled_rows  # what this rank decodes
        self._exchange: WidthExchange | None = None
        if columns is not None and mesh.width > 1:
            ranks = range(mesh.width)
            labelled_shares = [share(len(labelled_rows), ranks=mesh.width, index=index) for index in ranks]
            unlabelled_shares = [
                share(len(unlabelled_rows), ranks=mesh.width, index=index, extra_last=True) for index in ranks
            ]
            self._share = labelled_shares[mesh.width_index]
            own_rows = unlabelled_rows[unlabelled_shares[mesh.width_index]]
            shares = [labelled_shares] + [unlabelled_shares] * (1 if strong_view is None else 2)
            self._exchange = WidthExchange(columns, image_size=image_size, shares=shares, mesh=mesh)
        self._labelled = SamplePlan(
            splits.labelled,
            batch=labelled_batch,
            rows=labelled_rows,
            weak=config.weak,
            seed=seed,
            order_stream=stream_of(Purpose.LABELLED_ORDER, stream),
            view_stream=stream_of(Purpose.LABELLED_VIEW, stream),
        )
        self._unlabelled = SamplePlan(
            splits.unlabelled,
            batch=unlabelled_batch,
            rows=own_rows,
            weak=config.weak,
            seed=seed,
            order_stream=stream_of(Purpose.UNLABELLED_ORDER, stream),
            view_stream=stream_of(Purpose.UNLABELLED_VIEW, stream),
        )
        self._images = splits.images
        self._device = mesh.device
        self._strong_view = strong_view
        self._normalise = Normalise(config, device=mesh.device, dtype=dtype)
        self._labelled_rows = torch.from_numpy(labelled_rows).to(mesh.device)
        self._unlabelled_rows = torch.from_numpy(unlabelled_rows).to(mesh.device)
        self._in_flight: deque[tuple[Draws, Draws]] = deque()  # labelled: of all rows; unlabelled: of this rank's share
        self._decoder = DecodePipeline(
            self._requests(start_step),
            images=splits.images,
            batch=self._share.stop - self._share.start + len(own_rows),
            image_size=image_size,
            resize=bool((splits.images.sizes != image_size).any()),
            fill=config.weak.fill,
            device=mesh.device,
            threads=config.threads,
            prefetch=config.prefetch,
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next step's batch.

        Raises:
            ValueError: files that cannot be decoded, with their names.
        """
        views = self._views() if self._exchange is None else self._exchange(self._views)
        labelled, _ = self._in_flight.popleft()
        labels = torch.from_numpy(self._images.labels[labelled.ids])
        return Batch(
            labelled=self._normalise(views[0]),
            labels=labels.to(self._device),
            labelled_rows=self._labelled_rows,
            weak=self._normalise(views[1]),
            strong=self._normalise(views[-1]),
            unlabelled_rows=self._unlabelled_rows,
        )

    def close(self) -> None:
        """Stop reading ahead."""
        self._decoder.close()

    def _views(self) -> list[torch.Tensor]:
        """This rank's labelled, weak and, where they differ, strong views of the next step: uint8 [*, 3, H, W]."""
        decoded = self._decoder.next()
        _, unlabelled = self._in_flight[0]
        labelled_views, weak = decoded.split([len(decoded) - len(unlabelled.ids), len(unlabelled.ids)])
        if self._strong_view is None:
            return [labelled_views, weak]
        strong = self._strong_view(weak, unlabelled.ids, unlabelled.epochs) if len(unlabelled.ids) else weak
        return [labelled_views, weak, strong]

    def _requests(self, start_step: int) -> Iterator[DecodeRequest]:
        for step in itertools.count(start_step):
            labelled, unlabelled = self._labelled.draw(step), self._unlabelled.draw(step)
            self._in_flight.append((labelled, unlabelled))
            own = self._share
            yield DecodeRequest(
                samples=np.concatenate([labelled.ids[own], unlabelled.ids]),
                windows=np.concatenate([labelled.windows[own], unlabelled.windows]),
                flips=np.concatenate([labelled.flips[own], unlabelled.flips]),
            )


def _rows_of_rank(batch: int, mesh: Mesh) -> np.ndarray:
    """The contiguous global rows of a data rank, int64 [batch / data]."""
    count = batch // mesh.data
    return np.arange(mesh.data_index * count, (mesh.data_index + 1) * count, dtype=np.int64)


def check_batches(
    config: DataConfig, splits: Splits, *, labelled_batch: int, unlabelled_batch: int, data_ranks: int
) -> None:
    """ValueError unless the global batches divide over the data ranks and there are images for each of these."""
    for kind, batch in (("labelled", labelled_batch), ("unlabelled", unlabelled_batch)):
        if batch % data_ranks:
            raise ValueError(
                f"global {kind} batch {batch} = {data_ranks} data ranks x {batch / data_ranks:g} images per rank, "
                f"not a whole number; set train_batch_size so that the batch is a multiple of {data_ranks}"
            )
    if len(splits.labelled) < data_ranks:
        raise ValueError(
            f"mpl_scale.data.labelled_per_class = {config.labelled_per_class} x {len(splits.images.classes)} classes = "
            f"{len(splits.labelled)} labelled images for {data_ranks} data ranks; raise it, or raise "
            "mpl_scale.parallel.width so that fewer ranks need their own images"
        )
    if unlabelled_batch and not len(splits.unlabelled):
        raise ValueError(
            f"mpl_scale.data.unlabelled_from = {config.unlabelled_from!r} leaves no unlabelled images; "
            "use 'training' or lower labelled_per_class"
        )
