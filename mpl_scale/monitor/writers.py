"""One call that takes the scalars of a step to every place they are written to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mpl_scale.monitor.metrics import MetricsWriter, part_of
from mpl_scale.monitor.progress import Progress


class EventMonitor(Protocol):
    """What is used of DeepSpeed's MonitorMaster (TensorBoard, W&B, Comet, CSV), which the caller hands in."""

    enabled: bool

    def write_events(self, event_list: Sequence[tuple[str, float, int]]) -> None:
        """Write (name, value, step) triples."""


@dataclass
class Writers:
    """The places; None: not there, as on all ranks but 0.

    draw: TensorBoard's (name, pixels uint8 [H, W, 3], step).
    """

    metrics: MetricsWriter | None = None
    progress: Progress | None = None
    monitor: EventMonitor | None = None
    draw: Callable[[str, np.ndarray, int], None] | None = None

    def write(self, values: Mapping[str, float], *, phase: str, step: int, global_step: int) -> None:
        """Write host scalars of a step of the phase.

        The monitor gets them at global_step as {phase}/{name}, those of an evaluation as test/{name}, which the
        progress shows too: both have a student_loss.
        """
        tested = part_of(values) == "test"
        if self.metrics is not None:
            self.metrics.write(values, phase=phase, step=step, global_step=global_step)
        if self.progress is not None:
            self.progress.report({f"test/{name}": values[name] for name in values} if tested else values, step=step)
        if self.monitor is not None and self.monitor.enabled:
            place = "test" if tested else phase
            self.monitor.write_events([(f"{place}/{name}", value, global_step) for name, value in values.items()])

    def picture(self, name: str, pixels: np.ndarray, *, phase: str, global_step: int) -> None:
        """Show a picture, uint8 [H, W, 3], as {phase}/{name}."""
        if self.draw is not None:
            self.draw(f"{phase}/{name}", pixels, global_step)

    def go_back(self, *, global_step: int) -> None:
        """Drop the metrics after a step, which will be written again; other monitors keep theirs."""
        if self.metrics is not None:
            self.metrics.go_back(global_step)

    def note(self, line: str) -> None:
        """A line for people: warnings, what was saved or loaded."""
        if self.progress is not None:
            self.progress.note(line)

    def close(self) -> None:
        """Close the file and the bar."""
        if self.progress is not None:
            self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
