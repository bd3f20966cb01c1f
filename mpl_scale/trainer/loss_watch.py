"""When a loss has jumped and does not come back (`guard.rewind`): the trainer then goes back to a checkpoint."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from mpl_scale.config.schema import RewindConfig


class LossWatch:
    """Watches the logged loss of a phase; the same on every rank, as logged values are.

    last_good: the step of the last line that was not high.
    """

    def __init__(self, settings: RewindConfig, *, step: int) -> None:
        """step: where the phase begins or resumes."""
        self._settings = settings
        self.start_anew(step)

    def start_anew(self, step: int) -> None:
        """Forget all losses; `step` is now the last good one."""
        self._lines: deque[float] = deque(maxlen=self._settings.window)
        self._high, self.last_good = 0, step

    def state_dict(self) -> dict[str, Any]:
        """The recorded losses and counters, as plain JSON."""
        return {"lines": list(self._lines), "high": self._high, "last_good": self.last_good}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._lines.extend(saved["lines"])
        self._high, self.last_good = saved["high"], saved["last_good"]

    def __call__(self, values: Mapping[str, float], *, step: int) -> str | None:
        """Take a line in; what has jumped, in words, once it is high for `patience` lines."""
        name, settings = "student_loss" if "student_loss" in values else "teacher_loss", self._settings
        loss, mean = values[name], statistics.fmean(self._lines) if len(self._lines) == settings.window else 0.0
        if not mean and not math.isfinite(loss):  # nothing to compare with, and no part of a mean
            return None
        if not mean or loss <= settings.factor * mean:  # NaN is high
            self._lines.append(loss)
            self._high, self.last_good = 0, step
            return None
        self._high += 1
        if self._high < settings.patience:
            return None
        normal = f"{settings.factor:g} times {mean:.4g}, its mean of {settings.window} lines"
        return f"{name} = {loss:.4g} is over {normal}"
