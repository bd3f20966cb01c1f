"""Open files, kept open: reading a sample is one pread, from any thread."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

MOST_OPEN = 256
"""Files kept open per image set; the usual limit of a process is 1,024."""


class Descriptors:
    """A cache of read-only file descriptors, the longest unused closed first.

    A descriptor is closed when nobody holds it any more, so one that falls out of the cache while another thread reads
    from it stays valid for that read. pread has no position, so threads, and processes after a fork, do not disturb
    each other.
    """

    def __init__(self, most: int = MOST_OPEN) -> None:
        self._most = most
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, *, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on; fewer where the file ends. Raises OSError."""
        descriptor = self._get(path)
        content = os.pread(descriptor.number, length, offset)
        while len(content) < length:  # a signal, or a file system that answers in pieces
            more = os.pread(descriptor.number, length - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    def _get(self, path: str) -> _Descriptor:
        with self._lock:
            found = self._open.get(path)
            if found is not None:
                self._open.move_to_end(path)
                return found
        opened = _Descriptor(path)  # outside the lock: a slow file system must not hold the other threads
        with self._lock:
            self._open[path] = opened
            if len(self._open) > self._most:
                self._open.popitem(last=False)
        return opened


def read_file(path: str) -> bytes:
    """A whole file; a pipe that nobody writes to reads as empty, instead of holding the run. Raises OSError."""
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read() or b""


class _Descriptor:
    """An open file, closed with the last reference."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
