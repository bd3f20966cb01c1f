"""Whole networks split by width equal unsplit ones in float64: logits, all gradients, batch-norm buffers, images.

Training mode with dropout and drop-path on. The gradients of parameters are averages over ALL ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from mpl_scale.engine.recompute import apply_recompute
from mpl_scale.mesh import build_mesh
from mpl_scale.models import Pass
from mpl_scale.spatial import parallelize, plan_layout
from mpl_scale.spatial.switch import stages
from mpl_scale.spatial.trace import trace
from tests.support.dispatch import HostReads
from tests.support.ranks import pool
from tests.support.spatial_networks import build, compare
from tests.support.tiers import full

EXACT = 1e-9
"""Relative, in float64: 1e-16 times what 80 batch norms enlarge it by (4e-11 seen, where a gradient cancels to 0)."""
DROP = {"dropout": 0.2, "drop_path": 0.2}


@pytest.mark.parametrize(
    ("name", "settings", "width", "image_size", "batch"),
    [
        full("tf_efficientnet_b0", DROP, 4, 128, 2),  # one column and a kernel of 5: two hops
        full("tf_efficientnet_b0", DROP, 3, 75, 2),  # uneven ones
        full("efficientnet_b0", DROP, 4, 64, 2),
        full("resnet50", DROP, 2, 64, 2),
        ("resnet18", DROP, 3, 75, 2),  # uneven ones
        ("wide_resnet28_2", {"dropout": 0.2}, 4, 32, 2),
        ("digits_cnn", {"dropout": 0.2}, 4, 8, 3),
        ("regnety_002", DROP, 4, 64, 2),
        ("convnext_atto", DROP, 4, 64, 2),
        ("mobilenetv4_conv_small", DROP, 2, 64, 2),  # batch norm behind the pool
        full("b6_wide_slim", {}, 4, 64, 2),
    ],
)
def test_split_network_is_the_unsplit_one(
    name: str, settings: dict[str, Any], width: int, image_size: int, batch: int
) -> None:
    found = pool(width).run(compare, name, settings, width, image_size, batch)[0]
    assert found.worst < EXACT, found
    assert found.bytes > 0


@pytest.mark.parametrize("how", [full({}), {"switch_at": "auto", "halo": "block_input"}], ids=str)
def test_two_data_by_two_width(how: dict[str, Any]) -> None:
    found = pool(4).run(compare, "tf_efficientnet_b0", DROP, 2, 64, 2, **how)[0]
    assert found.worst < EXACT, found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stage", ["features.0", "features.1", "features.2", "pool"])
def test_switch_at_every_stage(stage: str, batch: int) -> None:
    """On 2 x 2 and 1 x 4 ranks, also with fewer images than ranks."""
    for width in (2, 4):
        found = pool(4).run(compare, "digits_cnn", {"dropout": 0.2}, width, 8, batch, switch_at=stage, passes=2)[0]
        assert found.worst < EXACT, found


@pytest.mark.full
@pytest.mark.parametrize("stage", ["blocks.4", "conv_stem", "global_pool"])
def test_switch_inside_an_efficientnet(stage: str) -> None:
    """Batch 3 on 4 ranks: one rank is without images behind the switch, drop-path follows the rows."""
    found = pool(4).run(compare, "tf_efficientnet_b0", DROP, 4, 64, 3, switch_at=stage)[0]
    assert found.worst < EXACT, found


def test_block_input_halos_are_exact_and_traffic_is_that_of_the_layout() -> None:
    """Counted: every column that rank 0 sends, and in the backward pass the gradient of every column it received.

    64 columns over 4 ranks: behind the last stride some slices are empty.
    """
    sent = {}
    for halo in ("plain", "block_input"):
        found = pool(4).run(compare, "tf_efficientnet_b0", DROP, 4, 64, 2, halo=halo)[0]
        assert found.worst < EXACT, found
        layout = plan_layout(build("tf_efficientnet_b0", None), image_size=64, width=4, switch_at="never", halo=halo)
        messages = elements = 0
        for site in layout.sites.values():
            mine = [count for pair, count in site.split.messages().items() if 0 in pair]
            messages += len(mine)
            elements += sum(mine) * site.channels * site.height * 2
        assert found.messages == messages
        assert found.bytes == elements * 8
        sent[halo] = found.bytes
    assert sent["block_input"] < sent["plain"] / 3  # 1/6 but for the stem and the first stage, which do not expand


def test_switch_names_must_be_cut_points() -> None:
    model = build("resnet18", None)
    layout = plan_layout(model, image_size=64, width=4, switch_at="never")
    assert stages(model, layout) == [
        "conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4", "global_pool",
    ]  # fmt: skip
    assert plan_layout(model, image_size=64, width=4).switch == "layer3"  # 8 columns, 2 a rank
    with pytest.raises(ValueError, match="rows from behind switch_at"):
        trace(model, image_size=64, width=4, switch="layer2.0.conv2")
    assert model.training
    fresh = build("resnet18", None).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


def compare_recomputed(policy: str, switch_at: str) -> float:
    return compare(
        "digits_cnn",
        {"dropout": 0.2},
        2,
        8,
        3,
        switch_at=switch_at,
        passes=2,
        finish=partial(apply_recompute, policy=policy),
    ).worst


@pytest.mark.parametrize("policy", ["block", "bn_act"])
@pytest.mark.parametrize("switch_at", ["never", "features.1"])
def test_recomputed_blocks_exchange_again(policy: str, switch_at: str) -> None:
    """In the backward pass, on all ranks alike; behind the switch the repeated rows are the narrowed ones."""
    assert max(pool(4).run(compare_recomputed, policy, switch_at)) < EXACT


def host_reads(switch_at: str) -> int:
    mesh = build_mesh(device=torch.device("cpu"), width=2)
    model = build("digits_cnn", mesh.world_group, dropout=0.2)
    parallelize(model, mesh=mesh, image_size=8, switch_at=switch_at)
    x = torch.randn(3, 3, 8, 4, requires_grad=True)
    with HostReads() as counter, model.passes(Pass(seed=1, stream=0, step=torch.tensor(0), rows=torch.arange(3))):
        model(x).square().mean().backward()
    return sum(counter.seen.values())


@pytest.mark.parametrize("switch_at", ["never", "features.2"])
def test_no_exchange_waits_for_the_device(switch_at: str) -> None:
    """What a CUDA graph forbids; the counter is shown to count in test_capture_safety.py."""
    assert pool(2).run(host_reads, switch_at) == [0, 0]
