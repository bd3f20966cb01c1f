"""Digests that tell the content of shards apart without reading terabytes: whole small files, samples of large ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

WHOLE = 1 << 24
"""Files up to this size are read whole."""
PIECES, PIECE = 64, 1 << 18
"""Of a larger file, this many pieces of this many bytes are read, evenly spaced from its first byte to its last."""
_SHORT = 64  # bytes of a file among many: in its middle


def digest_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's size and content, or of pieces of it. Raises OSError."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        found.update(f"{size} ".encode())
        whole = size <= WHOLE
        for number in range(1 if whole else PIECES):
            file.seek(number * (size - PIECE) // (PIECES - 1))
            found.update(file.read() if whole else file.read(PIECE))
    return found.hexdigest()


def middle_of(path: str | bytes) -> bytes:
    """Bytes in the middle of a file, where an image has pixels; nothing where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        try:
            return os.pread(descriptor, _SHORT, max(0, os.fstat(descriptor).st_size - _SHORT) // 2)
        finally:
            os.close(descriptor)
    except OSError:  # refused when the set was read, or gone: decoding says so
        return b""


def digest_of_folder(folder: str, names: Sequence[bytes]) -> str:
    """SHA-256 of the middles of a folder's files, in the given order."""
    found, here = hashlib.sha256(), os.fsencode(folder)
    for name in names:
        found.update(middle_of(os.path.join(here, name)) + b"\0")
    return found.hexdigest()
