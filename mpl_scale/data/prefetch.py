"""The next batch while this one is trained on: decoded and augmented on a CUDA stream of its own.

DALI decodes ahead by itself. What follows it (strong views) is a few milliseconds of kernels that would otherwise wait
behind the step's graph, and the step behind them. On a CPU there is nothing to overlap: a pass-through.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol, Self

import torch

from mpl_scale.types import Batch

SETTLING_SECONDS = 1.0
"""After which DALI's threads are idle, their queue full."""


class Loader(Protocol):
    """An iterator over batches that can be closed."""

    def __next__(self) -> Batch: ...

    def close(self) -> None:
        """Stop reading ahead."""


class Prefetcher(Iterator[Batch]):
    """An iterator over a loader's batches, in order, one batch ahead on a GPU.

    Args:
        loader: its `__next__` runs on the side stream.
        device: of the batches.

    A loader's error is raised by the call that would return its batch, not by the one before.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | Exception | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            return next(self._loader)
        batch = self._ahead or self._fetch(self._stream)
        if isinstance(batch, Exception):
            raise batch
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in batch.tensors().values():
            tensor.record_stream(current)  # its memory is not reused before the step has read it
        self._ahead = self._fetch(self._stream)
        return batch

    def _fetch(self, stream: torch.cuda.Stream) -> Batch | Exception:
        try:
            with torch.cuda.stream(stream):
                return next(self._loader)
        except Exception as error:  # of any kind: raised when its turn comes
            return error

    def settle(self) -> None:
        """Return once what was read ahead is made; nothing more is read until the next call.

        DALI has no call that waits for its threads, so this sleeps: for a capture, once a phase.
        """
        if self._stream is not None:
            self._stream.synchronize()
            time.sleep(SETTLING_SECONDS)

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead = None
        self._loader.close()
