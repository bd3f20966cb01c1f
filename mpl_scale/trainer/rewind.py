"""Going back to a checkpoint from before the loss jumped (`guard.rewind`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpl_scale.config.schema import RewindConfig
from mpl_scale.monitor import Writers
from mpl_scale.mpl.skipping import IN_A_ROW
from mpl_scale.trainer.checkpointer import Checkpointer
from mpl_scale.trainer.guard import Guard
from mpl_scale.trainer.phase_run import PhaseRun, Record
from mpl_scale.trainer.snapshots import Snapshots
from mpl_scale.trainer.vitals import Vitals


@dataclass
class Rewinder:
    """Goes back to an earlier checkpoint where the loss diverges; settings None: never."""

    settings: RewindConfig | None
    snapshots: Snapshots
    checkpointer: Checkpointer
    guard: Guard
    writers: Writers
    vitals: Vitals
    record: Record

    def rewind(self, run: PhaseRun, values: Mapping[str, float] | None) -> bool:
        """Go back where the loss of a logged line has jumped; whether the run is at an earlier step now."""
        if run.watch is None or values is None or values.get(IN_A_ROW):  # a skipped step says nothing of the loss
            return False
        jumped = run.watch(values, step=run.step)
        return jumped is not None and self._go_back(run, jumped)

    def _go_back(self, run: PhaseRun, jumped: str) -> bool:
        """False: there is no earlier checkpoint of the phase."""
        settings, watch, step = self.settings, run.watch, run.step
        assert settings is not None
        assert watch is not None
        if run.rewinds >= settings.max_rewinds:
            used = f"mpl_scale.guard.rewind.max_rewinds = {settings.max_rewinds} used up,"
            self.guard.refuse(run, [f"{jumped}, with {used}"], otherwise="set mpl_scale.guard.rewind = null")
        self.vitals.tell("save", run)
        snapshot = self.snapshots.go_back(run.phase, step=watch.last_good)
        if snapshot is None:
            watch.start_anew(step)
            self.writers.note(
                f"{jumped}, after step {step} of {run.phase.name}; there is no earlier checkpoint of it, so training "
                "continues"
            )
            return False
        self.snapshots.restore(snapshot, run.state)
        run.load_tally(snapshot.metadata)
        again = step - snapshot.step
        run.rewinds += 1
        run.data_offset += again if settings.skip_batches else 0
        self.record.global_step -= again
        self.writers.go_back(global_step=self.record.global_step)
        watch.start_anew(snapshot.step)
        run.seek(snapshot.step)
        images = "the images that follow" if settings.skip_batches else "the same images"
        self.writers.note(
            f"{jumped}, after step {step} of {run.phase.name}; back to {snapshot.folder}, step {snapshot.step}, and on "
            f"with {images} (rewind {run.rewinds} of {settings.max_rewinds})"
        )
        self.checkpointer.save_again(run)
        self.vitals.tell("train", run)
        return True
