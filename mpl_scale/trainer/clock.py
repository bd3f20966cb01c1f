"""Images a second, and how much of the time the data were waited for."""

from __future__ import annotations

import time
from typing import Any


class Clock:
    """Wall time and the share of it spent waiting for data, since the last line."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._began, self._waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self) -> Clock:
        """A context that counts as waiting."""
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._entered

    def rates(self, images: int) -> dict[str, Any]:
        """images_per_second over all ranks and data_wait_share, then start anew."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rates = {"images_per_second": self.steps * images / seconds, "data_wait_share": self._waited / seconds}
        self._restart()
        return rates
