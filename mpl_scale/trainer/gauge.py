"""What the main phase of a run really cost, beside what was planned: bytes of a rank, seconds of a step.

On a CPU one step is counted storage by storage; on a GPU the allocator knows. The plan is made when the run is over, so
that no run waits for it, and a network that cannot be traced is trained all the same.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from mpl_scale.config import RunConfig
from mpl_scale.engine.graph import StepRunner, first_line
from mpl_scale.mesh import Mesh
from mpl_scale.mpl import State
from mpl_scale.planner.measured import measure_step
from mpl_scale.resolve import Resolved
from mpl_scale.trainer.phases import Phase
from mpl_scale.trainer.planning import GIGA, configured_plan, less_memory, main_job, make_jobs, make_machine
from mpl_scale.types import Batch, StepMetrics

MAIN = "train"
"""The phase that is measured."""
MEASURED = 2
"""The step of this process that is measured: in the first one engines still allocate."""
RECENT = 1000
"""Steps whose seconds are kept."""
ALLOWANCES = ("runtime", "fragmentation")
"""What a plan adds to what the allocator gives out."""


@dataclass
class Gauge:
    """Watches the steps of the main phase, where `logging.cost` says so; `report` is collective.

    calibration: a file of measured rates: the time of a step is planned too.

    Raises:
        ValueError: it is none.
    """

    run: RunConfig
    resolved: Resolved
    mesh: Mesh
    calibration: str | None = None
    _bytes: dict[str, int] = field(default_factory=dict)
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _steps: int = 0

    def __post_init__(self) -> None:
        cuda = self.mesh.device.type == "cuda"
        per_node = None if cuda else self.mesh.world
        self._machine = make_machine("h200" if cuda else "cpu", calibration=self.calibration, per_node=per_node)

    @contextmanager
    def step(self, phase: Phase) -> Iterator[None]:
        """A whole step, from waiting for its batch to writing its metrics."""
        began = time.perf_counter()
        yield
        measured = self.resolved.cost and phase.name == MAIN
        if measured and self._steps > MEASURED:  # warm, and not the one that was counted
            self._seconds.append(time.perf_counter() - began)

    def __call__(self, run_step: StepRunner, phase: Phase, state: State, batch: Batch) -> StepMetrics:
        """Run the step; once in a run, measure it."""
        self._steps += phase.name == MAIN
        if not self.resolved.cost or phase.name != MAIN or self._steps != MEASURED:
            return run_step(batch)
        device = self.mesh.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            metrics = run_step(batch)
            self._bytes = {"peak": torch.cuda.max_memory_allocated(device)}
            return metrics
        if self.resolved.kernels == "compiled":  # storages in compiled loops cannot be counted
            return run_step(batch)
        metrics, found = measure_step(run_step.step, state, batch)
        self._bytes = {"static": found.static, "activations": found.activations}
        return metrics

    def advice(self) -> str:
        """What a plan of less memory than the configured one would change, for a run that has run out of it."""
        try:
            job = main_job(make_jobs(self.run, self.resolved.batches, kernels=self.resolved.kernels))
            machine = self._machine
            if self.mesh.device.type == "cuda":
                real = float(torch.cuda.get_device_properties(self.mesh.device).total_memory)
                machine = replace(machine, device=replace(machine.device, memory=real))
            now = configured_plan(job, self.resolved, world=self.mesh.world, machine=machine)
            better = less_memory(now)
        except Exception as error:  # somebody's modules on the meta device, as in _planned
            return f"it could not be planned with less: {first_line(error)}"
        if better is None:
            return "mpl-scale plan finds nothing that takes less; use more or larger devices"
        was, wanted = now.choice.settings(), better.choice.settings()
        changes = ", ".join(f"{name} = {value}" for name, value in wanted.items() if value != was[name])
        sizes = f"{better.memory.total / GIGA:.3g} GB a rank in place of {now.memory.total / GIGA:.3g}"
        return f"mpl-scale plan would set {changes}: {sizes}"

    def report(self) -> dict[str, Any] | None:
        """Planned and measured side by side, for the summary, on rank 0; None on the others, and where off. Collective.

        Returns:
            {"phase", "bytes": {name: {"planned", "measured"}}, "step_ms": likewise, "planned_bytes": by category,
            "note"}. Measured is the most of all ranks, of times the median; None where there is none, and the note why.
        """
        if not self.resolved.cost:
            return None
        found = [self._bytes] * self.mesh.world
        if self.mesh.world > 1:
            dist.all_gather_object(found, self._bytes, group=self.mesh.world_group)
        if not self.mesh.is_main:
            return None
        planned, categories, step_ms, note = self._planned()
        names = ("static", "activations", *(("peak",) if self.mesh.device.type == "cuda" else ()))
        measured = {name: max(one[name] for one in found) for name in self._bytes}
        seconds = round(1e3 * statistics.median(self._seconds), 3) if self._seconds else None
        return {
            "phase": MAIN,
            "bytes": {name: {"planned": planned.get(name), "measured": measured.get(name)} for name in names},
            "step_ms": {"planned": step_ms, "measured": seconds},
            "planned_bytes": categories,
            "note": note,
        }

    def _planned(self) -> tuple[dict[str, int], dict[str, int], float | None, str | None]:
        """Bytes by name and by category, milliseconds, and why there are none."""
        try:
            job = main_job(make_jobs(self.run, self.resolved.batches, kernels=self.resolved.kernels))
            plan = configured_plan(job, self.resolved, world=self.mesh.world, machine=self._machine)
            categories = {name: round(size) for name, size in plan.memory.categories.items()}
            step_ms = None if self.calibration is None else round(1e3 * plan.duration.total, 3)
        except Exception as error:  # somebody's modules on the meta device: they trained, whatever it says of them
            return {}, {}, None, f"the network could not be traced: {type(error).__name__}: {error}"
        peak = sum(size for name, size in categories.items() if name not in ALLOWANCES)
        sizes = {"static": round(plan.memory.static), "activations": categories["activations"], "peak": peak}
        return sizes, categories, step_ms, None
