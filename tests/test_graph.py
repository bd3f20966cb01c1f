"""The step runner: slots, warm-up, capture, replay, and captures that fail.

Each test of a capture has two forms. On a GPU it records a CUDA graph. On a CPU it records operators with their tensors
and runs these again (tests/support/dispatch.py): Python runs once and addresses are fixed, as in a graph, so a step
that hides a changing value in Python, or reads one, shows there.
"""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpl_scale.config.readers import EXACT_RULES
from mpl_scale.config.schema import CheckpointConfig
from mpl_scale.engine.graph import WARMUP_STEPS, CudaGraphs, Graphs, StepRunner, why_not_captured
from mpl_scale.mesh import build_mesh
from mpl_scale.mpl import State
from mpl_scale.mpl.methods import Step
from mpl_scale.trainer.phases import collect_weights
from mpl_scale.trainer.snapshots import Snapshots
from mpl_scale.types import Batch, StepMetrics
from tests.support.dispatch import CpuGraphs
from tests.support.ranks import pool
from tests.support.steps import CPU, EVERY_STEP, Case, everything, make_batches, make_state, on_each_device
from tests.support.tiers import full

PHASE: Any = SimpleNamespace(name="train")
STEPS = 7
"""Three of them warm up, the fourth captures."""


def graphs_of(device: torch.device) -> Graphs:
    return CudaGraphs() if device.type == "cuda" else CpuGraphs()


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], *, rule: str = "cosine") -> None:
    """Bitwise on a CPU. On a GPU cuDNN may choose other algorithms under capture: float32 rounding over the steps.

    So on a CPU where the rule takes forward-mode derivatives, whose zeros the recorded operators multiply in full.
    """
    for one, other in zip(found, expected, strict=True):
        if one.is_cuda or (rule in EXACT_RULES and one.is_floating_point()):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(one, other)


def run_both(case: Case, device: torch.device, graphs: Graphs, **options: Any) -> tuple[State, State, StepRunner]:
    """A captured and an eager run of the same batches, metrics compared at each step; their states."""
    mesh = build_mesh(device=device)
    (step, captured), (plain_step, plain) = make_state(case, mesh), make_state(case, mesh)
    runner = StepRunner(step, captured, capture=True, graphs=graphs, **options)
    for batch in make_batches(case, mesh, STEPS):
        expected = {name: value.clone() for name, value in plain_step(plain, batch).items()}
        found = runner(batch)
        assert found.keys() == expected.keys()
        assert_equal(list(found.values()), list(expected.values()), rule=case.rule)
    return captured, plain, runner


@on_each_device
@pytest.mark.parametrize(
    "case",
    [
        *EVERY_STEP,
        Case(optimizer="rmsprop", micro_batches=2, deferred=True),
        Case(optimizer="lars", skipping=True),
        Case(optimizer="adamw", skipping=True),
        Case(optimizer="lamb"),
        Case(optimizer="muon"),
        full(Case(network="test_efficientnet", size=32, recompute="block")),
    ],
    ids=str,
)
def test_the_replay_equals_the_eager_step(case: Case, device: torch.device) -> None:
    graphs = graphs_of(device)
    captured, plain, runner = run_both(case, device, graphs)
    assert runner.replays
    assert_equal(everything(captured), everything(plain), rule=case.rule)


def test_static_slots_are_bitwise_the_eager_step() -> None:
    """Those of the warm-up, whose steps are called and not replayed."""
    case, mesh = Case(network="test_efficientnet", size=32), build_mesh(device=CPU)
    (step, slotted), (_, plain) = make_state(case, mesh), make_state(case, mesh)
    runner = StepRunner(step, slotted, capture=True, graphs=CpuGraphs())
    for batch in make_batches(case, mesh, WARMUP_STEPS):
        runner(batch)
        step(plain, batch)
    assert_equal(everything(slotted), everything(plain))


@pytest.mark.parametrize("part", [0.0, full(0.5), 0.95])
@pytest.mark.parametrize(
    "case",
    [Case(), Case(rule="per_sample"), Case(method="noisy_student"), Case(micro_batches=2, deferred=True)],
    ids=str,
)
def test_a_failed_capture_changes_nothing(case: Case, part: float) -> None:
    """Wherever the step ends: the run goes on bitwise as one that never tried, and says why, once."""
    told: list[str] = []
    fail_at = int(part * operators(case))
    captured, plain, runner = run_both(case, CPU, CpuGraphs(fail_at=fail_at), fall_back=told.append)
    assert_equal(everything(captured), everything(plain))
    assert told == [
        "the step could not be captured as a CUDA graph and runs eagerly: RuntimeError: operation not permitted when "
        "stream is capturing"
    ]
    assert not runner.out_of_memory


def operators(case: Case) -> int:
    """Of one step."""
    graphs, mesh = CpuGraphs(), build_mesh(device=CPU)
    step, state = make_state(case, mesh)
    (batch,) = make_batches(case, mesh, 1)
    graphs.record(lambda: step(state, batch))
    return graphs.recorded[0]


def failing_capture(step: Step, fail: Callable[[], object]) -> Step:
    """The step; `fail` is called within the call that is captured, the fourth."""
    calls = itertools.count(1)

    def failing(state: State, batch: Batch) -> StepMetrics:
        metrics = step(state, batch)
        if next(calls) == 4:
            fail()
        return metrics

    return failing


@on_each_device
def test_a_failed_capture_leaves_device_and_random_numbers_usable(device: torch.device) -> None:
    """A read on the host ends the capture inside the step; the generator and the allocator serve others afterwards."""
    case, mesh = Case(), build_mesh(device=device)
    step, state = make_state(case, mesh)
    reads = failing_capture(step, lambda: torch.ones(3, device=device).sum().item())
    generator = torch.cuda.default_generators[0] if device.type == "cuda" else torch.default_generator
    told: list[str] = []
    runner = StepRunner(reads, state, capture=True, fall_back=told.append, graphs=graphs_of(device))
    batches = make_batches(case, mesh, STEPS)
    for batch in batches[:3]:
        runner(batch)
    before = generator.get_state()
    for batch in batches[3:]:
        runner(batch)
    assert len(told) == 1
    assert torch.equal(generator.get_state(), before)
    assert torch.rand(1000, device=device).mean() > 0.4
    assert int(state.step) == STEPS


@on_each_device
def test_a_capture_without_memory_says_so(device: torch.device) -> None:
    """Raised inside the step, as the allocator does, then what ending the capture makes of it."""
    case, mesh = Case(), build_mesh(device=device)
    step, state = make_state(case, mesh)

    def grow() -> None:
        if device.type == "cuda":
            torch.empty(1 << 50, dtype=torch.uint8, device=device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1024.00 TiB.\nMore lines.")

    told: list[str] = []
    runner = StepRunner(
        failing_capture(step, grow), state, capture=True, fall_back=told.append, graphs=graphs_of(device)
    )
    for batch in make_batches(case, mesh, STEPS):
        runner(batch)
    assert runner.out_of_memory
    (line,) = told
    assert "OutOfMemoryError: CUDA out of memory" in line
    assert "\n" not in line


class OneFails:
    """Graphs of which rank 1 can make none; nothing is recorded, so nothing may be replayed."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def warm_up(self, step: Callable[[], StepMetrics]) -> StepMetrics:
        return step()

    def record(self, step: Callable[[], StepMetrics]) -> tuple[Callable[[], None], StepMetrics]:
        if self.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        def replay() -> None:
            raise AssertionError("a graph is replayed that one rank has not")

        return replay, {}

    def release(self) -> None: ...


def run_where_one_rank_fails() -> tuple[list[str], bool, list[torch.Tensor], list[torch.Tensor]]:
    mesh = build_mesh(device=CPU)
    told: list[str] = []
    graphs: Any = OneFails(mesh.rank)
    captured, plain, runner = run_both(Case(), CPU, graphs, fall_back=told.append)
    return told, runner.out_of_memory, everything(captured), everything(plain)


def test_where_one_rank_cannot_capture_none_replays() -> None:
    for told, out_of_memory, found, expected in pool(2).run(run_where_one_rank_fails):
        assert told == [
            "the step could not be captured as a CUDA graph and runs eagerly: rank 1: OutOfMemoryError: CUDA out of "
            "memory."
        ]
        assert out_of_memory
        assert_equal(found, expected)


def replay_on_ranks(case: Case) -> bool:
    captured, plain, runner = run_both(case, CPU, CpuGraphs())
    assert_equal(everything(captured), everything(plain))
    return runner.replays


def test_collectives_are_replayed() -> None:
    """Two ranks: reduce-scatter, all-gather and batch norm's all-reduces are in the recording."""
    assert all(pool(2).run(replay_on_ranks, Case(skipping=True)))


def test_a_capture_that_is_required_raises() -> None:
    case, mesh = Case(), build_mesh(device=CPU)
    step, state = make_state(case, mesh)
    runner = StepRunner(step, state, capture=True, graphs=CpuGraphs(fail_at=40))
    batches = make_batches(case, mesh, 4)
    for batch in batches[:3]:
        runner(batch)
    with pytest.raises(
        ValueError, match="could not be captured as a CUDA graph: RuntimeError: operation not permitted"
    ):
        runner(batches[3])


def test_the_loop_settles_before_the_capture() -> None:
    """Once, at the fourth step, which runs once to be recorded; replays do not run it."""
    case, mesh = Case(), build_mesh(device=CPU)
    step, state = make_state(case, mesh)
    events: list[str] = []

    def told(state: State, batch: Batch) -> StepMetrics:
        events.append("step")
        return step(state, batch)

    runner = StepRunner(told, state, capture=True, graphs=CpuGraphs(), settle=lambda: events.append("settle"))
    for batch in make_batches(case, mesh, 6):
        runner(batch)
    assert events == ["step", "step", "step", "settle", "step"]


@on_each_device
def test_what_is_saved_after_a_replay_resumes(device: torch.device, tmp_path: Path) -> None:
    """Saved after replays, loaded into a state of other weights that captures anew: equals the run that went on."""
    case, mesh = Case(method="mpl", optimizer="rmsprop"), build_mesh(device=device)
    batches = make_batches(case, mesh, 2 * STEPS)
    step, state = make_state(case, mesh)
    snapshots = Snapshots(tmp_path, CheckpointConfig(keep=1), mesh, warn=lambda _: None)
    runner = StepRunner(step, state, capture=True, graphs=graphs_of(device))
    for batch in batches[:STEPS]:
        runner(batch)
    snapshots.save(PHASE, state, step=STEPS, global_step=STEPS, metadata={"results": {}, "seconds": 0.0})
    for batch in batches[STEPS:]:
        runner(batch)
    assert runner.replays

    step, resumed = make_state(case, mesh)
    found = snapshots.find("auto")
    assert found is not None
    snapshots.restore(found, resumed)
    again = StepRunner(step, resumed, capture=True, graphs=graphs_of(device))
    for batch in batches[STEPS:]:
        again(batch)
    assert again.replays
    assert_equal(everything(resumed), everything(state))


@on_each_device
def test_a_second_phase_captures_anew_and_the_first_is_gone(device: torch.device) -> None:
    case, mesh = Case(), build_mesh(device=device)
    graphs = graphs_of(device)

    def phase() -> tuple[StepRunner, weakref.ref[torch.Tensor]]:
        step, state = make_state(case, mesh)
        runner = StepRunner(step, state, capture=True, graphs=graphs)
        for batch in make_batches(case, mesh, STEPS):
            metrics = runner(batch)
        assert runner.replays
        held = weakref.ref(next(iter(metrics.values())))  # in the memory of the graph
        runner.close()
        return runner, held

    def used() -> int:
        gc.collect()
        return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0

    kept = []
    for _ in range(2):
        runner, held = phase()
        assert not runner.replays
        assert held() is None
        kept.append(used())
    assert kept[0] == kept[1]
    if isinstance(graphs, CpuGraphs):
        assert len(graphs.recorded) == 2
        assert graphs.released == 2


def test_what_lies_between_steps_touches_nothing(tmp_path: Path) -> None:
    """Gathering the weights, evaluating a copy of them and saving a checkpoint, after every step: bitwise no change."""
    case, mesh = Case(network="test_efficientnet", size=32), build_mesh(device=CPU)
    snapshots = Snapshots(tmp_path, CheckpointConfig(keep=2), mesh, warn=lambda _: None)
    (step, plain), (_, disturbed) = make_state(case, mesh), make_state(case, mesh)
    runners = [StepRunner(step, state, capture=False) for state in (plain, disturbed)]
    assert disturbed.student is not None
    for number, batch in enumerate(make_batches(case, mesh, 6), start=1):
        for runner in runners:
            runner(batch)
        weights = collect_weights(disturbed, mesh=mesh)
        copied = copy.deepcopy(disturbed.student.module).eval()
        copied.load_state_dict(weights["ema"])
        with torch.no_grad():
            copied(batch.normalise(batch.weak))
        snapshots.save(PHASE, disturbed, step=number, global_step=number, metadata={"results": {}, "seconds": 0.0})
    assert_equal(everything(disturbed), everything(plain))


def test_drift_is_refused_by_name() -> None:
    case, mesh = Case(), build_mesh(device=CPU)
    first, second = make_batches(case, mesh, 2)
    step, state = make_state(case, mesh)
    runner = StepRunner(step, state, capture=True, graphs=CpuGraphs())
    runner(first)
    with pytest.raises(ValueError, match=r"batch.labels is torch.int64 \[4\] on cpu, .* \[8\]"):
        runner(replace(second, labels=second.labels[:4]))
    with pytest.raises(ValueError, match=r"batch.weak is torch.float64"):
        runner(replace(second, weak=second.weak.double()))


def test_the_tape_runs_a_step_once_and_sets_memory_back() -> None:
    """What the tests above rely on: a value that Python changes is frozen, one in memory is not."""
    graphs, host = CpuGraphs(), 1.0
    memory, out = torch.ones(3), torch.zeros(3)

    def step() -> StepMetrics:
        memory.add_(1)
        torch.mul(memory, host, out=out)
        return {"sum": out.sum()}

    replay, metrics = graphs.record(step)
    assert memory.tolist() == [1, 1, 1]
    host = 100.0
    replay()
    replay()
    assert memory.tolist() == [3, 3, 3]
    assert metrics["sum"] == 9


def test_the_reason_for_eager_steps() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert why_not_captured(graph="auto", device=cpu, flat_engine=True) == "the run computes on cpu"
    assert why_not_captured(graph="auto", device=cuda, flat_engine=True) is None
    assert "engine deepspeed" in str(why_not_captured(graph="auto", device=cuda, flat_engine=False))
    assert why_not_captured(graph="off", device=cuda, flat_engine=True) == "mpl_scale.parallel.graph = off"
    with pytest.raises(ValueError, match="graph = required, but the run computes on cpu"):
        why_not_captured(graph="required", device=cpu, flat_engine=True)
