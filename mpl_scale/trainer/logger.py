"""The metrics of a step, averaged over ranks, and pseudo labels since the last line: every `logging.every` steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpl_scale.data import Quarantine
from mpl_scale.mesh import Mesh
from mpl_scale.monitor import Writers
from mpl_scale.trainer.guard import Guard
from mpl_scale.trainer.label_tally import LabelTally
from mpl_scale.trainer.phase_run import PhaseRun, Record
from mpl_scale.trainer.vitals import Vitals
from mpl_scale.types import StepMetrics


@dataclass
class MetricsLogger:
    """every: steps between lines; the last step of a phase has one too."""

    every: int
    mesh: Mesh
    writers: Writers
    vitals: Vitals
    guard: Guard
    quarantine: Quarantine
    record: Record

    def log(self, run: PhaseRun, metrics: StepMetrics) -> dict[str, float] | None:
        """The metrics line of this step, checked by the guard; None: this step is not logged."""
        if run.step % self.every and not run.finished:
            return None
        bad = torch.tensor(float(self.quarantine.count * self.mesh.world), device=self.mesh.device)
        values = self._averages({**metrics, "bad_images": bad}, run.tally)  # of all ranks together
        self.guard.check_metrics(run, values)
        values |= run.clock.rates(run.phase.labelled + run.phase.unlabelled)
        if self.vitals.heartbeat is not None:
            self.vitals.heartbeat.images_per_second = values["images_per_second"]
        self.writers.write(values, phase=run.phase.name, step=run.step, global_step=self.record.global_step)
        return values

    def show_progress(self, run: PhaseRun) -> None:
        """Start the progress bar at the phase's current step."""
        if self.writers.progress is not None:
            images = run.phase.labelled + run.phase.unlabelled
            self.writers.progress.start(run.phase.name, total=run.phase.steps, done=run.step, images_per_step=images)

    def _averages(self, metrics: StepMetrics, tally: LabelTally | None) -> dict[str, float]:
        """Over ranks, with the labels counted since the last line: the one place where device values are read."""
        own = torch.stack([value.detach().double() for value in metrics.values()])
        counts = own[:0] if tally is None else tally.counts
        sums = self.mesh.sum_over_ranks(torch.cat([own, counts])).tolist()
        values = {name: total / self.mesh.world for name, total in zip(metrics, sums, strict=False)}
        if tally is not None:
            values |= tally.metrics(sums[len(metrics) :])
            tally.restart()
        return values
