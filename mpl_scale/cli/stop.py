"""Ask a run to stop: SIGTERM, SIGUSR1, Ctrl-C, or the death of the launcher; the trainer reads it at step boundaries.

Before the first step is done there is nothing to save, and a signal ends the process at once. So does a second Ctrl-C.
The main thread may stand in a collective, a compiler or a decoder then, where Python runs no handler: the signals are
read from the wake-up descriptor by a thread of their own.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REPEAT_SECONDS = 10.0
"""Slurm signals the ranks and srun, which passes its own on: two signals, one request."""
ECHO_SECONDS = 2.0
"""A terminal's Ctrl-C reaches every process, and torchrun sends it to its ranks once more: one press."""


class StopRequest:
    """Call it after each step to learn whether to stop. Install before heavy imports, which a signal would kill."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, end: Callable[[int], Any] = os._exit) -> None:
        """clock: seconds. end: leaves the process with a status."""
        self._clock, self._end = clock, end
        self._asked: float | None = None  # when, monotonic seconds
        self._pressed: float | None = None  # Ctrl-C, for the first time
        self._stepping = False
        self._launcher = _deepspeed_launcher()
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> StopRequest:
        """Take SIGINT, SIGTERM and SIGUSR1 over, in the main thread, until `close`."""
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._descriptor_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._owner = os.getpid()
        os.register_at_fork(after_in_child=self.close)  # or its signals would be told to this process
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def close(self) -> None:
        """Restore the signal handlers from before."""
        if not self._before:
            return
        signal.set_wakeup_fd(self._descriptor_before if os.getpid() == self._owner else -1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        os.close(self._writing)  # ends the thread

    def __call__(self) -> bool:
        self._stepping = True
        orphaned = self._launcher is not None and self._launcher != _deepspeed_launcher()
        return self._asked is not None or orphaned

    def _listen(self) -> None:
        while numbers := os.read(self._reading, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._receive(signal.Signals(number))
        os.close(self._reading)

    def _receive(self, number: signal.Signals) -> None:
        now, name = self._clock(), "Ctrl-C" if number == signal.SIGINT else number.name
        if not self._stepping:
            self._leave(number, f"{name} before the first step: nothing is lost, the same command starts again")
        elif number == signal.SIGINT and self._pressed is None:
            self._asked, self._pressed = now if self._asked is None else self._asked, now
            _say("stopping after this step; press Ctrl-C again to end at once")
        elif number == signal.SIGINT:
            launched = "RANK" in os.environ
            if not launched or now - (self._pressed or 0.0) > ECHO_SECONDS:
                self._leave(number, "Ctrl-C again: ended at once; the same command resumes from the last checkpoint")
        elif self._asked is None:
            self._asked = now
            _say(f"{name}: stopping after this step")
        elif number == signal.SIGTERM and self._launcher is None and now - self._asked > REPEAT_SECONDS:
            self._leave(number, f"{name} again: ended at once; the same command resumes from the last checkpoint")

    def _leave(self, number: signal.Signals, why: str) -> None:
        _say(why)
        self._end(128 + number)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Python's part of a signal; the thread does the rest."""


def _say(line: str) -> None:
    """On rank 0. Past sys.stderr, whose lock the main thread may hold."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        text = f"mpl-scale: {line}\n"
        os.write(2, (f"\n{text}" if os.isatty(2) else text).encode())  # a terminal has ^C, or a bar, on its line


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
