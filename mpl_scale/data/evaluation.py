"""The test split, once, over the data ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.batch_spec import ImageFormat
from mpl_scale.data.decode.pipeline import DecodePipeline, Decoding, Rows, ViewSource
from mpl_scale.data.decode.quarantine import Quarantine
from mpl_scale.data.decode.views import evaluation_view
from mpl_scale.data.resident import ResidentImages, ResidentViews
from mpl_scale.data.samples.splits import Splits
from mpl_scale.data.slices import Views, WidthExchange, share
from mpl_scale.data.transfer import to_device
from mpl_scale.data.vectors import VectorSet, resident_vectors
from mpl_scale.mesh import Mesh


class EvaluationBatch(NamedTuple):
    """One batch; rows that are not valid are padding, or stand in for images that cannot be decoded."""

    images: torch.Tensor  # [b, 3, H, W], normalised; or vectors [b, F]
    labels: torch.Tensor  # int64 [b]
    valid: torch.Tensor  # bool [b]


def evaluation_batches(
    config: DataConfig,
    splits: Splits,
    *,
    images: ImageFormat,
    mesh: Mesh,
    quarantine: Quarantine | None = None,
    resident: ResidentImages | None = None,
) -> Iterator[EvaluationBatch]:
    """Every readable test image once over all data ranks, as `data.evaluation` sees it.

    Every rank yields the same number of equally large batches, so collectives may follow each: the fewest batches of at
    most `evaluation_batch` images per data rank, with the padding spread by making them as small as that number allows.

    Args:
        config: the data section.
        splits: `test` is read.
        images: in which form they are given.
        mesh: this rank's place; the ranks of one width group receive the same images.
        quarantine: where bad images are kept; None: in a list of its own.
        resident: the images of `test`, decoded for this view; its quarantine is used. None: files are decoded.
    """
    count = len(splits.test)
    batches = -(-count // (config.evaluation_batch * mesh.data))
    size = -(-count // (batches * mesh.data))
    rows = np.arange(mesh.data_index * size, (mesh.data_index + 1) * size)
    positions = np.arange(batches)[:, None] * (size * mesh.data) + rows  # [batches, size]
    valid = positions < count
    ids = splits.test[np.minimum(positions, count - 1)]
    if isinstance(splits.images, VectorSet):
        resident = resident or resident_vectors(splits.images, mesh.device)
    own, exchange = slice(0, size), None
    if images.columns is not None and mesh.width > 1:
        shares = [share(size, ranks=mesh.width, index=index) for index in range(mesh.width)]
        own = shares[mesh.width_index]
        exchange = WidthExchange(images.columns, image_size=images.image_size, shares=[shares], mesh=mesh)
    decoded_here = own.stop - own.start
    requests = ([Rows(batch[own], np.zeros((decoded_here, 0)), splits.test)] for batch in ids)
    source: ViewSource = (
        ResidentViews(requests, resident)
        if resident is not None
        else DecodePipeline(
            requests,
            images=splits.images,
            view=evaluation_view(config.evaluation, images.image_size),
            capacity=decoded_here,
            device=mesh.device,
            quarantine=quarantine or Quarantine(max_fraction=config.max_bad_fraction),
            decoding=Decoding.of(config, channels_last=images.channels_last),
        )
    )

    def decode() -> Views:
        decoded = source.next()
        return [decoded.views], decoded.samples

    normalise = images.normaliser(config, mesh.device, resident)
    try:
        for batch, batch_valid in zip(ids, valid, strict=True):
            (views,), samples = decode() if exchange is None else exchange(decode)
            yield EvaluationBatch(
                images=normalise(views),
                labels=to_device(splits.images.labels[batch], mesh.device),
                valid=to_device(batch_valid & (samples == batch), mesh.device),
            )
    finally:
        source.close()
