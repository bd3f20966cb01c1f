"""The test split, once, over the data ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.dali import DecodePipeline, DecodeRequest
from mpl_scale.data.normalise import Normalise
from mpl_scale.data.splits import Splits
from mpl_scale.mesh import Mesh


class EvaluationBatch(NamedTuple):
    """One batch; rows that are not valid are padding."""

    images: torch.Tensor  # [b, 3, H, W], normalised
    labels: torch.Tensor  # int64 [b]
    valid: torch.Tensor  # bool [b]


def evaluation_batches(
    *, config: DataConfig, splits: Splits, image_size: int, mesh: Mesh, dtype: torch.dtype = torch.float32
) -> Iterator[EvaluationBatch]:
    """Every test image once over all data ranks, decoded and resized, without augmentation.

    Every rank yields the same number of equally large batches, so collectives may follow each: the fewest batches of at
    most `evaluation_batch` images per rank, with the padding spread by making them as small as that number allows.

    Args:
        config: the data section.
        splits: `test` is read.
        image_size: height and width of the images, pixels.
        mesh: this rank's place; the ranks of one width group receive the same images.
        dtype: floating type of the images.
    """
    count = len(splits.test)
    batches = -(-count // (config.evaluation_batch * mesh.data))
    size = -(-count // (batches * mesh.data))
    rows = np.arange(mesh.data_index * size, (mesh.data_index + 1) * size)
    positions = np.arange(batches)[:, None] * (size * mesh.data) + rows  # [batches, size]
    valid = positions < count
    ids = splits.test[np.minimum(positions, count - 1)]
    requests = (
        DecodeRequest(splits.images.paths[batch], np.zeros((size, 2), np.int32), np.zeros(size, np.int32))
        for batch in ids
    )
    decoder = DecodePipeline(
        requests,
        batch=size,
        image_size=image_size,
        resize=bool((splits.images.sizes != image_size).any()),
        fill=0,
        device=mesh.device,
        threads=config.threads,
        prefetch=config.prefetch,
    )
    normalise = Normalise(config, device=mesh.device, dtype=dtype)
    try:
        for batch, batch_valid in zip(ids, valid, strict=True):
            yield EvaluationBatch(
                images=normalise(decoder.next()),
                labels=torch.from_numpy(splits.images.labels[batch]).to(mesh.device),
                valid=torch.from_numpy(batch_valid).to(mesh.device),
            )
    finally:
        decoder.close()
