"""Split layers with a window: convolutions (dense, grouped, depthwise, dilated, SAME), pools and blur pools."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mpl_scale.spatial.layout import Bounds, Window, derived, same_padding, shares, slices
from mpl_scale.spatial.rules import Split, SplitLayer, partition_rule


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _split(window: Window, inputs: Bounds) -> Split:
    """The split of any layer with that window along the width."""
    columns = window.outputs(inputs[-1])
    if columns < 1:
        raise ValueError(f"its kernel of {window.extent} columns is wider than the padded input of {inputs[-1]}")
    outputs = derived(inputs, stride=window.stride, columns=columns)
    return Split(inputs, outputs, shares(window, inputs=inputs, outputs=outputs), window=window)


def _unchanged(split: Split) -> bool:
    """Whether every rank reads exactly its own columns and computes as many."""
    own = slices(split.inputs)
    return (
        split.reads is not None
        and split.held is None
        and all(
            (share.start, share.stop, share.pad_left, share.pad_right) == (*held, 0, 0) and held[0] < held[1]
            for held, share in zip(own, split.reads, strict=True)
        )
    )


class _Windowed(SplitLayer):
    """A layer whose `window(module, axis, size)` is its geometry along height (0) and width (1)."""

    same = False

    @classmethod
    def window(cls, module: Any, axis: int, size: int) -> Window:
        """The window along one axis of an input of `size` rows or columns (of the whole image)."""
        kernel, stride = _pair(module.kernel_size)[axis], _pair(module.stride)[axis]
        dilation = _pair(getattr(module, "dilation", 1))[axis]
        if cls.same:
            pads = same_padding(size, kernel=kernel, stride=stride, dilation=dilation)
        elif isinstance(module.padding, str):  # torch's own "same" (stride 1) and "valid"
            total = dilation * (kernel - 1) if module.padding == "same" else 0
            pads = (total // 2, total - total // 2)
        else:
            pads = (_pair(module.padding)[axis],) * 2
        return Window(kernel, stride, dilation, *pads, ceil=getattr(module, "ceil_mode", False))

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        return _split(cls.window(module, 1, inputs[-1]), inputs)

    def rows(self, x: torch.Tensor) -> Window:
        """The window along the height of x [B, C, H, *]."""
        return self.window(self, 0, x.shape[2])


@partition_rule("torch.nn.modules.conv.Conv2d")
class SplitConv2d(_Windowed, nn.Conv2d):
    """Any zero-padded convolution: the width is padded by the exchange, the height as ever."""

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        if module.padding_mode != "zeros":
            raise ValueError(f"padding_mode = {module.padding_mode!r} has no partition rule, only 'zeros'")
        return super().plan(module, inputs)

    @classmethod
    def needed(cls, module: Any, split: Split) -> bool:
        return not _unchanged(split) or cls.window(module, 1, split.columns).kernel > 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> [B, C_out, H_out, own outputs]."""
        rows = self.rows(x)
        x = self.read(x)
        top = rows.pad_left
        if top != rows.pad_right:
            x, top = F.pad(x, (0, 0, top, rows.pad_right)), 0
        return self.trim(F.conv2d(x, self.weight, self.bias, self.stride, (top, 0), self.dilation, self.groups))


@partition_rule("timm.layers.conv2d_same.Conv2dSame")
class SplitConv2dSame(SplitConv2d):
    """TensorFlow's SAME padding, from the whole width (timm's own reads the local shape)."""

    same = True


@partition_rule("torch.nn.modules.pooling.MaxPool2d")
class SplitMaxPool2d(_Windowed, nn.MaxPool2d):
    """Padding is -inf, whether the layer's own, of an edge, or ceil_mode's overhang."""

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        if module.return_indices:
            raise ValueError("return_indices = True has no partition rule: indices would count local columns")
        return super().plan(module, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> [B, C, H_out, own outputs]."""
        rows = self.rows(x)
        x, (top, bottom) = self.read(x, fill=-torch.inf), _vertical(rows, x.shape[2])
        padding = top if top == bottom and 2 * top <= rows.kernel else 0
        if padding != top or top != bottom:
            x = F.pad(x, (0, 0, top, bottom), value=-torch.inf)
        return self.trim(F.max_pool2d(x, self.kernel_size, self.stride, (padding, 0), self.dilation))


@partition_rule("timm.layers.pool2d_same.MaxPool2dSame")
class SplitMaxPool2dSame(SplitMaxPool2d):
    """The pool with SAME padding."""

    same = True


def _vertical(rows: Window, height: int) -> tuple[int, int]:
    """Padding above and below that makes the windows over the height fit exactly, ceil_mode's overhang included."""
    needed = (rows.outputs(height) - 1) * rows.stride + rows.extent - height - rows.pad_left
    return rows.pad_left, max(needed, 0)


def _counts(window: Window, size: int, start: int, stop: int, *, padded: bool, like: torch.Tensor) -> torch.Tensor:
    """How many elements each output in [start, stop) of an average pool divides by, along one axis; on the device."""
    begin = torch.arange(start, stop, device=like.device) * window.stride - window.pad_left
    low, high = (-window.pad_left, size + window.pad_right) if padded else (0, size)
    return ((begin + window.kernel).clamp(max=high) - begin.clamp(min=low)).to(like.dtype)


@partition_rule("torch.nn.modules.pooling.AvgPool2d")
class SplitAvgPool2d(_Windowed, nn.AvgPool2d):
    """Sums of windows over explicit zeros, divided by the counts of the unsplit layer."""

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        if module.divisor_override is not None:
            raise ValueError("divisor_override has no partition rule")
        return super().plan(module, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> [B, C, H_out, own outputs]."""
        rows, columns, height = self.rows(x), self.window(self, 1, self.split.columns), x.shape[2]
        x = F.pad(self.read(x), (0, 0, *_vertical(rows, height)))
        y = self.trim(F.avg_pool2d(x, self.kernel_size, self.stride, divisor_override=1))
        assert self.split.outputs is not None
        padded = self.same or self.count_include_pad  # timm pads SAME outside the pool, which then counts zeros
        own = slices(self.split.outputs)[self.ranks.rank]
        across = _counts(columns, self.split.columns, *own, padded=padded, like=y)
        down = _counts(rows, height, 0, y.shape[2], padded=padded, like=y)
        return y / (down[:, None] * across)


@partition_rule("timm.layers.pool2d_same.AvgPool2dSame")
class SplitAvgPool2dSame(SplitAvgPool2d):
    """The pool with SAME padding."""

    same = True


@partition_rule("timm.layers.blur_pool.BlurPool2d")
class SplitBlurPool2d(_Windowed):
    """Binomial blur; at an edge the window holds the columns it reflects, so local reflection is the global one."""

    @classmethod
    def window(cls, module: Any, axis: int, size: int) -> Window:
        padding = module.padding[0] if isinstance(module.padding, list) else module.padding
        if isinstance(padding, list | tuple):
            padding = padding[0]
        return Window(module.filt_size, module.stride, 1, padding, padding)

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        window = cls.window(module, 1, inputs[-1])
        if module.pad_mode not in ("reflect", "constant") or 2 * window.pad_left > window.kernel - 1:
            raise ValueError(f"pad_mode = {module.pad_mode!r} with padding {window.pad_left} has no partition rule")
        return super().plan(module, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> [B, C, H_out, own outputs]."""
        layer: Any = self
        assert self.route is not None
        rows, (left, right) = self.rows(x), (self.route.pad_left, self.route.pad_right)
        x = self.read(x)
        if layer.pad_mode == "reflect" and self.route.reads:
            x = x.narrow(3, left, self.route.reads)
            x = F.pad(x, (left, right, rows.pad_left, rows.pad_right), mode="reflect")
        else:
            x = F.pad(x, (0, 0, rows.pad_left, rows.pad_right))
        weight = layer.filt.expand(x.shape[1], 1, rows.kernel, rows.kernel)
        return self.trim(F.conv2d(x, weight, stride=rows.stride, groups=x.shape[1]))


@partition_rule("torch.nn.modules.upsampling.Upsample")
class SplitUpsample(SplitLayer, nn.Upsample):
    """Nearest-neighbour upsampling by a whole factor: every column becomes `factor` columns of the same rank."""

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        factor = module.scale_factor
        if module.mode != "nearest" or not isinstance(factor, int | float) or factor != int(factor):
            raise ValueError(
                f"mode = {module.mode!r}, scale_factor = {factor} has no partition rule, only whole nearest"
            )
        return Split(inputs, tuple(bound * int(factor) for bound in inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> [B, C, H factor, own factor]."""
        return x.repeat_interleave(int(self.scale_factor), 2).repeat_interleave(int(self.scale_factor), 3)  # type: ignore[arg-type]
