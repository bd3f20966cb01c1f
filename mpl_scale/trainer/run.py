"""The loop: phase after phase, step after step. What happens on the way is up to the components, a call each.

A run that is asked to stop saves at a step boundary and leaves; the same command resumes from there, and ends with
the same weights as a run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mpl_scale.config import RunConfig
from mpl_scale.engine.graph import StepRunner, first_line
from mpl_scale.mesh import Mesh
from mpl_scale.monitor import Request, Writers
from mpl_scale.mpl import State
from mpl_scale.resolve import Resolved
from mpl_scale.trainer.checkpointer import Checkpointer
from mpl_scale.trainer.data_source import DataSource
from mpl_scale.trainer.gauge import Gauge
from mpl_scale.trainer.logger import MetricsLogger
from mpl_scale.trainer.phase_run import PhaseRun, Record
from mpl_scale.trainer.phases import Phase, Weights, build_state, collect_weights
from mpl_scale.trainer.requests import Requests
from mpl_scale.trainer.rewind import Rewinder
from mpl_scale.trainer.snapshots import Snapshot, Snapshots
from mpl_scale.trainer.validator import Validator
from mpl_scale.trainer.views import ViewGrid
from mpl_scale.trainer.vitals import Vitals
from mpl_scale.types import StepMetrics


@dataclass
class Trainer:
    """A run, ready to start; components.py puts one together. phases: those of the run, in order."""

    config: RunConfig
    resolved: Resolved
    mesh: Mesh
    phases: list[Phase]
    source: DataSource
    writers: Writers
    snapshots: Snapshots
    record: Record
    vitals: Vitals
    gauge: Gauge
    logger: MetricsLogger
    validator: Validator
    checkpointer: Checkpointer
    rewinder: Rewinder
    views: ViewGrid
    requests: Requests
    _resumed: PhaseRun | None = None
    _captures: bool = field(init=False)

    def __post_init__(self) -> None:
        self._captures = self.resolved.replayed  # until a capture fails

    def train(self) -> bool:
        """Run the phases that are left. True at the end, False if asked to stop (state saved)."""
        weights: Mapping[str, Weights] = {}
        resumed, self._resumed = self._resumed, None  # each phase's state is freed before the next one's is built
        left = self.phases if resumed is None else self.phases[self.phases.index(resumed.phase) :]
        for phase in left:
            run, resumed = resumed or self._begin(phase, weights=weights), None
            self.vitals.tell("start", run)
            if phase is left[0]:
                self.snapshots.check_room(run.state)
            if not self._train_phase(run):
                return False
            weights = collect_weights(run.state, mesh=self.mesh)
        self.vitals.tell("done", run)
        return True

    def _train_phase(self, run: PhaseRun) -> bool:
        """False if asked to stop before the end of the run."""
        if run.finished:  # a checkpoint of the phase's end
            return True
        run.start(self._runner(run))
        self.logger.show_progress(run)
        with run:
            while not run.finished:
                with self.gauge.step(run.phase):
                    metrics = self._step(run)
                    values = self.logger.log(run, metrics)
                if self.rewinder.rewind(run, values):
                    self.logger.show_progress(run)
                    continue
                self.vitals.tell("train", run)
                self.validator.validate(run)
                request = self.requests.agreed(run)
                if self.checkpointer.save(run, request):
                    self.requests.answered(request)
                if request == Request.STOP and not self.checkpointer.ends(run):
                    where = f"step {run.step} of {run.phase.name}"
                    self.writers.note(f"stopped as asked after {where}; the same command resumes from there")
                    return False
        return True

    def _step(self, run: PhaseRun) -> StepMetrics:
        """The next step of the phase."""
        batch = run.next_batch()
        try:
            metrics = self.gauge(run.runner, run.phase, run.state, batch)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"no memory for step {run.step + 1} of {run.phase.name}: {first_line(error)}; {self.gauge.advice()}"
            ) from error
        run.step += 1
        run.clock.steps += 1
        self.record.global_step += 1
        if run.tally is not None:
            run.tally.count(batch)
        self.views.show(run, batch)
        return metrics

    def restore(self, snapshot: Snapshot) -> None:
        """Continue after a snapshot. Nothing is written before; ValueError where it is of another model or phase."""
        phase = next((phase for phase in self.phases if phase.name == snapshot.phase), None)
        if phase is None:
            raise ValueError(f"checkpoint {snapshot.folder} is of phase {snapshot.phase!r}, which the config has not")
        run = self._begin(phase, weights={}, step=snapshot.step)
        self.snapshots.restore(snapshot, run.state)
        run.load_state_dict(snapshot.metadata)
        self.record.load_state_dict(snapshot.metadata)
        first = self.phases.index(phase)
        self.record.global_step = sum(phase.steps for phase in self.phases[:first]) + snapshot.step
        self.source.resident.unlabelled = any(phase.unlabelled for phase in self.phases[first:])
        self._resumed = run

    def _begin(self, phase: Phase, *, weights: Mapping[str, Weights], step: int = 0) -> PhaseRun:
        """A phase with its networks under their engines."""
        state: State = build_state(
            phase,
            self.config,
            mesh=self.mesh,
            weights=weights,
            resolved=self.resolved,
            unlabelled_images=len(self.source.splits.unlabelled),
        )
        return PhaseRun(phase, state, source=self.source, guard=self.config.mpl.guard, step=step)

    def _runner(self, run: PhaseRun) -> StepRunner:
        """Replays the phase's step, or calls it."""

        def settle() -> None:
            """No thread of this run is at work: the watchdog's calls no device, DALI's have filled their queue."""
            self.snapshots.wait()
            run.loader.settle()

        def fall_back(line: str) -> None:
            self._captures = False  # nor in the phases that follow
            if runner.out_of_memory and self.mesh.is_main:
                line += f"; {self.gauge.advice()}"
            self.writers.note(line)

        required = self.config.mpl.parallel.graph == "required"
        runner = StepRunner(
            run.skipping or run.phase.method.step,
            run.state,
            capture=self._captures,
            fall_back=None if required else fall_back,
            settle=settle,
        )
        return runner
