"""heartbeat.json: how a run that nobody watches is doing, replaced every few seconds by the main rank.

    {"wall": 1764000000.0, "monotonic": 5123.4, "phase": "train", "step": 120, "steps": 1000, "global_step": 130,
     "doing": "train", "images_per_second": 5103.2, "host": "n1", "pid": 4242}

`wall` is for people on other machines; `monotonic` (of `host`) tells a clock that jumped from a run that hangs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mpl_scale.files import replace_text

HEARTBEAT_NAME = "heartbeat.json"
BEAT_SECONDS = 5.0


class Heartbeat:
    """Writes at most every BEAT_SECONDS, but at once when what the run does changes."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """folder: of the run. clock: seconds."""
        self._path, self._clock = folder / HEARTBEAT_NAME, clock
        self._next = clock()
        self._doing = ""
        self.images_per_second: float | None = None

    def beat(self, doing: str, *, phase: str, step: int, steps: int, global_step: int) -> None:
        """Record that `step` of the phase's `steps` are done, and what is happening now; disk errors are ignored."""
        now = self._clock()
        if doing == self._doing and now < self._next:
            return
        self._doing, self._next = doing, now + BEAT_SECONDS
        line = {
            "wall": time.time(),
            "monotonic": now,
            "phase": phase,
            "step": step,
            "steps": steps,
            "global_step": global_step,
            "doing": doing,
            "images_per_second": self.images_per_second,
            "host": os.uname().nodename,
            "pid": os.getpid(),
        }
        with suppress(OSError):  # nobody needs one after a power cut
            replace_text(self._path, json.dumps(line) + "\n", durable=False)
