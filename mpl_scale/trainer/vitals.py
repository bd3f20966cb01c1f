"""Signs of life: what the heartbeat and the watchdog are told, phase by phase and step by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mpl_scale.monitor import Heartbeat
from mpl_scale.trainer.phase_run import PhaseRun, Record
from mpl_scale.trainer.watchdog import Watchdog


@dataclass
class Vitals:
    """heartbeat: on rank 0 only. watchdog: on every rank or on none; only training has to end a step in time."""

    record: Record
    heartbeat: Heartbeat | None = None
    watchdog: Watchdog | None = None

    def tell(self, doing: str, run: PhaseRun) -> None:
        """The run does `doing`, after `run.step` steps."""
        if self.heartbeat is not None:
            self.heartbeat.beat(
                doing,
                phase=run.phase.name,
                step=run.step,
                steps=run.phase.steps,
                global_step=self.record.global_step,
            )
        if self.watchdog is None:
            return
        if doing == "train" and not run.finished:
            self.watchdog.beat(self.record.global_step)
        else:
            self.watchdog.rest()

    @contextmanager
    def doing(self, doing: str, run: PhaseRun) -> Iterator[None]:
        """Something that may take any time, between steps."""
        self.tell(doing, run)
        yield
        self.tell("train", run)

    def close(self) -> None:
        """Stop the watchdog's thread."""
        if self.watchdog is not None:
            self.watchdog.close()
