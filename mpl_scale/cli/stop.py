"""Ask a run to stop: SIGTERM, SIGUSR1, or the death of the launcher; the trainer reads it at step boundaries."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

REPEAT_SECONDS = 10.0
"""Slurm signals the ranks and srun, which passes its own on: two signals, one request."""


class StopRequest:
    """Call it to learn whether to stop. Install before heavy imports, which a signal would otherwise kill."""

    def __init__(self) -> None:
        self._asked: float | None = None  # when, monotonic seconds
        self._launcher = _deepspeed_launcher()

    def install(self) -> StopRequest:
        """Take SIGTERM and SIGUSR1 over; a SIGTERM that comes REPEAT_SECONDS later ends the process as usual."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)
        return self

    def __call__(self) -> bool:
        orphaned = self._launcher is not None and self._launcher != _deepspeed_launcher()
        return self._asked is not None or orphaned

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif number == signal.SIGTERM and now - self._asked > REPEAT_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


def _deepspeed_launcher() -> tuple[int, int] | None:
    """The process ids of `deepspeed.launcher.launch`, if it started this process, and of what started it in turn.

    `deepspeed` starts launch.py, which starts the ranks; killed by SIGTERM, it tells neither, and the ranks would train
    on unseen. Then launch.py has another parent. None under other launchers, or where there is no /proc.
    """
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return None
        return parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None
