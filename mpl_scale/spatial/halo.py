"""Communication inside a width group, differentiable: halo exchange, sums, and width partition <-> batch partition.

Each is one collective with splits that are known before the run: no host sync, no data-dependent shape, so a CUDA
graph can capture it and gloo runs the same path. Gradient convention: every rank computes the whole loss from the
logits of the whole group, so an activation's gradient is `width` times that of the loss, and the backward of whatever
all ranks read is a SUM. Averaging parameter gradients over all ranks then gives the gradient of the mean loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mpl_scale.spatial.layout import Bounds, Route, balanced, slices


@dataclass
class Traffic:
    """What this rank sent since the last reset, counted on the host (a graph replay does not count)."""

    exchanges: int = 0
    messages: int = 0
    bytes: int = 0

    def reset(self) -> None:
        """Set all counters to zero."""
        self.exchanges = self.messages = self.bytes = 0


class WidthGroup:
    """The ranks that share an image, and the traffic counter; shared by all split layers of a model."""

    def __init__(self, group: dist.ProcessGroup, *, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.traffic = Traffic()

    def __deepcopy__(self, memo: dict[int, Any]) -> WidthGroup:
        return self  # a copy of a model talks over the same group; process groups cannot be copied

    def all_to_all(self, pieces: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        """Send pieces[r] (any shape) to rank r, receive counts[r] elements from it as a 1-D tensor."""
        sent = [piece.numel() for piece in pieces]
        send = torch.cat([piece.reshape(-1) for piece in pieces])
        receive = send.new_empty(sum(counts))
        dist.all_to_all_single(receive, send, counts, sent, group=self.group)
        others = [count for r, count in enumerate(sent) if count and r != self.rank]
        self.traffic.exchanges += 1
        self.traffic.messages += len(others)
        self.traffic.bytes += sum(others) * send.element_size()
        return list(receive.split(counts))


def _new(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Uninitialised [B, C, H, columns] in the memory format of x [B, C, H, W]."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty((*x.shape[:3], columns), dtype=x.dtype, device=x.device, memory_format=memory_format)


# The functions below are linear: `jvp` (forward mode) does to a derivative what `forward` does to x.


def _exchanged(x: torch.Tensor, route: Route, ranks: WidthGroup, fill: float) -> torch.Tensor:
    """See `exchange`."""
    y = _new(x, route.total)
    real = y.narrow(3, route.pad_left, route.reads)
    y[..., : route.pad_left] = fill
    y[..., route.pad_left + route.reads :] = fill
    real[..., slice(*route.keep_to)] = x[..., slice(*route.keep_from)]
    line = x.shape[:3].numel()
    counts = [(stop - start) * line for start, stop in route.receives]
    received = ranks.all_to_all([x[..., slice(*pair)] for pair in route.sends], counts)
    for (start, stop), piece in zip(route.receives, received, strict=True):
        if stop > start:
            real[..., start:stop] = piece.view(*x.shape[:3], stop - start)
    return y


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, route, ranks, fill):  # type: ignore[no-untyped-def]
        ctx.route, ctx.ranks = route, ranks
        return _exchanged(x, route, ranks, fill)

    @staticmethod
    def jvp(ctx: Any, dx, *_):  # type: ignore[no-untyped-def]
        return _exchanged(dx, ctx.route, ctx.ranks, 0.0)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        route, ranks = ctx.route, ctx.ranks
        real = dy.narrow(3, route.pad_left, route.reads)
        dx = _new(dy, route.own).zero_()
        dx[..., slice(*route.keep_from)] = real[..., slice(*route.keep_to)]
        line = dy.shape[:3].numel()
        counts = [(stop - start) * line for start, stop in route.sends]
        received = ranks.all_to_all([real[..., slice(*pair)] for pair in route.receives], counts)
        for (start, stop), piece in zip(route.sends, received, strict=True):  # in rank order: deterministic
            if stop > start:
                dx[..., start:stop] += piece.view(*dy.shape[:3], stop - start)
        return dx, None, None, None


def exchange(x: torch.Tensor, *, route: Route, ranks: WidthGroup, fill: float = 0.0, path: str = "") -> torch.Tensor:
    """Own columns [B, C, H, own] -> the columns this rank reads, padded with `fill`: [B, C, H, route.total].

    Backward adds every rank's gradient of a column on the rank that owns it.

    Raises:
        ValueError: the slice is not as wide as the layout says (naming `path`), before any rank waits for it.
    """
    if x.shape[3] != route.own:
        raise ValueError(
            f"{path}: rank {ranks.rank} of the width group holds {x.shape[3]} columns, but its layout says {route.own};"
            " feed every rank the columns of input_columns() at the image_size given to parallelize()"
        )
    if not route.silent:
        return _Exchange.apply(x, route, ranks, fill)
    start, stop = route.keep_from
    x = x if stop - start == route.own else x.narrow(3, start, stop - start)
    pads = (route.pad_left, route.pad_right)
    return torch.nn.functional.pad(x, pads, value=fill) if any(pads) else x


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, ranks):  # type: ignore[no-untyped-def]
        ctx.ranks = ranks
        return _summed(x, ranks)

    @staticmethod
    def jvp(ctx: Any, dx, *_):  # type: ignore[no-untyped-def]
        return _summed(dx, ctx.ranks)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        return _summed(dy, ctx.ranks), None


def _summed(x: torch.Tensor, ranks: WidthGroup) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=ranks.group)
    return total


def sum_over(x: torch.Tensor, ranks: WidthGroup) -> torch.Tensor:
    """The sum of x over the width group, on every rank; the backward is a sum too."""
    return _Sum.apply(x, ranks)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def global_mean(x: torch.Tensor, *, columns: int, ranks: WidthGroup) -> torch.Tensor:
    """Mean over height and the whole width of `columns`: [B, C, H, own] -> [B, C, 1, 1], equal on every rank."""
    total = sum_over(x.sum((2, 3), keepdim=True, dtype=wide_dtype(x.dtype)), ranks)
    return (total / (x.shape[2] * columns)).to(x.dtype)


def _columns_to_rows(x: torch.Tensor, rows: Bounds, columns: Bounds, ranks: WidthGroup) -> torch.Tensor:
    (low, high), widths = slices(rows)[ranks.rank], [stop - start for start, stop in slices(columns)]
    shape = (high - low, *x.shape[1:3])
    counts = [(high - low) * x.shape[1:3].numel() * width for width in widths]
    received = ranks.all_to_all([x[start:stop] for start, stop in slices(rows)], counts)
    y = _new(x[low:high], columns[-1])
    for (start, stop), piece in zip(slices(columns), received, strict=True):
        y[..., start:stop] = piece.view(*shape, stop - start)
    return y


def _rows_to_columns(x: torch.Tensor, rows: Bounds, columns: Bounds, ranks: WidthGroup) -> torch.Tensor:
    start, stop = slices(columns)[ranks.rank]
    line = x.shape[1:3].numel() * (stop - start)
    counts = [(high - low) * line for low, high in slices(rows)]
    received = ranks.all_to_all([x[..., begin:end] for begin, end in slices(columns)], counts)
    return torch.cat(received).view(rows[-1], *x.shape[1:3], stop - start)


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, rows, columns, ranks):  # type: ignore[no-untyped-def]
        ctx.how = rows, columns, ranks
        return _columns_to_rows(x, rows, columns, ranks)

    @staticmethod
    def jvp(ctx: Any, dx, *_):  # type: ignore[no-untyped-def]
        return _columns_to_rows(dx, *ctx.how)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        return _rows_to_columns(dy, *ctx.how), None, None, None


def to_rows(x: torch.Tensor, *, columns: Bounds, ranks: WidthGroup) -> torch.Tensor:
    """Width split to batch split: all B rows of own columns [B, C, H, own] -> own rows at full width [B_r, C, H, W]."""
    return _ToRows.apply(x, balanced(x.shape[0], ranks.size), columns, ranks)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, rows, ranks):  # type: ignore[no-untyped-def]
        ctx.rows, ctx.ranks = rows, ranks
        return _gathered(x, rows, ranks)

    @staticmethod
    def jvp(ctx: Any, dx, *_):  # type: ignore[no-untyped-def]
        return _gathered(dx, ctx.rows, ctx.ranks)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        low, high = slices(ctx.rows)[ctx.ranks.rank]
        own = dy[low:high]
        received = ctx.ranks.all_to_all([dy[a:b] for a, b in slices(ctx.rows)], [own.numel()] * ctx.ranks.size)
        return torch.stack(received).sum(0).view(own.shape), None, None


def _gathered(x: torch.Tensor, rows: Bounds, ranks: WidthGroup) -> torch.Tensor:
    counts = [(high - low) * x.shape[1:].numel() for low, high in slices(rows)]
    return torch.cat(ranks.all_to_all([x] * ranks.size, counts)).view(rows[-1], *x.shape[1:])


def gather_rows(x: torch.Tensor, *, batch: int, ranks: WidthGroup) -> torch.Tensor:
    """Own rows [B_r, ...] -> the rows of the whole group [B, ...] on every rank; backward is a reduce-scatter SUM."""
    return _GatherRows.apply(x, balanced(batch, ranks.size), ranks)
