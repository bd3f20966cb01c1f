"""The metrics of a step: averaged over ranks and written, every `logging.every` steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from mpl_scale.data import Quarantine
from mpl_scale.mesh import Mesh
from mpl_scale.monitor import Writers
from mpl_scale.trainer.guard import Guard
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
        values = self._averages({**metrics, "bad_images": bad})  # of all ranks together
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

    def _averages(self, metrics: StepMetrics) -> dict[str, float]:
        """Over ranks: the one place where a step's device values are read."""
        stacked = torch.stack([value.detach().double() for value in metrics.values()])
        if self.mesh.world_group is not None:
            dist.all_reduce(stacked, group=self.mesh.world_group)
        return dict(zip(metrics, (stacked / self.mesh.world).tolist(), strict=True))
