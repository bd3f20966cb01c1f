"""Whole parameters from shards, on every rank: for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist

from mpl_scale.types import Slice

BUCKET_BYTES = 64 << 20
_INTEGER_OF_SIZE = {4: torch.int32, 8: torch.int64}


@torch.no_grad()
def gather_parameters(
    layout: Sequence[Slice],
    tensors: Sequence[torch.Tensor],
    *,
    group: dist.ProcessGroup | None,
    owns: bool,
    bucket_bytes: int = BUCKET_BYTES,
) -> dict[str, torch.Tensor]:
    """Every parameter in full, by name, in the order of the first rank that has it.

    Owned slices are put in zeroed flat buckets that are summed over the group as integers of the same width, so the
    result is bitwise what was put in (-0.0 and NaN too). Collective over the group.

    Args:
        layout: this rank's slices.
        tensors: its 1-D shard tensors, at least one (it may be empty); float32 or float64, which the result keeps.
        group: mesh.world_group; None in a single process.
        owns: whether this rank's slices count; over the group every element is owned exactly once.
        bucket_bytes: size of the buffers that are reduced; a larger parameter gets one of its own.
    """
    shapes = _agree_on_shapes(layout, group)
    dtype, device = tensors[0].dtype, tensors[0].device
    owned: dict[str, list[Slice]] = {name: [] for name in shapes}
    for piece in layout if owns else ():
        owned[piece.name].append(piece)
    parameters: dict[str, torch.Tensor] = {}
    for names in _buckets(shapes, bucket_bytes // dtype.itemsize):
        bucket = torch.zeros(sum(prod(shapes[name]) for name in names), dtype=dtype, device=device)
        flats = bucket.split([prod(shapes[name]) for name in names])
        for name, flat in zip(names, flats, strict=True):
            for piece in owned[name]:
                values = tensors[piece.shard][piece.offset : piece.offset + piece.length]
                flat[piece.start : piece.start + piece.length].copy_(values)
            parameters[name] = flat.view(shapes[name])
        if group is not None:
            dist.all_reduce(bucket.view(_INTEGER_OF_SIZE[dtype.itemsize]), group=group)
    return parameters


def _agree_on_shapes(layout: Sequence[Slice], group: dist.ProcessGroup | None) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name, in the same order on every rank: a rank may hold no element of some."""
    local = {piece.name: tuple(piece.shape) for piece in layout}
    if group is None:
        return local
    everyone: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, local, group=group)
    return {name: shape for shapes in everyone for name, shape in shapes.items()}


def _buckets(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[list[str]]:
    """Consecutive names whose parameters have together at most `limit` elements; a larger one comes alone."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + prod(shape) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += prod(shape)
    if names:
        yield names
