"""Philox streams of the data pipeline: one per purpose and phase, so that no two purposes share random numbers."""

from __future__ import annotations

from enum import IntEnum

STREAM_LIMIT = 1 << 24


class Purpose(IntEnum):
    """What a stream of random numbers is used for."""

    SPLIT = 0
    LABELLED_ORDER = 1
    LABELLED_VIEW = 2
    UNLABELLED_ORDER = 3
    UNLABELLED_VIEW = 4
    SELECTION = 5


def stream_of(purpose: Purpose, stream: int = 0) -> int:
    """The 32-bit stream: bit 31 set (data, not the networks), 7 bits of purpose, 24 bits of the caller's stream.

    Raises:
        ValueError: `stream` is outside [0, 2**24).
    """
    if not 0 <= stream < STREAM_LIMIT:
        raise ValueError(f"stream = {stream} is outside [0, {STREAM_LIMIT}); number the phases from 0")
    return 1 << 31 | purpose << 24 | stream
