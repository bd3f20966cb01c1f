"""Whole images of some rows on each rank to some columns of all rows on every rank of a width group (DESIGN 7).

Each rank decodes and augments its share of the group's images in full, because rotation and equalisation need whole
images. Then one uint8 all-to-all sends every rank its columns of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from mpl_scale.mesh import Mesh

Columns = Sequence[tuple[int, int]]
"""[start, stop) of each width rank, in order and without gaps."""
Views = tuple[Sequence[torch.Tensor], np.ndarray]
"""Images by kind, uint8 [*, C, H, W], and the sample ids of the first kind, int64 [*]."""


def share(count: int, *, ranks: int, index: int, extra_last: bool = False) -> slice:
    """The consecutive rows, of `count`, that one of `ranks` ranks decodes: shares differ by at most one.

    extra_last gives the larger shares to the last ranks instead of the first. One kind of image split one way and a
    second kind the other way leave the sums of shares within one of each other, too.
    """
    least, extra = divmod(count, ranks)
    skipped = ranks - extra if extra_last else 0  # ranks before the first larger share
    start, stop = (place * least + min(max(place - skipped, 0), extra) for place in (index, index + 1))
    return slice(start, stop)


class WidthExchange:
    """Sends the images that each rank of a width group decoded to all of them, a range of columns to each.

    Collective over the group: on every rank, the same number of calls.
    """

    def __init__(self, columns: Columns, *, image_size: int, shares: Sequence[Sequence[slice]], mesh: Mesh) -> None:
        """Args:
        columns: one [start, stop) per width rank.
        image_size: height and width of whole images, pixels.
        shares: of each kind of image, the rows that each width rank decodes.
        mesh: this rank's place; its width group takes part.

        Raises:
            ValueError: columns that do not cut the image into one piece per width rank.
        """
        edges = [start for start, _ in columns] + [image_size]
        cuts = len(columns) == mesh.width and edges[0] == 0 and edges[1:] == [stop for _, stop in columns]
        if not cuts or any(start > stop for start, stop in columns):
            raise ValueError(f"columns {list(columns)} do not cut {image_size} columns over {mesh.width} ranks")
        self._columns, self._group, self._height = columns, mesh.width_group, image_size
        counts = [[part.stop - part.start for part in kind] for kind in shares]  # [kinds][width ranks]
        self._received = list(zip(*counts, strict=True))  # of each rank, images by kind
        own = sum(self._received[mesh.width_index])
        self._rows = shares[0][mesh.width_index]  # of the first kind, this rank's
        self._group_rows = shares[0][-1].stop
        self._send = [own * image_size * (stop - start) for start, stop in columns]  # bytes of a channel
        self._width = columns[mesh.width_index][1] - columns[mesh.width_index][0]
        self._receive = [sum(images) * image_size * self._width for images in self._received]

    def __call__(self, views: Callable[[], Views]) -> Views:
        """The images of the whole group, this rank's columns of them.

        Args:
            views: makes this rank's images: of each kind, uint8 [share, C, image_size, image_size]; and the sample ids
                of the first kind, int64 [share].

        Returns:
            Of each kind, uint8 [rows of the group, C, image_size, own columns]; and the sample ids of the first kind,
            int64 [rows of the group].

        Raises:
            ValueError: on every rank of the group, with the file's name, if `views` failed on one.
        """
        images, samples = self._together(views)
        whole = torch.cat(list(images))
        sent = torch.cat([whole[..., start:stop].reshape(-1) for start, stop in self._columns])
        channels = whole.shape[1]
        receive, send = ([channels * size for size in sizes] for sizes in (self._receive, self._send))
        received = sent.new_empty(sum(receive))
        dist.all_to_all_single(received, sent, receive, send, group=self._group)
        by_rank = [
            pixels.view(sum(counts), channels, self._height, self._width).split(counts)
            for pixels, counts in zip(received.split(receive), self._received, strict=True)
        ]
        return [torch.cat(kind) for kind in zip(*by_rank, strict=True)], samples

    def _together(self, views: Callable[[], Views]) -> Views:
        """This rank's images and the group's sample ids, or an exception on every rank of the group if one failed.

        Nobody waits for a rank that is gone. The agreement is on host values, so that no GPU is waited for; what failed
        is told only when something did.
        """
        images: Sequence[torch.Tensor] = ()
        failure: Exception | None = None
        told = torch.zeros(1 + self._group_rows, dtype=torch.int64)  # failed or not, then the ids; else 0
        try:
            images, samples = views()
            told[1:][self._rows] = torch.from_numpy(samples)
        except Exception as error:  # of any kind: raised below, once the others know
            failure = error
            told[0] = 1
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        if not told[0]:
            return images, told[1:].numpy()
        reasons: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(reasons, None if failure is None else str(failure), group=self._group)
        if failure is not None:
            raise failure
        raise ValueError("; ".join(reason for reason in reasons if reason is not None))
