"""Whole steps, and evaluation, on the meta device: no host tensor enters, leaves or is made between first and last.

A copy between host and device breaks a CUDA graph's capture or is frozen into it, and on a CPU it looks like any other
operator. On the meta device every operand of a step must be meta. Over torch's fake process group the same steps show
the collectives of each rank: an order or a shape that differs hangs NCCL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.evaluation import EvaluationBatch
from mpl_scale.data.normalise import Normalise
from mpl_scale.mesh import build_mesh
from mpl_scale.spatial.agreement import ShapeAgreement
from mpl_scale.trainer.evaluation import count_right
from tests.support.dispatch import Collective, Collectives, HostTensors
from tests.support.steps import EVERY_STEP, Case, make_batches, make_state
from tests.support.tiers import full

META = torch.device("meta")
EFFICIENTNET = Case(network="test_efficientnet", size=32)
CASES = [
    *EVERY_STEP,
    *(Case(optimizer=name) for name in ("rmsprop", "lars", "adamw", "lamb", "muon")),
    *(replace(EFFICIENTNET, recompute=policy) for policy in ("none", "bn_act", "block")),
    Case(deferred=True),
    Case(micro_batches=2, deferred=True),
    Case(micro_batches=2, deferred=True, bf16=True),
    Case(method="uda", micro_batches=2),
    *(Case(method=method, skipping=True) for method in ("mpl", "supervised")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_host_tensor_takes_part_in_a_step(case: Case) -> None:
    mesh = build_mesh(device=META)
    step, state = make_state(case, mesh)
    batches = make_batches(case, mesh, 2)
    step(state, batches[0])
    with HostTensors() as seen:
        metrics = step(state, batches[1])
    assert not seen.found
    assert seen.operators > 100
    assert {value.device.type for value in metrics.values()} == {"meta"}


def test_nor_in_evaluation() -> None:
    mesh = build_mesh(device=META)
    _, state = make_state(EFFICIENTNET, mesh)
    assert state.student is not None
    images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=META)
    labels = torch.empty(4, dtype=torch.int64, device=META)
    normalise = Normalise(DataConfig(), device=META, dtype=torch.float32, channels_last=True)
    modules = {"student": state.student.module.eval()}
    with HostTensors() as seen:
        batch = EvaluationBatch(normalise(images), labels, torch.ones_like(labels, dtype=torch.bool))
        sums = count_right(modules, [batch, batch], device=META)
    assert not seen.found
    assert sums["student"].shape == (4,)


@pytest.mark.parametrize(
    "planted", [lambda x: x + torch.ones(3).to(META), lambda x: x[torch.tensor([0])], lambda x: torch.tensor(1.0)]
)
def test_the_mode_sees_a_planted_host_tensor(planted: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with HostTensors() as seen:
        planted(torch.zeros(3, device=META))
    assert seen.found


def collectives(case: Case, *, world: int, shard_size: int | None, width: int) -> list[list[Collective]]:
    """What each rank asks for in its second step."""
    recorded = []
    if dist.is_initialized():  # of a test before, in this process
        dist.destroy_process_group()
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            mesh = build_mesh(device=META, width=width, shard_size=shard_size)
            step, state = make_state(case, mesh)
            batches = make_batches(case, mesh, 2)
            step(state, batches[0])
            with Collectives() as seen, HostTensors() as host:
                step(state, batches[1])
        finally:
            dist.destroy_process_group()
        assert not host.found
        recorded.append(seen.calls)
    return recorded


def assert_matching(recorded: list[list[Collective]]) -> None:
    """No rank can wait for another in vain."""
    orders = [[(call.name, len(call.ranks), call.ranks[1] - call.ranks[0]) for call in calls] for calls in recorded]
    assert all(order == orders[0] for order in orders), "over groups of one kind, in one order"
    for rank, calls in enumerate(recorded):
        for number, call in enumerate(calls):
            assert rank in call.ranks
            for other in call.ranks:
                theirs = recorded[other][number]
                assert theirs.ranks == call.ranks
                if call.splits and call.splits[0]:  # rows received from each rank, rows sent to each
                    received, sent = call.splits[0], theirs.splits[1]
                    assert received[call.ranks.index(other)] == sent[call.ranks.index(rank)]
                else:
                    assert theirs.shapes == call.shapes


@pytest.mark.parametrize("case", [*EVERY_STEP, Case(skipping=True), Case(micro_batches=2, deferred=True)], ids=str)
def test_two_ranks_ask_for_the_same_collectives(case: Case) -> None:
    recorded = collectives(case, world=2, shard_size=None, width=1)
    assert_matching(recorded)
    assert len(recorded[0]) > 4


@pytest.mark.parametrize(
    ("world", "shard_size", "width"),
    [full(4, None, 1), (4, 2, 1), full(4, 1, 1), (2, None, 2), full(4, None, 2), (4, 2, 2)],
)
def test_ranks_of_every_mesh_ask_for_the_same_collectives(
    world: int, shard_size: int | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It reads shapes on the host, once for each: in the first step, which warms up.
    monkeypatch.setattr(ShapeAgreement, "__call__", lambda *_: None)
    case = Case(optimizer="rmsprop", size=16)
    recorded = collectives(case, world=world, shard_size=shard_size, width=width)
    assert_matching(recorded)
    used = {call.ranks for call in recorded[0]}
    wanted = {tuple(range(world))}
    if shard_size == 2:
        wanted |= {(0, 1), (0, 2)}  # shards, and replicas of the first
    if width == 2:
        wanted |= {(0, 1)}
    assert used == wanted


def test_a_planted_difference_is_seen() -> None:
    case = Case()
    recorded = collectives(case, world=2, shard_size=None, width=1)
    with pytest.raises(AssertionError):
        assert_matching([recorded[0], recorded[1][1:]])
    shapes = ((torch.float32, (3,)),)
    with pytest.raises(AssertionError):
        assert_matching([recorded[0], [recorded[1][0]._replace(shapes=shapes), *recorded[1][1:]]])
