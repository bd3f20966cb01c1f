"""One run at a time in an output folder: a second one waits for the first to end, or gives up with its name.

A launcher that is killed can leave ranks behind, which train and save for a while; a new run that resumed beside them
would see checkpoints come and go. The lock is the operating system's (flock) and goes with the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mpl_scale.checkpoint import CheckpointError
from mpl_scale.files import lock

LOCK_NAME = ".lock"
POLL_SECONDS = 0.5


def lock_output(folder: Path, *, patience: float, note: Callable[[str], None]) -> IO[str]:
    """Take the lock of an output folder, which is made; it is held until the file is closed or the process ends.

    Args:
        folder: of the run.
        patience: seconds to wait for another run.
        note: told once, if there is one.

    Raises:
        CheckpointError: the other run is still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    deadline = time.monotonic() + patience
    waited = False
    while True:
        try:
            file = lock(path, wait=False)
            break
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8").strip() or "another process"
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    f"--output {folder} is in use by {holder}; stop that run, or choose another folder"
                ) from None
            if not waited:
                note(f"waiting for {holder} to leave {folder}")
            waited = True
            time.sleep(POLL_SECONDS)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file
