"""When a run's networks are evaluated, and what becomes of the results."""

from __future__ import annotations

from dataclasses import dataclass

from mpl_scale.mesh import Mesh
from mpl_scale.monitor import Writers
from mpl_scale.trainer.evaluation import Evaluator
from mpl_scale.trainer.phase_run import PhaseRun, Record
from mpl_scale.trainer.phases import collect_weights
from mpl_scale.trainer.vitals import Vitals


@dataclass
class Validator:
    """Evaluates a run's networks when it is time, writes the results and keeps them.

    every: steps of phase train between evaluations; 0: at the end of each phase only.
    """

    evaluator: Evaluator
    every: int
    mesh: Mesh
    writers: Writers
    vitals: Vitals
    record: Record

    def validate(self, run: PhaseRun) -> None:
        """Measure every network of the state; the finetuned student is a result of its own."""
        every = self.every if run.phase.name == "train" else 0
        if not run.finished and not (every and run.step % every == 0):
            return
        with self.vitals.doing("evaluate", run):
            found = self.evaluator.evaluate(collect_weights(run.state, mesh=self.mesh))
            if run.phase.name == "finetune":
                found = {"finetuned": found["student"]}
            self.record.results |= found
            values = {f"{name}_{key}": value for name, result in found.items() for key, value in result.items()}
            self.writers.write(values, phase=run.phase.name, step=run.step, global_step=self.record.global_step)
