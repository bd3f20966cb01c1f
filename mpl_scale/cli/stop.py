"""Ask a run to stop: SIGTERM and SIGUSR1 set a flag that the trainer reads at step boundaries."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Call it to learn whether a signal came. Install before heavy imports, which a signal would otherwise kill."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def install(self) -> StopRequest:
        """Take SIGTERM and SIGUSR1 over; a second SIGTERM ends the process as usual."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)
        return self

    def __call__(self) -> bool:
        return self._signal is not None

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
