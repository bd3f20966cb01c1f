"""The CPU's part after decoding: resize, window and flip, in threads of its own, a batch ahead.

DALI resizes in floating point, which on a CPU takes longer than torch's way: uint8 in fixed point, as PIL does. So on a
CPU DALI decodes, and this does the rest; on a GPU DALI does it all. The pixels differ: torch's are within 2 levels of
PIL's; DALI repeats the border outwards and rounds once, and the bound is 16 (tests/test_data_views.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from mpl_scale.data.decode.views import Placement, View


class Resizer:
    """Decoded parts of images to views of one size."""

    def __init__(self, view: View, *, threads: int, layout: torch.memory_format) -> None:
        """Args:
        view: what is done after decoding.
        threads: CPU threads.
        layout: memory layout of the views.
        """
        self._view, self._layout, self._threads = view, layout, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize") if threads > 1 else None

    def __call__(self, images: Sequence[torch.Tensor], placement: Placement) -> torch.Tensor:
        """uint8 [n, C, image_size, image_size]; where nothing is resized, of the images' own size.

        Args:
            images: uint8 [h, w, C] each.
            placement: of the same images.
        """
        size = self._view.image_size
        height, width = (size, size) if self._view.interpolation is not None else images[0].shape[:2]
        shape = (len(images), images[0].shape[2], height, width)
        views = torch.empty(shape, dtype=torch.uint8, memory_format=self._layout)

        def place(first: int) -> None:
            for row in range(first, len(images), self._threads):
                self._place(images[row], placement, row, out=views[row])

        if self._pool is None:
            place(0)
        else:
            list(self._pool.map(place, range(self._threads)))
        return views

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _place(self, image: torch.Tensor, placement: Placement, row: int, *, out: torch.Tensor) -> None:
        """One image, uint8 [h, w, C], to its view `out`, uint8 [C, H, W]."""
        view, square = self._view, (self._view.image_size, self._view.image_size)
        planes = image.permute(2, 0, 1)
        if view.interpolation is not None:
            size = tuple(map(int, placement["sizes"][row])) if "sizes" in placement else square
            if planes.shape[1:] != size:
                planes = F.interpolate(planes[None], size=size, mode=view.interpolation, antialias=True)[0]
        if "windows" in placement:
            planes = _cut(planes, placement["windows"][row].tolist(), side=view.image_size, fill=view.fill)
        out.copy_(planes.flip(2) if "flips" in placement and placement["flips"][row] else planes)


def _cut(planes: torch.Tensor, corner: Sequence[int], *, side: int, fill: int) -> torch.Tensor:
    """The square window at corner (top, left) of uint8 [C, h, w]; what lies outside is filled."""
    top, left = corner
    inside = planes[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
    if inside.shape[1:] == (side, side):
        return inside
    window = torch.full((len(planes), side, side), fill, dtype=torch.uint8)
    above, before = max(0, -top), max(0, -left)
    window[:, above : above + inside.shape[1], before : before + inside.shape[2]] = inside
    return window
