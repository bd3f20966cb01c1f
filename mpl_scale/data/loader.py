"""Training batches: this data rank's rows of the global batch of each step, endlessly (DESIGN 7).

One DALI run per step decodes labelled and unlabelled images together, each file once, and with them the few others that
the strong view mixes in (sample pairing); or all of them are resident, and their views are made on the device
(resident.py), the same bytes. The weak view is what is decoded (views.py); the strong view is computed from the weak
pixels on the device. The next good image takes the place of one that cannot be decoded (decode.py).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
import torch

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.batch_spec import BatchSpec, PairingView
from mpl_scale.data.decode.pipeline import DecodePipeline, DecodeRequest, Decoding, Rows, ViewSource
from mpl_scale.data.decode.quarantine import Quarantine
from mpl_scale.data.decode.views import weak_view
from mpl_scale.data.distributions import Distributions, SyntheticDistributions
from mpl_scale.data.formats.synthetic import SyntheticImages
from mpl_scale.data.resident import ResidentImages, ResidentViews
from mpl_scale.data.samples.plan import Draws, rows_of_rank
from mpl_scale.data.samples.splits import Splits
from mpl_scale.data.slices import Views, WidthExchange, share
from mpl_scale.data.transfer import to_device
from mpl_scale.mesh import Mesh
from mpl_scale.types import Batch


class TrainLoader:
    """An endless iterator of `Batch`, from `start_step` on.

    The global batch of a step depends on the configuration, the seed and the step alone: not on the number of ranks,
    nor on where the run started. The ranks of one width group receive the same rows: given `columns`, each decodes a
    share of them and receives its own columns of all; otherwise each decodes whole images of all.
    """

    def __init__(
        self,
        config: DataConfig,
        splits: Splits,
        *,
        batch: BatchSpec,
        mesh: Mesh,
        start_step: int = 0,
        quarantine: Quarantine | None = None,
        resident: ResidentImages | None = None,
    ) -> None:
        """Args:
        config: the data section.
        splits: sample ids to draw from.
        batch: what is drawn at each step, and in which form it is given.
        mesh: this rank's place; the global batches must divide by its data ranks.
        start_step: the first step to yield.
        quarantine: where bad images are kept; None: in a list of its own.
        resident: the images of `labelled` and `unlabelled`, decoded for the weak view; its quarantine is used. None:
            files are decoded at each step.

        Raises:
            ValueError: batches that do not divide, too few images, or an unknown view.
        """
        check_batches(
            config, splits, labelled_batch=batch.labelled, unlabelled_batch=batch.unlabelled, data_ranks=mesh.data
        )
        self._splits, self._device, self._strong_view = splits, mesh.device, batch.strong_view
        self._pairing = batch.strong_view if isinstance(batch.strong_view, PairingView) else None  # asking takes 100 us
        self._strong_labelled = config.labelled_view == "strong"
        self._distributions = _distributions(config, splits, mesh)
        self._normalise = batch.normaliser(config, mesh.device, resident)
        self._resident = resident is not None
        self._in_flight: deque[_Step] = deque()
        view = weak_view(config.weak, batch.image_size) if resident is None else resident.view
        labelled, unlabelled = (rows_of_rank(count, mesh) for count in (batch.labelled, batch.unlabelled))
        self._labelled_rows, self._unlabelled_rows = (
            torch.from_numpy(rows).to(mesh.device) for rows in (labelled, unlabelled)
        )
        self._share, own, self._exchange = _divide(batch, mesh)
        self._labelled = batch.plan("labelled", splits, rows=labelled, columns=view.columns)
        self._unlabelled = batch.plan("unlabelled", splits, rows=unlabelled[own], columns=view.columns)
        self._places = batch.places(splits, rows=unlabelled) if batch.ids else None
        of_group = self._exchange is not None and batch.unlabelled > 0
        self._of_group = batch.plan("unlabelled", splits, rows=unlabelled, columns=0) if of_group else None
        self._steps = itertools.count(start_step)
        requests = self._requests(start_step)
        self._source: ViewSource
        if resident is not None:
            self.quarantine = resident.quarantine
            self._source = ResidentViews(requests, resident)
            return
        self.quarantine = quarantine or Quarantine(max_fraction=config.max_bad_fraction)
        asked = len(unlabelled[own])
        self._source = DecodePipeline(
            requests,
            images=splits.images,
            view=view,
            capacity=self._share.stop - self._share.start + asked * (1 if self._pairing is None else 2),
            device=mesh.device,
            quarantine=self.quarantine,
            decoding=Decoding.of(config, channels_last=batch.channels_last),
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next step's batch.

        Raises:
            ValueError: too many files cannot be decoded; it names the first ones.
        """
        views, labelled = self._views() if self._exchange is None else self._exchange(self._views)
        self._in_flight.popleft()
        labels = self._labels if self._exchange is None else None  # those of the whole group are not on this rank
        if labels is None:
            labels = to_device(np.asarray(self._splits.images.labels[labelled], np.int64), self._device)
        step = next(self._steps)
        return Batch(
            labelled=views[0],
            labels=labels,
            labelled_rows=self._labelled_rows,
            weak=views[1],
            strong=views[-1],
            unlabelled_rows=self._unlabelled_rows,
            normalise=self._normalise,
            unlabelled_ids=self._ids(step),
            unlabelled_samples=self._unlabelled_samples(step),
            **self._stored(),
        )

    def _unlabelled_samples(self, step: int) -> np.ndarray:
        """Those decoded; where a group shares its rows, those drawn."""
        if self._of_group is not None:
            return self._of_group.draw(step).ids
        first = len(self._labelled_rows)
        return self._seen[first : first + len(self._unlabelled_rows)]

    def _ids(self, step: int) -> torch.Tensor | None:
        """Those drawn: a substitute counts as the image it stands for."""
        return None if self._places is None else to_device(self._places.draw(step).ids, self._device)

    def _stored(self) -> dict[str, torch.Tensor]:
        """The distributions of the images that this step decoded."""
        if self._distributions is None:
            return {}
        labelled, unlabelled = np.split(self._seen, [len(self._labelled_rows)])
        return {
            "labelled_distributions": self._distributions(labelled),
            "unlabelled_distributions": self._distributions(unlabelled[: len(self._unlabelled_rows)]),
        }

    def close(self) -> None:
        """Stop reading ahead."""
        self._source.close()

    def _views(self) -> Views:
        """This rank's labelled, weak and, where they differ, strong views of the next step; the labelled ids decoded.

        The random numbers of a substitute are those of the image it stands for.
        """
        decoded = self._source.next()
        self._seen, self._labels = decoded.samples, decoded.labels
        _, unlabelled, paired = self._in_flight[0]
        own = self._share.stop - self._share.start
        labelled_views, weak, others = decoded.views.split([own, len(unlabelled.ids), len(paired)])
        samples = decoded.samples[:own]
        if self._strong_view is None:
            return [labelled_views, weak], samples
        if self._strong_labelled:
            drawn = self._in_flight[0].labelled
            ids, epochs = drawn.ids[self._share], drawn.epochs[self._share]
            labelled_views = self._strong_view(labelled_views.contiguous(), ids, epochs)
        if not len(unlabelled.ids):
            return [labelled_views, weak, weak], samples
        weak_planes = weak.contiguous()
        if not len(paired):
            return [labelled_views, weak, self._strong_view(weak_planes, unlabelled.ids, unlabelled.epochs)], samples
        mixed_in = others.contiguous()
        if len(paired) < len(weak):
            mixed_in = torch.empty_like(weak_planes)
            mixed_in[to_device(paired, self._device)] = others.contiguous()
        strong = self._strong_view(weak_planes, unlabelled.ids, unlabelled.epochs, partners=mixed_in)
        return [labelled_views, weak, strong], samples

    def _requests(self, start_step: int) -> Iterator[DecodeRequest]:
        splits, own = self._splits, self._share
        for number in itertools.count(start_step):
            labelled, unlabelled = self._labelled.draw(number), self._unlabelled.draw(number)
            partners, paired = self._partners(unlabelled)
            self._in_flight.append(_Step(labelled, unlabelled, paired))
            request = [
                Rows(labelled.ids[own], labelled.uniform[own], splits.labelled),
                Rows(unlabelled.ids, unlabelled.uniform, splits.unlabelled),
            ]
            yield request if partners is None else [*request, partners]

    def _partners(self, unlabelled: Draws) -> tuple[Rows | None, np.ndarray]:
        """The other images that the strong view needs, and the rows they are for, int64.

        Of resident images there is one for each row, since that needs no copy to the device: where none is needed, the
        row's own.
        """
        rows = np.zeros(0, np.int64)
        if self._pairing is None or not len(unlabelled.ids):
            return None, rows
        ids = self._pairing.partners(unlabelled.ids, unlabelled.epochs)
        rows = np.flatnonzero(ids >= 0)
        if not len(rows):
            return None, rows
        numbers = self._unlabelled.view_numbers(ids[rows], unlabelled.epochs[rows])
        if not self._resident:
            return Rows(ids[rows], numbers, self._splits.unlabelled), rows
        uniform = unlabelled.uniform.copy()
        uniform[rows] = numbers
        return Rows(np.where(ids >= 0, ids, unlabelled.ids), uniform, self._splits.unlabelled), np.arange(len(ids))


def _divide(batch: BatchSpec, mesh: Mesh) -> tuple[slice, slice, WidthExchange | None]:
    """What this rank decodes of its data rank's labelled and unlabelled rows, and how a width group exchanges it."""
    split = batch.columns is not None and mesh.width > 1
    ranks, own = (mesh.width, mesh.width_index) if split else (1, 0)
    labelled, unlabelled = (
        [share(count // mesh.data, ranks=ranks, index=index, extra_last=last) for index in range(ranks)]
        for count, last in ((batch.labelled, False), (batch.unlabelled, True))
    )
    exchange = None
    if batch.columns is not None and split:
        shares = [labelled] + [unlabelled] * (1 if batch.strong_view is None else 2)
        exchange = WidthExchange(batch.columns, image_size=batch.image_size, shares=shares, mesh=mesh)
    return labelled[own], unlabelled[own], exchange


def _distributions(config: DataConfig, splits: Splits, mesh: Mesh) -> Distributions | SyntheticDistributions | None:
    if config.distributions is None:
        return None
    if mesh.width > 1:
        raise ValueError(
            f"mpl_scale.data.distributions with mpl_scale.parallel.width = {mesh.width}: rows of a group are "
            "not brought together; use width 1"
        )
    images = splits.images
    if isinstance(images, SyntheticImages):
        return SyntheticDistributions(images.labels, classes=images.number, device=mesh.device)
    return Distributions(config.distributions, images=len(images), classes=len(images.classes), device=mesh.device)


def _origin(config: DataConfig, splits: Splits) -> str:
    """What decides how many labelled images there are."""
    if config.is_synthetic:
        return "synthetic_images"
    if config.is_apart:
        return "labelled"
    return f"labelled_per_class = {config.labelled_per_class} x {len(splits.images.classes)} classes"


class _Step(NamedTuple):
    """What was drawn for a step."""

    labelled: Draws  # of all rows
    unlabelled: Draws  # of this rank's share
    paired: np.ndarray  # int64, the rows of these whose partner's view is made too


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
            f"mpl_scale.data.{_origin(config, splits)} = {len(splits.labelled)} labelled images for {data_ranks} data "
            "ranks; give more, or raise mpl_scale.parallel.width so that fewer ranks need their own images"
        )
    if unlabelled_batch and not len(splits.unlabelled):
        raise ValueError(
            f"mpl_scale.data.unlabelled_from = {config.unlabelled_from!r} leaves no unlabelled images; "
            "use 'training' or lower labelled_per_class"
        )
