"""One phase while it trains: its state, the step on it, and its batches from a step on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from mpl_scale.config.schema import GuardConfig
from mpl_scale.engine.graph import StepRunner
from mpl_scale.mpl import PseudoLabels, State
from mpl_scale.mpl.skipping import SkipNonfinite
from mpl_scale.trainer.clock import Clock
from mpl_scale.trainer.data_source import DataSource, batch_ids
from mpl_scale.trainer.evaluation import Results
from mpl_scale.trainer.label_tally import LabelTally
from mpl_scale.trainer.loss_watch import LossWatch
from mpl_scale.trainer.phases import Phase
from mpl_scale.types import Batch


@dataclass
class Record:
    """What a run has achieved over all its starts: results by network, steps of all phases, seconds of training.

    kept: what every checkpoint and the summary keep of the run's identity (identity.py).
    """

    results: dict[str, Results] = field(default_factory=dict)
    global_step: int = 0
    earlier_seconds: float = 0.0
    kept: Mapping[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Seconds of training in this phase, earlier starts included."""
        return self.earlier_seconds + time.monotonic() - self.began

    def state_dict(self) -> dict[str, Any]:
        """Results, seconds and `kept`, for a checkpoint's metadata."""
        return {"results": self.results, "seconds": self.seconds(), **self.kept}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore results and seconds from a checkpoint's metadata."""
        self.results, self.earlier_seconds = dict(saved["results"]), saved["seconds"]


class PhaseRun:
    """A phase on its way. Use it as a context: at the end its loader and its graph are closed.

    Attributes:
        step: steps of the phase that are done.
        data_offset: step t sees the batch of t + this: what rewinds left out.
        rewinds: how often the phase went back to a checkpoint.
        watch: over the loss, where `guard.rewind` is set.
        skipping: takes back non-finite steps, where `guard.nonfinite` = skip.
        tally: of what unlabelled images were called, where the phase has any.
    """

    def __init__(self, phase: Phase, state: State, *, source: DataSource, guard: GuardConfig, step: int = 0) -> None:
        self.phase, self.state, self.step = phase, state, step
        self.data_offset = self.rewinds = 0
        self.watch = None if guard.rewind is None else LossWatch(guard.rewind, step=step)
        self.skipping = SkipNonfinite(phase.method.step, state) if guard.nonfinite == "skip" else None
        self.tally = None
        if phase.unlabelled:
            state.noted = PseudoLabels(phase.unlabelled // source.mesh.data, device=source.mesh.device)
            self.tally = LabelTally(state.noted, source.splits, source.mesh)
        self.clock = Clock()
        self._source = source

    def start(self, runner: StepRunner) -> None:
        """Load from `step` on; `runner` runs the phase's step, or `skipping`, on the state."""
        self.runner = runner
        self.clock = Clock()
        self.loader = self._source.batches(self.phase, start_step=self.step + self.data_offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()
        self.loader.close()

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.phase.steps

    def next_batch(self) -> Batch:
        """The batch of the next step; the wait is counted as waiting for data."""
        with self.clock.waiting():
            return next(self.loader)

    def seek(self, step: int) -> None:
        """Continue from another step, with the batches that belong to it."""
        self.loader.close()
        self.step = step
        self.loader = self._source.batches(self.phase, start_step=step + self.data_offset)

    def batch_ids(self, step: int) -> str:
        """Sample ids of the global batch after which `step` steps were done, for people."""
        source = self._source
        return batch_ids(self.phase, config=source.config, splits=source.splits, step=step + self.data_offset)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the phase beside its state. Collective."""
        watch = None if self.watch is None else self.watch.state_dict()
        labels = None if self.tally is None else self.tally.state_dict()
        return {
            "rewinds": self.rewinds,
            "data_offset": self.data_offset,
            "loss_watch": watch,
            "label_tally": labels,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore from a checkpoint's metadata, of which earlier versions lack some."""
        self.rewinds, self.data_offset = saved.get("rewinds", 0), saved.get("data_offset", 0)
        if self.watch is not None and saved.get("loss_watch") is not None:
            self.watch.load_state_dict(saved["loss_watch"])
        self.load_tally(saved)

    def load_tally(self, saved: Mapping[str, Any]) -> None:
        """Go back to what was counted at a checkpoint, of its metadata."""
        if self.tally is not None:
            self.tally.load_state_dict(saved.get("label_tally"))
