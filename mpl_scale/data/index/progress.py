"""How far the building of an index has come: a bar on a terminal, plain lines elsewhere.

The lines are not tqdm's: it separates its updates by carriage returns, so that a log file gets one endless line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

SECONDS = 5.0
"""Between lines."""


class IndexProgress:
    """Call it as indexing.Report; close it at the end."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._shown: float | None = None
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int, images: int) -> None:
        """`done` of `total` shards are scanned and hold `images` images."""
        if self._stream.isatty():
            if self._bar is None:
                self._bar = tqdm(total=total, desc="index", unit="shard", file=self._stream, dynamic_ncols=True)
            self._bar.set_postfix_str(f"{images:,} images", refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = self._clock()
        if done == total or self._shown is None or now - self._shown >= SECONDS:
            self._shown = now
            print(f"[index {done}/{total} shards] {images:,} images", file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
