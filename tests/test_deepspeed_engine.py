"""DeepSpeedNetwork under ZeRO 0-3 is plain PyTorch on the global batch, and its state can be moved out and in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mpl_scale.config.schema import OptimConfig
from mpl_scale.engine.deepspeed_engine import DeepSpeedNetwork
from mpl_scale.mesh import build_mesh
from tests.support.deepspeed_cases import (
    ACCUMULATE_FP32,
    ADAMW,
    CPU,
    RMSPROP,
    ROWS,
    SGD,
    Case,
    Net,
    Reference,
    distance,
    gather,
    gradient,
    local_rows,
    make_case,
    make_net,
    mpl_step,
)
from tests.support.ranks import pool
from tests.support.tiers import crossed, full

FP32_TOLERANCE = 1e-6
"""Sums over rows and ranks in another order: a few units of 2^-24 on values of order 1."""
BF16_TOLERANCE = 1e-2
"""Gradients are rounded to bf16 per rank and again as a sum, 2^-8 relative each: dot products, relative to the norms,
differ by up to 2 * 2^-8; weights by lr times that per unit of gradient. Largest seen: 5e-3, 1.6e-3 (momentum)."""


def compare_with_reference(case: Case) -> dict[str, float]:
    """On each rank: three MPL steps against the reference on the global batch; the largest differences."""
    mesh, teacher, student = make_case(case)
    references = [Reference(make_net(width, seed, case), case) for width, seed in ((5, 0), (3, 100))]
    dots, expected = [], []
    for step in range(3):
        dots.append(mpl_step(teacher, student, step=step, rows=local_rows(mesh), lr=case.optim.lr))
        expected.append(mpl_step(*references, step=step, rows=slice(None), lr=case.optim.lr))
    _, u_u, l_l = torch.stack(expected).T
    scale = torch.stack([(u_u * l_l).sqrt(), u_u, l_l], 1)
    differences = {"dots": float(((torch.stack(dots) - torch.stack(expected)) / scale).abs().max())}
    probe = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(9))
    for label, network, reference in zip(("teacher", "student"), (teacher, student), references, strict=True):
        differences[label] = distance(gather(network), reference.full())
        for name in network.optimizer_state:
            differences[f"{label} {name}"] = distance(gather(network, name), reference.full(name))
        with torch.no_grad():
            logits = network.forward(probe)
            differences[f"{label} logits"] = float((logits - reference.forward(probe)).abs().max())
        everyone: list[Any] = [None] * mesh.world
        dist.all_gather_object(everyone, ([shard.clone() for shard in network.master], logits))
        copies = everyone[mesh.shard_index :: mesh.shard_size]
        identical = all(torch.equal(a, b) for shards, _ in copies for a, b in zip(shards, copies[0][0], strict=True))
        differences[f"{label} replicas"] = float(not identical or any(not torch.equal(c[1], logits) for c in copies))
        assert network.module.mean.dtype == torch.float32
        assert next(network.module.parameters()).dtype == (torch.bfloat16 if case.bf16 else torch.float32)
        assert network.forward(probe).dtype == torch.float32
    return differences


def check(case: Case, world: int = 2) -> None:
    for differences in pool(world).run(compare_with_reference, case):
        tolerance = BF16_TOLERANCE if case.bf16 else FP32_TOLERANCE
        excess = {name: value for name, value in differences.items() if not value <= tolerance}
        assert not excess, (excess, tolerance)


STAGES, PRECISIONS = (0, 1, 2, 3), (False, True)


def label(value: Any) -> str:
    """Of a parameter, in a test's name."""
    if isinstance(value, bool):
        return "bf16" if value else "fp32"
    return value.name if isinstance(value, OptimConfig) else str(value)


@crossed(
    "bf16, stage", PRECISIONS, STAGES, quick=[*((False, stage) for stage in STAGES), (True, 1), (True, 3)], ids=label
)
def test_steps_equal_plain_pytorch(stage: int, bf16: bool) -> None:
    check(Case(stage, bf16))


@pytest.mark.parametrize("stage", [full(0), full(1), 2, 3])
def test_clipped_steps_equal_plain_pytorch(stage: int) -> None:
    check(Case(stage, clip=0.1))


@crossed(
    "optim, stage", (RMSPROP, ADAMW), STAGES, quick=[(RMSPROP, 1), (RMSPROP, 2), (ADAMW, 0), (ADAMW, 3)], ids=label
)
def test_other_optimisers_equal_plain_pytorch(stage: int, optim: OptimConfig) -> None:
    check(Case(stage, optim=optim))


@crossed("clip, bf16, stage", (0.0, 0.1), PRECISIONS, STAGES[1:], quick=[(0.1, True, 3)], ids=label)
def test_replicated_shards(stage: int, bf16: bool, clip: float) -> None:
    """4 ranks, 2 copies of the state, each over 2 ranks: equal to the reference, copies bitwise equal."""
    check(Case(stage, bf16, clip=clip, shard_size=2), world=4)


VARIANTS = {
    "unsharded-replicas": (Case(1, shard_size=1), 2),
    "bf16-optimizer": (Case(1, bf16=True, top=ACCUMULATE_FP32), 2),
    "bf16-optimizer-clipped-replicas": (Case(1, bf16=True, clip=0.1, shard_size=2, top=ACCUMULATE_FP32), 4),
    "compact-gradients": (Case(2, bf16=True, top=ACCUMULATE_FP32), 2),
    "stage-3-fp32-gradients": (Case(3, bf16=True, top=ACCUMULATE_FP32), 2),
    "fp32-communication": (Case(2, bf16=True, top={"communication_data_type": "fp32"}), 2),
    "persistent-parameters": (Case(3, zero={"stage3_param_persistence_threshold": 8}), 2),
    "sub-groups": (Case(3, zero={"sub_group_size": 50}), 2),
    "round-robin": (Case(2, zero={"round_robin_gradients": True}), 2),
    "aligned": (Case(1, zero={"parameter_alignment": True}), 2),
    "overlapped": (Case(2, zero={"overlap_comm": True}), 2),
    "scattered-gradients": (Case(2, zero={"contiguous_gradients": False}), 2),
    "all-reduce": (Case(3, zero={"reduce_scatter": False}), 2),
    "offload-1": (Case(1, clip=0.1, zero={"offload_optimizer": {"device": "cpu"}}), 2),
    "offload-2": (Case(2, zero={"offload_optimizer": {"device": "cpu"}}), 2),
    "offload-3": (Case(3, zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}), 2),
}
COMBINED = ("bf16-optimizer-clipped-replicas", "compact-gradients", "stage-3-fp32-gradients", "offload-1")
"""Options that others of these and the tests above have, one by one."""


@pytest.mark.parametrize("name", [full(name) if name in COMBINED else name for name in VARIANTS])
def test_deepspeed_options(name: str) -> None:
    check(*VARIANTS[name])


FROZEN = {
    "bf16-0": Case(0, bf16=True, frozen=True),
    "rmsprop-2": Case(2, optim=RMSPROP, frozen=True),
    "adamw-3": Case(3, optim=ADAMW, frozen=True),
    "bf16-optimizer": replace(VARIANTS["bf16-optimizer"][0], frozen=True),
    "offload-2": replace(VARIANTS["offload-2"][0], frozen=True),
    "offload-3": replace(VARIANTS["offload-3"][0], frozen=True),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_weights_stay(name: str) -> None:
    check(FROZEN[name])


def restore(
    network: DeepSpeedNetwork, saved: tuple[list, dict[str, list], *tuple[dict[str, torch.Tensor], ...]]
) -> None:
    """Write a copied state into an engine, as a checkpoint does."""
    master, state, buffers, counters = saved
    for name, counter in network.optimizer_counters.items():
        counter.copy_(counters[name])
    for live, copies in [(network.master, master), *((network.optimizer_state[name], state[name]) for name in state)]:
        for shard, values in zip(live, copies, strict=True):
            shard.copy_(values)
    for name, buffer in network.module.named_buffers():
        buffer.copy_(buffers[name])
    network.refresh_weights()


def resume(case: Case) -> bool:
    """On each rank: two steps, copy the state out, two more; these again from the copy, in used and fresh engines."""
    mesh, *networks = make_case(case)
    rows, lr = local_rows(mesh), case.optim.lr
    first = [mpl_step(*networks, step=step, rows=rows, lr=lr) for step in (0, 1)]
    saved = [
        (
            [shard.clone() for shard in network.master],
            {name: [shard.clone() for shard in shards] for name, shards in network.optimizer_state.items()},
            {name: buffer.clone() for name, buffer in network.module.named_buffers()},
            {name: counter.clone() for name, counter in network.optimizer_counters.items()},
        )
        for network in networks
    ]
    runs = []
    for engines in (networks, networks, make_case(case, seed=1000)[1:]):
        for network, copies in zip(engines, saved, strict=True):
            if runs:
                restore(network, copies)
        dots = [mpl_step(*engines, step=step, rows=rows, lr=lr) for step in (2, 3)]
        shards = [shard.clone() for network in engines for shard in network.master]
        runs.append([*first, *dots, *shards, *(network.module.mean.clone() for network in engines)])
    return all(torch.equal(a, b) for run in runs for a, b in zip(runs[0], run, strict=True))


@crossed(
    "optim, bf16, stage",
    (RMSPROP, ADAMW),
    PRECISIONS,
    STAGES,
    quick=[(RMSPROP, False, 1), (RMSPROP, True, 3), (ADAMW, False, 2), (ADAMW, True, 0)],
    ids=label,
)
def test_resume_is_bitwise(stage: int, bf16: bool, optim: OptimConfig) -> None:
    assert all(pool(2).run(resume, Case(stage, bf16, optim=optim)))


@pytest.mark.parametrize(
    "name", [full("bf16-optimizer"), full("persistent-parameters"), full("sub-groups"), "round-robin", "offload-3"]
)
def test_resume_is_bitwise_with_options(name: str) -> None:
    case, world = VARIANTS[name]
    assert all(pool(world).run(resume, case))


def two_forwards(case: Case) -> float:
    """On each rank: losses over two forward passes, the first discarded, one without a gradient for the norm."""
    mesh, network, _ = make_case(case)
    reference = Reference(Net(5, 0), case)
    images = torch.randn(2, ROWS, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for step, kept in enumerate((False, True, True, True, True)):
        for subject, rows in ((network, local_rows(mesh)), (reference, slice(None))):
            subject.module.use_norm = step != 3
            first, second = subject.forward(images[0, rows]), subject.forward(images[1, rows])
            gradient(subject, first.square().mean() + (2 + kept) * second.sin().mean())
            subject.apply(torch.tensor(0.1)) if kept else subject.discard()
    return distance(gather(network), reference.full())


@pytest.mark.parametrize("stage", [full(0), full(1), 2, 3])
def test_one_loss_over_two_forwards_and_unused_parameters(stage: int) -> None:
    assert max(pool(2).run(two_forwards, Case(stage))) <= FP32_TOLERANCE


def skip_non_finite(case: Case) -> float:
    """On each rank: a step, an update by a gradient with a NaN on one rank, a step."""
    mesh, network, _ = make_case(case)
    reference = Reference(Net(5, 0), case)
    images = torch.randn(ROWS, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, torch.nan, 1.0):
        for subject, rows in ((network, local_rows(mesh)), (reference, slice(None))):
            loss = subject.forward(images[rows]).square().mean()
            if factor == factor:
                gradient(subject, loss)
                subject.apply(torch.tensor(0.1))
            elif subject is network:
                gradient(subject, loss * (factor if mesh.rank == 1 else 1.0))
                subject.apply(torch.tensor(0.1))
    return distance(gather(network), reference.full())


@pytest.mark.parametrize("stage", [1, full(2), 3])
def test_non_finite_gradients_are_skipped(stage: int) -> None:
    assert max(pool(2).run(skip_non_finite, Case(stage))) <= FP32_TOLERANCE


def bf16_starts_unrounded(stage: int) -> float:
    """On each rank: how far masters and optimiser state of a new engine are from their definition."""
    _, network, _ = make_case(Case(stage, bf16=True, optim=RMSPROP))
    expected = {name: p.detach().flatten() for name, p in Net(5, 0).named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in expected.items()}
    zeros = {name: torch.zeros_like(p) for name, p in expected.items()}
    return max(
        distance(gather(network), expected),
        distance(gather(network, "square_average"), ones),
        distance(gather(network, "momentum"), zeros),
    )


@pytest.mark.parametrize("stage", [full(0), 1, full(2), 3])
def test_bf16_starts_unrounded(stage: int) -> None:
    assert max(pool(2).run(bf16_starts_unrounded, stage)) == 0


def test_single_process_needs_no_launcher() -> None:
    network = DeepSpeedNetwork(Net(5, 0), optim=SGD, ds_config=Case(2).ds_config(), mesh=build_mesh(device=CPU))
    gradient(network, network.forward(torch.randn(2, 3, 6, 6)).square().mean())
    network.apply(torch.tensor(0.1))
    assert network.owns_shard
    assert network.dot_group is None
