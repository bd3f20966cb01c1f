"""Static bytes per rank: the closed form against every storage that live engines hold, on 1, 2 and 4 real ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpl_scale.config.schema import OptimConfig
from mpl_scale.engine import build_network
from mpl_scale.mesh import build_mesh
from mpl_scale.models import Passes
from mpl_scale.models.layers import convert
from mpl_scale.mpl import MovingAverage
from mpl_scale.planner import EngineSettings, TrainedNetwork, reachable_bytes, static_bytes
from tests.support.ranks import pool
from tests.support.tiers import full

LAYOUTS = [
    ("flat", 0),
    ("flat", 1),
    ("flat", 2),
    ("deepspeed", 0),
    ("deepspeed", 1),
    ("deepspeed", 2),
    ("deepspeed", 3),
]
BUCKET = 20_000


def network_of_many_small_layers() -> nn.Module:
    """224,000 parameters: padding, and one layer that lies on two shards, are below 1% of the state."""
    layers = [layer for _ in range(24) for layer in (nn.Linear(96, 96), nn.BatchNorm1d(96), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(96, 10))


def measured_and_expected(engine: str, stage: int, bf16: bool, optimizer: str, clip: float) -> tuple[int, int]:
    shard_size = 1 if engine == "flat" and stage == 0 else None
    mesh = build_mesh(device=torch.device("cpu"), shard_size=shard_size)
    torch.manual_seed(0)
    module = convert(network_of_many_small_layers(), passes=Passes(), group=mesh.world_group)
    module.passes = Passes()
    parameters, buffers = sum(p.numel() for p in module.parameters()), sum(b.numel() for b in module.buffers())
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    ds_config = {"zero_optimization": zero, "gradient_clipping": clip, "bf16": {"enabled": bf16}}
    network = build_network(
        module, engine=engine, optim=OptimConfig(name=optimizer, lr=0.1), ds_config=ds_config, mesh=mesh
    )
    average = MovingAverage(network, decay=0.9)
    held = {}
    for name in ("g_u", "g_l") * 2:  # two steps: what the first one allocates is there
        logits = network.forward(torch.randn(4, 96))
        network.accumulate(F.cross_entropy(logits, torch.arange(4)))
        held[name] = network.reduce()
        del logits
        if name == "g_u":
            network.apply(torch.tensor(0.01))
    found = reachable_bytes([network, average, held])
    network.discard()
    if engine == "deepspeed":
        network._engine.destroy()  # type: ignore[attr-defined]
    dtype = torch.bfloat16 if bf16 else torch.float32
    expected = static_bytes(
        TrainedNetwork(parameters, buffers, dtype=dtype, optimizer=optimizer, ema=True),
        EngineSettings(engine, stage, mesh.shard_size, clipping=clip > 0, reduce_bucket=BUCKET),  # type: ignore[arg-type]
    )
    return found, sum(expected.values())


def every_layout(bf16: bool, optimizer: str, clip: float) -> dict[tuple[str, int], tuple[int, int]]:
    return {layout: measured_and_expected(*layout, bf16, optimizer, clip) for layout in LAYOUTS}


@pytest.mark.parametrize(
    ("ranks", "bf16", "optimizer", "clip"),
    [
        (1, False, "rmsprop", 0.0),
        full(2, False, "sgd", 1.0),
        full(2, True, "rmsprop", 0.0),
        full(4, True, "sgd", 0.0),
        full(2, True, "adamw", 1.0),
    ],
)
def test_the_closed_form_is_what_the_engines_hold(ranks: int, bf16: bool, optimizer: str, clip: float) -> None:
    """Within 2%: shards are padded, and DeepSpeed keeps a layer on two shards whole."""
    for rank, layouts in enumerate(pool(ranks).run(every_layout, bf16, optimizer, clip)):
        for layout, (found, expected) in layouts.items():
            assert found == pytest.approx(expected, rel=0.02), (layout, rank)


def test_the_census_follows_closures_containers_and_attributes_and_counts_a_storage_once() -> None:
    base = torch.zeros(100)
    other = torch.zeros(7, dtype=torch.float64)

    class Holder:
        def __init__(self) -> None:
            self.items = {"a": [base[:10]], "b": (base,)}

    def function() -> torch.Tensor:
        return other

    holder = Holder()
    assert reachable_bytes([holder]) == 400
    assert reachable_bytes([holder, function]) == 400 + 56
    holder.items["c"] = nn.Linear(3, 3, bias=False)  # type: ignore[assignment]
    holder.items["c"].weight.grad = torch.zeros(3, 3)  # type: ignore[attr-defined]
    assert reachable_bytes([holder]) == 400 + 36 + 36


def test_what_no_engine_has_is_refused() -> None:
    network = TrainedNetwork(10, 0, dtype=torch.float32, optimizer="sgd", ema=False)
    with pytest.raises(ValueError, match="stage = 3 with engine flat"):
        static_bytes(network, EngineSettings("flat", stage=3, shard_size=2))
    with pytest.raises(ValueError, match="sgd"):
        static_bytes(replace(network, optimizer="sgdd"), EngineSettings("flat", stage=1, shard_size=2))
