"""Which rank owns which columns, and which columns of its neighbours it reads: integers only, no torch.

A width of W columns is owned as `Bounds` b_0 = 0 <= b_1 <= ... <= b_n = W: rank r owns [b_r, b_{r+1}), possibly none.
The input is split evenly (`balanced`); behind a layer of stride s a boundary b becomes ceil(b / s) (`derived`), so that
an output lies with the rank that owns the first column under its centre and halos stay below the kernel's extent
whatever the widths. What a rank reads follows from its outputs by interval arithmetic (`shares`); hence halos wider
than a neighbour's slice, uneven slices and empty ones are no special cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

Bounds = tuple[int, ...]


def balanced(columns: int, shards: int) -> Bounds:
    """Boundaries of an even split; the first `columns % shards` ranks own one column more."""
    quotient, rest = divmod(columns, shards)
    return tuple(rank * quotient + min(rank, rest) for rank in range(shards + 1))


def derived(bounds: Bounds, *, stride: int, columns: int) -> Bounds:
    """Boundaries of the `columns` outputs of a layer of that stride whose input is owned as `bounds`."""
    return (*(min(-(-bound // stride), columns) for bound in bounds[:-1]), columns)


def slices(bounds: Bounds) -> list[tuple[int, int]]:
    """[start, stop) of every rank."""
    return list(pairwise(bounds))


def input_columns(image_size: int, width: int) -> list[tuple[int, int]]:
    """The [start, stop) columns of the input image that each rank of a width group owns.

    Args:
        image_size: columns of the image, pixels.
        width: ranks of the group.

    Raises:
        ValueError: more ranks than columns.
    """
    if width > image_size:
        raise ValueError(
            f"mpl_scale.parallel.width = {width}, but images have {image_size} columns; use at most {image_size}"
        )
    return slices(balanced(image_size, width))


@dataclass(frozen=True)
class Window:
    """A convolution or pool along one axis: output o reads inputs o * stride - pad_left + dilation * [0, kernel)."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    pad_left: int = 0
    pad_right: int = 0
    ceil: bool = False

    @property
    def extent(self) -> int:
        """Columns from the first to the last one that an output reads."""
        return self.dilation * (self.kernel - 1) + 1

    def outputs(self, columns: int) -> int:
        """Columns of the output, as torch counts them (a pool's ceil_mode included)."""
        room = columns + self.pad_left + self.pad_right - self.extent
        count = (-(-room // self.stride) if self.ceil else room // self.stride) + 1
        if self.ceil and (count - 1) * self.stride >= columns + self.pad_left:
            count -= 1  # the last window must start inside the input or its left padding
        return count


def same_padding(columns: int, *, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """TensorFlow's SAME padding (left, right) of a dimension; of the GLOBAL width, never of a slice."""
    total = max((-(-columns // stride) - 1) * stride + dilation * (kernel - 1) + 1 - columns, 0)
    return total // 2, total - total // 2


@dataclass(frozen=True)
class Share:
    """What one rank reads: the real columns [start, stop) of the whole width, between padding that no rank owns."""

    start: int
    stop: int
    pad_left: int = 0
    pad_right: int = 0


def shares(window: Window, *, inputs: Bounds, outputs: Bounds) -> tuple[Share, ...]:
    """What each rank reads to compute its outputs.

    A rank without outputs reads no column, but one window of padding: it computes one column and drops it, which
    keeps its parameters and its collectives in the graph at no special case in any layer.
    """
    columns, found = inputs[-1], []
    for (own, _), (first, last) in zip(slices(inputs), slices(outputs), strict=True):
        if first == last:
            found.append(Share(own, own, pad_left=window.extent))
            continue
        begin = first * window.stride - window.pad_left
        end = (last - 1) * window.stride - window.pad_left + window.extent
        start, stop = min(max(begin, 0), columns), max(min(end, columns), 0)
        found.append(
            Share(start, max(stop, start), max(min(-begin, end - begin), 0), max(end - max(columns, begin), 0))
        )
    return tuple(found)


@dataclass(frozen=True)
class Route:
    """One rank's side of an exchange. Pairs are [start, stop); those of other ranks are indexed by rank.

    Source columns count from the rank's own first column, target columns from the first real column it reads.
    """

    own: int  # columns held before
    reads: int  # real columns held after
    pad_left: int
    pad_right: int
    keep_from: tuple[int, int]  # own columns that it reads itself
    keep_to: tuple[int, int]
    sends: tuple[tuple[int, int], ...]
    receives: tuple[tuple[int, int], ...]
    silent: bool  # no rank of the group sends anything: no collective

    @property
    def total(self) -> int:
        """Columns after the exchange, padding included."""
        return self.pad_left + self.reads + self.pad_right


def route(inputs: Bounds, reads: tuple[Share, ...], rank: int) -> Route:
    """The side of `rank` in the exchange after which each rank holds its share."""
    own, share = slices(inputs), reads[rank]
    start, stop = own[rank]

    def overlap(held: tuple[int, int], wanted: Share, origin: int) -> tuple[int, int]:
        low, high = max(held[0], wanted.start), min(held[1], wanted.stop)
        return (low - origin, high - origin) if high > low else (0, 0)

    nothing = (0, 0)
    return Route(
        own=stop - start,
        reads=share.stop - share.start,
        pad_left=share.pad_left,
        pad_right=share.pad_right,
        keep_from=overlap(own[rank], share, start),
        keep_to=overlap(own[rank], share, share.start),
        sends=tuple(nothing if r == rank else overlap(own[rank], want, start) for r, want in enumerate(reads)),
        receives=tuple(nothing if r == rank else overlap(held, share, share.start) for r, held in enumerate(own)),
        silent=not messages(inputs, reads),
    )


def crop(held: Share, read: Share) -> Route:
    """The route of a rank that holds what it reads already: no exchange."""
    start, stop = read.start - held.start, read.stop - held.start
    if start == stop:
        start = stop = 0
    count, nothing = stop - start, ()
    return Route(
        own=held.stop - held.start,
        reads=count,
        pad_left=read.pad_left,
        pad_right=read.pad_right,
        keep_from=(start, stop),
        keep_to=(0, count),
        sends=nothing,
        receives=nothing,
        silent=True,
    )


def messages(inputs: Bounds, reads: tuple[Share, ...]) -> dict[tuple[int, int], int]:
    """Columns sent from rank to rank: {(source, target): columns}, without empty ones."""
    found = {}
    for target, share in enumerate(reads):
        for source, (start, stop) in enumerate(slices(inputs)):
            count = min(stop, share.stop) - max(start, share.start)
            if source != target and count > 0:
                found[source, target] = count
    return found


def halo(inputs: Bounds, reads: tuple[Share, ...]) -> tuple[int, int]:
    """The widest halo of any rank (left, right), columns."""
    pairs = [(own, share) for own, share in zip(slices(inputs), reads, strict=True) if share.stop > share.start]
    left = max((own[0] - share.start for own, share in pairs), default=0)
    right = max((share.stop - own[1] for own, share in pairs), default=0)
    return max(left, 0), max(right, 0)


def hops(inputs: Bounds, reads: tuple[Share, ...]) -> int:
    """The farthest rank that any rank receives columns from; 0: no message."""
    return max((abs(source - target) for source, target in messages(inputs, reads)), default=0)
