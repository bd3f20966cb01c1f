"""When a run's state is saved, and what a checkpoint holds of the run beside it."""

from __future__ import annotations

from dataclasses import dataclass

from mpl_scale.config import RunConfig
from mpl_scale.monitor import Request
from mpl_scale.trainer.guard import Guard
from mpl_scale.trainer.phase_run import PhaseRun, Record
from mpl_scale.trainer.snapshots import Snapshots
from mpl_scale.trainer.vitals import Vitals


@dataclass
class Checkpointer:
    """last_phase: the name of the run's last one, whose end must be on disk."""

    config: RunConfig
    snapshots: Snapshots
    guard: Guard
    vitals: Vitals
    record: Record
    last_phase: str

    def save(self, run: PhaseRun, request: Request) -> bool:
        """Save at the end of a phase, where it is asked for, and every `checkpoint.every` steps; whether it did."""
        every = self.config.mpl.checkpoint.every
        if not (run.finished or request or (every and self.record.global_step % every == 0)):
            return False
        with self.vitals.doing("save", run):
            self.guard.check_weights(run)
            self._write(
                run,
                wait=run.finished or request != Request.NONE,
                needed=request == Request.STOP or self.ends(run),
            )
        return True

    def save_again(self, run: PhaseRun) -> None:
        """After going back to a checkpoint: it must hold that, and what is left out, for a restart."""
        self._write(run, wait=True, needed=False)

    def ends(self, run: PhaseRun) -> bool:
        """Whether the whole run is done."""
        return run.finished and run.phase.name == self.last_phase

    def _write(self, run: PhaseRun, *, wait: bool, needed: bool) -> None:
        self.snapshots.save(
            run.phase,
            run.state,
            step=run.step,
            global_step=self.record.global_step,
            metadata={**self.record.state_dict(), **run.state_dict()},
            wait=wait,
            needed=needed,
        )
