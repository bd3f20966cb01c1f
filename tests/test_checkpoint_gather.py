"""Gathered parameters are, bit for bit, those the shards were cut from."""

from __future__ import annotations

import pytest
import torch

from mpl_scale.checkpoint import gather_parameters
from mpl_scale.mesh import build_mesh
from mpl_scale.types import Slice
from tests.support.ranks import pool

SHAPES = {"scale": (), "a": (3, 4), "b": (17,), "empty": (0, 2), "c": (2, 2, 2)}


def whole(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters with values a floating-point sum with 0.0 would not keep: -0.0 and NaN."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}
    tensors["a"][0, 0], tensors["b"][5] = -0.0, float("nan")
    return tensors


def gather(dtype: torch.dtype, shard_size: int | None, bucket_bytes: int) -> dict[str, bytes]:
    """Cut the parameters over the ranks of a shard group, element ranges of the whole list, and gather them."""
    mesh = build_mesh(device=torch.device("cpu"), shard_size=shard_size)
    tensors = whole(dtype)
    total = sum(tensor.numel() for tensor in tensors.values())
    begin, end = (total * (mesh.shard_index + i) // mesh.shard_size for i in (0, 1))
    layout, pieces, position, offset = [], [], 0, 0
    for name, tensor in tensors.items():
        low, high = max(begin, position), min(end, position + tensor.numel())
        if low < high or tensor.numel() == 0:
            length = max(0, high - low)
            layout.append(Slice(name, tuple(tensor.shape), max(0, low - position), length, 0, offset))
            pieces.append(tensor.view(-1)[low - position :][:length] if length else tensor.view(-1))
            offset += length
        position += tensor.numel()
    gathered = gather_parameters(
        layout,
        [torch.cat(pieces)],
        group=mesh.world_group,
        owns=mesh.rank < mesh.shard_size,
        bucket_bytes=bucket_bytes,
    )
    for name, tensor in gathered.items():
        assert (tensor.shape, tensor.dtype) == (SHAPES[name], dtype)
    return {name: tensor.numpy().tobytes() for name, tensor in gathered.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bucket_bytes", [16, 100, 1 << 20])
@pytest.mark.parametrize(("world", "shard_size"), [(4, None), (4, 2), (2, 1), (1, None)])
def test_gathers_bitwise(dtype: torch.dtype, bucket_bytes: int, world: int, shard_size: int | None) -> None:
    wanted = {name: tensor.numpy().tobytes() for name, tensor in whole(dtype).items()}
    for gathered in pool(world).run(gather, dtype, shard_size, bucket_bytes):
        assert gathered == wanted
