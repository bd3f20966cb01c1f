"""Which samples make up the global batch of a step and how each is seen: a pure function of the step.

Position k = step * batch + row of an endless stream is sample `shuffled(k mod n)` of epoch k // n. The crop window and
the flip come from Philox keyed by (seed, epoch, sample id). No rank, worker or history enters, so a restart at any step
and any number of data ranks reproduce the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpl_scale.config.schema import WeakConfig
from mpl_scale.data.order import shuffled
from mpl_scale.philox import uniform_numpy

_CHUNK_ROWS = 4096  # rows planned at once: numpy's cost per call is spread over many steps


@dataclass(frozen=True)
class Draws:
    """One step's samples on this rank."""

    ids: np.ndarray  # int64 [n], sample ids
    epochs: np.ndarray  # int64 [n]
    windows: np.ndarray  # int32 [n, 2], top and left of the crop window, pixels; may be negative
    flips: np.ndarray  # int32 [n], 1: mirrored


class SamplePlan:
    """The draws of some rows of every global batch."""

    def __init__(
        self,
        ids: np.ndarray,
        *,
        batch: int,
        rows: np.ndarray,
        weak: WeakConfig,
        seed: int,
        order_stream: int,
        view_stream: int,
    ) -> None:
        """Args:
        ids: int64 [n], the sample ids to draw from.
        batch: images of the global batch.
        rows: int64 [r], this rank's rows of the global batch.
        weak: the weak view.
        seed: the run's seed.
        order_stream: Philox stream of the epochs' orders.
        view_stream: Philox stream of windows and flips.
        """
        self._ids, self._batch, self._rows, self._weak, self._seed = ids, batch, rows, weak, seed
        self._order_stream, self._view_stream = order_stream, view_stream
        self._steps = max(1, _CHUNK_ROWS // max(1, len(rows)))
        self._chunk = -1
        self._planned: Draws | None = None

    def draw(self, step: int) -> Draws:
        """The draws of one step, in the order of the rows; cheap when steps are asked for in order."""
        chunk, offset = divmod(step, self._steps)
        if self._planned is None or chunk != self._chunk:
            steps = np.arange(chunk * self._steps, (chunk + 1) * self._steps, dtype=np.int64)
            self._planned = self._draw_all((steps[:, None] * self._batch + self._rows).ravel())
            self._chunk = chunk
        part = slice(offset * len(self._rows), (offset + 1) * len(self._rows))
        planned = self._planned
        return Draws(planned.ids[part], planned.epochs[part], planned.windows[part], planned.flips[part])

    def _draw_all(self, positions: np.ndarray) -> Draws:
        if not len(positions):
            return Draws(positions, positions, np.zeros((0, 2), np.int32), np.zeros(0, np.int32))
        count = len(self._ids)
        epochs, index = np.divmod(positions, count)
        order = shuffled(index, size=count, seed=self._seed, epoch=epochs, stream=self._order_stream)
        ids = self._ids[order]
        uniform = uniform_numpy(seed=self._seed, stream=self._view_stream, epoch=epochs, ids=ids, columns=3)
        pad = self._weak.pad
        windows = np.floor(uniform[:, :2] * (2 * pad + 1)).astype(np.int32) - pad
        flips = (uniform[:, 2] < 0.5) & self._weak.flip
        return Draws(ids, epochs, windows, flips.astype(np.int32))
