"""Look-ups: a pixel's new value by its old one, or by the place that it comes from."""

from __future__ import annotations

import numpy as np
import torch

LEVELS = 256
_LARGE = 1 << 12
"""Pixels of a plane from which one look-up per plane is cheaper on a CPU than one look-up of all with offsets."""
_PIECE = 1 << 16
_INT32 = 1 << 31


def look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """The table's entry for each pixel.

    On a CPU large images go through `bytes.translate`: torch and numpy look bytes up by an index of four or eight times
    their size, which takes them longer than the look-up.

    Args:
        images: uint8 [B, 3, H, W], contiguous.
        tables: uint8 [B, 3, 256], or [B, 1, 256]: one for all channels.

    Returns:
        uint8 [B, 3, H, W].
    """
    count = tables.shape[0] * tables.shape[1]
    if images.device.type != "cpu" or images.numel() < _LARGE * count:
        return _select(tables, images.view(*tables.shape[:2], -1).int()).view_as(images)
    result = torch.empty_like(images)
    planes = zip(*(tensor.reshape(count, -1).numpy() for tensor in (images, tables, result)), strict=True)
    for plane, table, out in planes:
        translate_bytes(plane, table.tobytes(), out=out)
    return result


def translate_bytes(values: np.ndarray, table: bytes, *, out: np.ndarray) -> None:
    """Entries of a table of 256 for values, uint8 [N], on the host."""
    for first in range(0, len(values), _PIECE):
        part = slice(first, first + _PIECE)
        out[part] = np.frombuffer(values[part].tobytes().translate(table), np.uint8)


def sample(planes: torch.Tensor, index: torch.Tensor, *, out: torch.Tensor) -> None:
    """The pixels at some places, the same in all channels.

    Args:
        planes: uint8 [B, 3, N], contiguous.
        index: int32 or int64 [B, h, W], places in [0, N).
        out: uint8 [B, 3, h, W], where the pixels go; each of its planes contiguous.
    """
    batch, channels = planes.shape[:2]
    if planes.device.type != "cpu" or index[0].numel() < _LARGE:
        out[...] = _select(planes, index.view(batch, 1, -1)).view(out.shape)
        return
    for image, places, target in zip(planes, index.view(batch, -1), out, strict=True):
        for channel in range(channels):
            torch.index_select(image[channel], 0, places, out=target[channel].view(-1))


def _select(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of [B, C, N] at an index [B, 1 or C, M] into each row: [B, C, M]."""
    batch, channels, length = rows.shape
    dtype = index.dtype if rows.numel() < _INT32 else torch.int64
    starts = torch.arange(0, rows.numel(), length, device=rows.device, dtype=dtype).view(batch, channels, 1)
    return rows.reshape(-1).index_select(0, (index + starts).view(-1)).view(batch, channels, -1)
