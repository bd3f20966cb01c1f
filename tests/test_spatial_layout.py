"""The integer layout of the width partition: ranks that exchange as it says compute the whole layer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mpl_scale.spatial import input_columns, partition_table
from mpl_scale.spatial.layout import (
    Bounds,
    Window,
    balanced,
    crop,
    derived,
    halo,
    hops,
    messages,
    route,
    same_padding,
    shares,
    slices,
)


def exchange(parts: list[np.ndarray], bounds: Bounds, window: Window, outputs: Bounds) -> list[np.ndarray]:
    """What every rank holds after the exchange, by passing slices along the routes."""
    reads = shares(window, inputs=bounds, outputs=outputs)
    routes = [route(bounds, reads, rank) for rank in range(len(parts))]
    found = []
    for rank, mine in enumerate(routes):
        real = np.full(mine.reads, np.nan)
        real[slice(*mine.keep_to)] = parts[rank][slice(*mine.keep_from)]
        for source, (start, stop) in enumerate(mine.receives):
            low, high = routes[source].sends[rank]
            assert high - low == stop - start, "a message of two lengths"
            real[start:stop] = parts[source][low:high]
        assert not np.isnan(real).any(), "a column that nobody sent"
        found.append(np.concatenate([np.zeros(mine.pad_left), real, np.zeros(mine.pad_right)]))
    return found


def convolve(padded: np.ndarray, window: Window) -> np.ndarray:
    taps = 1.0 + np.arange(window.kernel)
    starts = range(0, len(padded) - window.extent + 1, window.stride)
    return np.array([padded[start : start + window.extent : window.dilation] @ taps for start in starts])


def check(columns: int, shards: int, windows: list[Window]) -> None:
    """A chain of layers over ranks equals the chain over the whole width."""
    bounds = balanced(columns, shards)
    whole = np.arange(1.0, columns + 1) ** 2
    parts = [whole[a:b] for a, b in slices(bounds)]
    for window in windows:
        count = window.outputs(len(whole))
        if count < 1:
            return
        outputs = derived(bounds, stride=window.stride, columns=count)
        assert outputs[0] == 0
        assert outputs[-1] == count
        assert all(a <= b for a, b in itertools.pairwise(outputs))
        padded = np.concatenate([np.zeros(window.pad_left), whole, np.zeros(window.pad_right)])
        whole = convolve(padded, window)[:count]
        received = exchange(parts, bounds, window, outputs)
        parts = [convolve(mine, window)[: b - a] for mine, (a, b) in zip(received, slices(outputs), strict=True)]
        assert [len(part) for part in parts] == [b - a for a, b in slices(outputs)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        bounds = outputs


geometry = st.builds(
    Window,
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    pad_left=st.integers(0, 9),
    pad_right=st.integers(0, 9),
)


@settings(max_examples=400, deadline=None)
@given(columns=st.integers(1, 70), shards=st.integers(1, 17), windows=st.lists(geometry, min_size=1, max_size=4))
def test_any_chain_of_windows_over_ranks_is_the_whole_one(columns: int, shards: int, windows: list[Window]) -> None:
    check(columns, shards, windows)


def test_every_small_geometry() -> None:
    """Exhaustive: widths to 9, ranks to 5 (empty slices included), kernels to 5, strides to 3, SAME and symmetric."""
    for columns, shards, kernel, stride, dilation in itertools.product(
        range(1, 10), range(1, 6), range(1, 6), range(1, 4), (1, 2)
    ):
        half = dilation * (kernel - 1) // 2
        for pads in (same_padding(columns, kernel=kernel, stride=stride, dilation=dilation), (half, half), (0, 0)):
            check(columns, shards, [Window(kernel, stride, dilation, *pads)])


@settings(max_examples=200, deadline=None)
@given(columns=st.integers(1, 300), shards=st.integers(1, 40), strides=st.lists(st.integers(1, 3), max_size=7))
def test_halos_stay_below_the_extent_behind_any_strides(columns: int, shards: int, strides: list[int]) -> None:
    """Derived ownership does not drift: no rank ever reads more than the window's extent - 1 columns of others'."""
    bounds = balanced(columns, shards)
    for stride in strides:
        width = bounds[-1]
        window = Window(3, stride, 1, *same_padding(width, kernel=3, stride=stride))
        outputs = derived(bounds, stride=stride, columns=window.outputs(width))
        left, right = halo(bounds, shares(window, inputs=bounds, outputs=outputs))
        assert left <= window.pad_left
        assert right <= window.extent - 1 - window.pad_left + stride - 1
        bounds = outputs


@settings(max_examples=200, deadline=None)
@given(
    columns=st.integers(1, 40),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    ceil=st.booleans(),
)
def test_output_counts_are_torchs(columns: int, kernel: int, stride: int, dilation: int, ceil: bool) -> None:
    pad = kernel // 2
    window = Window(kernel, stride, dilation, pad, pad, ceil)
    if window.outputs(columns) < 1 or columns + 2 * pad < window.extent:
        return
    x = torch.zeros(1, 1, 1, columns)
    expected = F.max_pool2d(x, (1, kernel), (1, stride), (0, pad), (1, dilation), ceil).shape[3]
    assert window.outputs(columns) == expected


def test_crop_reads_what_is_held() -> None:
    reads = shares(Window(5, 1, 1, 2, 2), inputs=balanced(9, 3), outputs=balanced(9, 3))
    mine = crop(reads[1], reads[1])
    assert (mine.own, mine.reads, mine.keep_from, mine.silent) == (7, 7, (0, 7), True)


def test_hops_and_messages() -> None:
    """One column per rank and a kernel of 5: two neighbours on either side."""
    bounds = balanced(6, 6)
    reads = shares(Window(5, 1, 1, 2, 2), inputs=bounds, outputs=bounds)
    assert halo(bounds, reads) == (2, 2)
    assert hops(bounds, reads) == 2
    assert len(messages(bounds, reads)) == 2 * (5 + 4)
    assert all(count == 1 for count in messages(bounds, reads).values())


def test_input_columns() -> None:
    assert input_columns(10, 4) == [(0, 3), (3, 6), (6, 8), (8, 10)]
    with pytest.raises(ValueError, match="width = 16, but images have 8 columns; use at most 8"):
        input_columns(8, 16)


def test_l2_at_512_over_16() -> None:
    """Every number of DESIGN 5's table, and the bytes that its settings save."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_l2", num_classes=1000)
    from mpl_scale.models.layers import convert
    from mpl_scale.models.passes import Passes

    model = convert(model, passes=Passes(), group=None)
    plain, block_input, switched = (
        partition_table(model, image_size=512, width=16, **how)
        for how in ({}, {"halo": "block_input"}, {"switch_at": "auto"})
    )
    rows = {row.stage: (row.columns, row.local, dict(row.windows), row.hops) for row in plain.rows}
    assert rows == {
        "conv_stem": ((512, 256), (32, 16), {"3/2": 1}, 1),
        "blocks.0": ((256,), (16,), {"3/1": 6}, 1),
        "blocks.1": ((256, 128), (16, 8), {"3/2": 1, "3/1": 10}, 1),
        "blocks.2": ((128, 64), (8, 4), {"5/2": 1, "5/1": 10}, 1),
        "blocks.3": ((64, 32), (4, 2), {"3/2": 1, "3/1": 15}, 1),
        "blocks.4": ((32,), (2,), {"5/1": 16}, 1),
        "blocks.5": ((32, 16), (2, 1), {"5/2": 1, "5/1": 21}, 2),
        "blocks.6": ((16,), (1,), {"3/1": 6}, 1),
    }
    assert {row.halo for row in plain.rows} == {(0, 1), (1, 1), (2, 2)}
    assert plain.exchanges == 177
    assert plain.bytes == 84_595_712
    assert block_input.bytes < plain.bytes / 4
    assert switched.switch == "blocks.4"
    assert switched.bytes < 0.34 * plain.bytes
