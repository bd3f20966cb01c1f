"""Loaders of small batches, ranks that are not there, and batches as networks are given them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

import torch

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import BatchSpec, Splits, TrainLoader, load_images, make_splits
from mpl_scale.mesh import Mesh, build_mesh
from mpl_scale.types import Batch, as_they_are


def data_rank(data: int = 1, index: int = 0, *, width: int = 1) -> Mesh:
    """The mesh of the first rank of a width group, as seen in a world of `data` such groups."""
    single = build_mesh(device=torch.device("cpu"))
    world, rank = data * width, index * width
    return dataclasses.replace(single, data=data, data_index=index, width=width, world=world, rank=rank)


def splits_of(config: DataConfig) -> Splits:
    return make_splits(load_images(config), config=config, seed=0)


def train_loader(config: DataConfig, splits: Splits, mesh: Mesh, **changes: Any) -> TrainLoader:
    """changes: fields of the batch spec, and what else the loader takes."""
    drawn = {field.name for field in dataclasses.fields(BatchSpec)}
    spec = {"image_size": 8, "labelled": 4, "unlabelled": 8, "seed": 0, "stream": 1}
    spec |= {name: value for name, value in changes.items() if name in drawn}
    others = {name: value for name, value in changes.items() if name not in drawn}
    return TrainLoader(config, splits, batch=BatchSpec(**spec), mesh=mesh, **others)


def take(loader: TrainLoader, steps: int) -> list[Batch]:
    """The first batches; then the loader is closed."""
    with contextlib.closing(loader):
        return list(itertools.islice(loader, steps))


def joined(parts: list[Batch]) -> dict[str, torch.Tensor]:
    """The global batch from the parts of all data ranks."""
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].tensors()}


def normalised(batch: Batch) -> Batch:
    """The same batch with floating-point images."""
    images = {name: getattr(batch, name) for name in ("labelled", "weak", "strong")}
    assert all(pixels.dtype == torch.uint8 for pixels in images.values())
    inputs = {name: batch.normalise(pixels) for name, pixels in images.items()}
    return dataclasses.replace(batch, **inputs, normalise=as_they_are)
