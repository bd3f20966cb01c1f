"""Every partition rule: a layer over 4 ranks, on uneven and empty slices, is the layer on whole images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mpl_scale.mesh import build_mesh
from mpl_scale.models.layers import convert
from mpl_scale.models.passes import Passes
from mpl_scale.spatial import SplitLayer, compare_partitioned, parallelize, partition_rule, plan_layout, traffic
from mpl_scale.spatial.halo import WidthGroup, exchange, gather_rows, to_rows
from mpl_scale.spatial.layout import Window, balanced, derived, route, same_padding, shares, slices
from mpl_scale.spatial.rules import RULES, class_name
from tests.support.ranks import pool
from tests.support.spatial_networks import LAYERS, build, compare_layer, layer_network

EXACT = 1e-9
"""Relative, in float64: roundings of 1e-16 that a dozen layers and gradients near zero enlarge."""


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layer_over_ranks_is_the_whole_layer(name: str) -> None:
    """13 columns: slices of 4, 3, 3, 3. 6: two ranks have one column, and none behind a stride."""
    for found in pool(4).run(compare_layer, name, 4, [13, 6], passes=2)[0]:
        assert found.worst < EXACT, found


@pytest.mark.parametrize("name", ["inverted_residual", "inverted_residual/2"])
def test_block_input_halos_are_exact_and_send_a_quarter(name: str) -> None:
    """Channels 8 instead of 32. Strides and empty slices included; the other exchanges stay as they are."""
    plain, block_input = (
        pool(4).run(compare_layer, name, 4, [13, 6], halo=halo)[0] for halo in ("plain", "block_input")
    )
    for before, after in zip(plain, block_input, strict=True):
        assert after.worst < EXACT
        assert after.messages == before.messages
        assert after.bytes < before.bytes


def test_every_rule_is_tested() -> None:
    tested = {class_name(module) for name in LAYERS for module in layer_network(name, None).modules()}
    assert not set(RULES) - tested


def refusal(network: nn.Module, **how: object) -> str:
    passes = Passes()
    network.passes = passes
    with pytest.raises(ValueError, match=r"\S") as caught:
        plan_layout(convert(network, passes=passes, group=None), **{"image_size": 16, "width": 4, **how})
    return str(caught.value)


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class FunctionalMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


class Cycle(nn.Conv2d):
    """A subclass may compute anything."""


@pytest.mark.parametrize(
    ("network", "parts"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), Odd()), ["1: tests.test_spatial_layers.Odd", "partition_rule"]),
        (nn.Sequential(FunctionalMean()), ["0 (tests", "FunctionalMean): calls `mean`", "@partition_rule"]),
        (nn.Sequential(Cycle(3, 4, 3)), ["0: tests.test_spatial_layers.Cycle has no partition rule"]),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
            ["0: torch", "padding_mode = 'reflect'"],
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), ["1: torch.nn.modules.flatten.Flatten has no"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), ["output is still split by width"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear")), ["mode = 'bilinear'"]),
        (nn.Sequential(nn.Conv2d(3, 4, 17)), ["0: torch", "wider than the padded input of 16"]),
    ],
)
def test_what_cannot_be_split_is_refused_by_path(network: nn.Module, parts: list[str]) -> None:
    message = refusal(network)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_settings_are_refused() -> None:
    assert "width = 17, but images have 16 columns" in refusal(build("digits_cnn", None), width=17)
    assert "one of features.0, features.1, features.2, pool" in refusal(build("digits_cnn", None), switch_at="layer9")
    assert "use plain or block_input" in refusal(build("digits_cnn", None), halo="wide")


def test_a_rule_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        partition_rule("torch.nn.modules.conv.Conv2d")(SplitLayer)


def wrong_slice() -> str:
    mesh = build_mesh(device=torch.device("cpu"), width=2)
    model = build("digits_cnn", mesh.world_group)
    parallelize(model, mesh=mesh, image_size=8)
    with pytest.raises(ValueError, match="columns") as caught:
        model(torch.zeros(1, 3, 8, 5))
    with pytest.raises(ValueError, match="split already"):
        parallelize(model, mesh=mesh, image_size=8)
    with pytest.raises(ValueError, match=r"features\.0\.1: batch norm without a group"):
        parallelize(build("digits_cnn", None), mesh=mesh, image_size=8)
    return str(caught.value)


def test_a_slice_of_the_wrong_width_is_refused_before_any_rank_waits() -> None:
    first, second = pool(2).run(wrong_slice)
    assert first == second
    assert "rank 0 and 1 of the width group: not the expected slice" in first
    assert "columns by rank are [4, 4]" in first


def formats_and_dtypes() -> bool:
    """The exchange and the switch keep memory format and dtype, forward and backward; bytes are counted."""
    mesh = build_mesh(device=torch.device("cpu"), width=4)
    ranks = WidthGroup(mesh.width_group, rank=mesh.width_index, size=4)
    bounds = balanced(9, 4)
    window = Window(5, 2, 1, *same_padding(9, kernel=5, stride=2))
    reads = shares(window, inputs=bounds, outputs=derived(bounds, stride=2, columns=5))
    whole = torch.arange(2 * 3 * 4 * 9).view(2, 3, 4, 9)
    start, stop = slices(bounds)[ranks.rank]
    for dtype in (torch.bfloat16, torch.float32):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = whole[..., start:stop].to(dtype).contiguous(memory_format=memory_format).requires_grad_()
            mine = route(bounds, reads, ranks.rank)
            y = exchange(x, route=mine, ranks=ranks)
            share = reads[ranks.rank]
            real = y[..., mine.pad_left : mine.pad_left + mine.reads]
            assert torch.equal(real, whole[..., share.start : share.stop].to(dtype))
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=memory_format)
            y.sum().backward()
            times = torch.tensor([sum(s.start <= c < s.stop for s in reads) for c in range(start, stop)])
            assert torch.equal(x.grad, times.expand_as(x).to(dtype))
            assert x.grad.is_contiguous(memory_format=memory_format)
            rows = to_rows(x, columns=bounds, ranks=ranks)
            low, high = slices(balanced(2, 4))[ranks.rank]
            assert torch.equal(rows, whole[low:high].to(dtype))
            assert torch.equal(gather_rows(rows, batch=2, ranks=ranks), whole.to(dtype))
    return True


def test_exchange_keeps_memory_format_and_dtype() -> None:
    assert all(pool(4).run(formats_and_dtypes))


def copies_and_checkpoints() -> bool:
    """A copy of a split model runs; state moves between split and unsplit; a width of one changes nothing."""
    mesh = build_mesh(device=torch.device("cpu"), width=2)
    split = parallelize(build("digits_cnn", None).eval(), mesh=build_mesh(device=mesh.device), image_size=8)
    assert not any(isinstance(module, SplitLayer) for module in split.modules())
    plain = build("digits_cnn", mesh.world_group).eval()
    split = parallelize(build("digits_cnn", mesh.world_group).eval(), mesh=mesh, image_size=8)
    split.load_state_dict({name: value + 0.125 for name, value in plain.state_dict().items()})
    plain.load_state_dict(split.state_dict())
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    columns = slice(*slices(balanced(8, 2))[mesh.width_index])
    with torch.no_grad():
        torch.testing.assert_close(split(x[..., columns]), plain(x))
        assert traffic(split).messages > 0
        kept = [module for module in split.modules() if isinstance(module, SplitLayer)]
        assert copy.copy(kept[0]).ranks is copy.deepcopy(kept[0].ranks)
    return True


def test_state_moves_freely_and_evaluation_agrees() -> None:
    assert all(pool(2).run(copies_and_checkpoints))


class Scaled(nn.Module):
    """A network with a factor that its split and unsplit builds do not share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.conv(x) * self.scale)

    scale = 1.0


def wrong_split_is_seen() -> float:
    mesh = build_mesh(device=torch.device("cpu"), width=2)

    def make(group: object) -> nn.Module:
        network = Scaled()
        torch.nn.init.constant_(network.conv.weight, 0.1)
        torch.nn.init.constant_(network.conv.bias, 0.1)
        network.scale = 1.0 if group is None else 1.001
        network.passes = Passes()
        return network

    return compare_partitioned(make, mesh=mesh, image_size=6, batch=2).worst


def test_the_comparison_sees_a_difference() -> None:
    assert min(pool(2).run(wrong_split_is_seen)) > 1e-4
