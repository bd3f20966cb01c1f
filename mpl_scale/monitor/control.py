"""Files by which people and batch scripts talk to a run: put one into the output folder, under any launcher.

STOP     save and leave; it stays, so that a batch script does not start the run again
PAUSE    save and leave; it is removed, so that the next start resumes
SAVE     save now and continue; it is removed once saved
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

STOP_NAME, PAUSE_NAME, SAVE_NAME = "STOP", "PAUSE", "SAVE"
POLL_SECONDS = 1.0
"""Between looks: a parallel file system answers in milliseconds, as long as a short step takes."""


class Request(IntEnum):
    """What is asked of a run, in the order of precedence: over ranks the greatest holds."""

    NONE = 0
    SAVE = 1
    STOP = 2


class ControlFiles:
    """The files of one output folder, read on one rank."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """folder: of the run; clock: a monotonic clock, in seconds."""
        self._folder, self._clock = folder, clock
        self._next = clock()
        self._last = Request.NONE

    def __call__(self) -> Request:
        """What the files ask for; looked at once in POLL_SECONDS. A request holds until `answered`."""
        if self._last < Request.STOP and self._clock() >= self._next:
            self._next = self._clock() + POLL_SECONDS
            if any((self._folder / name).exists() for name in (STOP_NAME, PAUSE_NAME)):
                self._last = Request.STOP
            elif (self._folder / SAVE_NAME).exists():
                self._last = Request.SAVE
        return self._last

    def answered(self, request: Request) -> None:
        """The state is saved: remove what asked for it, but for STOP."""
        (self._folder / SAVE_NAME).unlink(missing_ok=True)
        if request == Request.STOP:
            (self._folder / PAUSE_NAME).unlink(missing_ok=True)
        self._last = Request.NONE
