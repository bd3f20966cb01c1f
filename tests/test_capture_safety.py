"""The step reads no device value on the host: what a CUDA graph forbids, counted on the CPU.

A dispatch mode sees every operator the step runs; those that bring a value or a data-dependent shape to the host are
counted. The same counter must see a planted `.item()`, or it would prove nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpl_scale.config.schema import FeedbackConfig
from mpl_scale.mesh import build_mesh
from mpl_scale.mpl import METHODS, State
from tests.ranks import pool
from tests.reference import Settings, make_batches
from tests.sharded import make_network, make_state, rank_batch

HOST_READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2"}


class HostReads(TorchDispatchMode):
    """Counts operators that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in HOST_READS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def storages(state: State) -> set[int]:
    """Addresses of everything that lives from step to step."""
    assert state.student_average is not None
    tensors = [state.step, state.baseline.average, *state.student_average.shards]
    for network in (state.teacher, state.student):
        assert network is not None
        tensors += [*network.module.parameters(), *network.module.buffers(), *network.master]
        tensors += [p.grad for p in network.module.parameters() if p.grad is not None]
        tensors += [shard for shards in network.optimizer_state.values() for shard in shards]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def count_host_reads(method: str, rule: str) -> tuple[Counter[str], bool]:
    """Host reads of the third step, and whether the state stayed in the same memory since the first."""
    s, mesh = Settings(), build_mesh(device=torch.device("cpu"))
    networks = [make_network(seed, s, torch.float32, width, "flat", {}, mesh) for seed, width in ((1, 6), (2, 5))]
    state = make_state(s, *networks, mesh)
    labels = "soft" if rule == "soft_exact" else "sampled"
    feedback = FeedbackConfig(rule=rule)
    state.method = state.method.model_copy(update={"feedback": feedback, "pseudo_labels": labels})
    batch = rank_batch(make_batches(s, torch.float32)[0], mesh)
    step = METHODS[method].step
    step(state, batch)
    before = storages(state)
    step(state, batch)
    with HostReads() as counter:
        step(state, batch)
    return counter.seen, storages(state) == before


@pytest.mark.parametrize(
    ("method", "rule"),
    [("mpl", r) for r in ("cosine", "dot", "loss_difference", "none", "flipped", "per_sample", "soft_exact")]
    + [(m, "cosine") for m in ("supervised", "uda", "pseudo_label", "teacher_warmup")],
)
@pytest.mark.parametrize("world", [1, 2])
def test_step_never_waits_for_the_device(world: int, method: str, rule: str) -> None:
    results = pool(world).run(count_host_reads, method, rule) if world > 1 else [count_host_reads(method, rule)]
    for reads, in_place in results:
        assert not reads
        assert in_place


def test_the_counter_sees_a_planted_read() -> None:
    with HostReads() as counter:
        torch.ones(()).item()
        torch.ones(3).nonzero()
    assert counter.seen == {"_local_scalar_dense": 1, "nonzero": 1}
