"""How fast a phase goes and how long it still takes.

Not tqdm's rates: they count compilation and warm-up, jump with the host's clock, and exist only where a bar is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Steps per second from the times at which steps were reported."""

    def __init__(self, *, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        """done: steps, of `total`, before the clock starts; clock in seconds."""
        self.total = total
        self._clock = clock
        self._previous = self._current = (done, clock())
        self._first: tuple[int, float] | None = None

    def report(self, step: int) -> None:
        """Record that `step` steps of the phase are done now.

        The average starts at the first report: compilation and warm-up before it are not the pace. A step that is
        reported again, after its evaluation, leaves the pace as it is: what passed since is no training.
        """
        now = self._clock()
        if self._first is not None and step == self._current[0]:
            pause = now - self._current[1]
            self._previous, self._current = (self._previous[0], self._previous[1] + pause), (step, now)
            return
        self._previous, self._current = self._current, (step, now)
        if self._first is None:
            self._first = self._current

    @property
    def steps_per_second(self) -> float | None:
        """Between the last two reports; None where nothing was measured yet."""
        return _rate(self._previous, self._current)

    @property
    def seconds_left(self) -> float | None:
        """At the average pace since the first report (at the last pace before a second one); None: unknown."""
        average = _rate(self._first, self._current) if self._first else None
        rate = average or self.steps_per_second
        return (self.total - self._current[0]) / rate if rate else None


def _rate(start: tuple[int, float], end: tuple[int, float]) -> float | None:
    steps, seconds = end[0] - start[0], end[1] - start[1]
    return steps / seconds if steps > 0 and seconds > 0 else None


def format_seconds(seconds: float) -> str:
    """A duration as people write it: 5s, 1m20s, 2h05m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
