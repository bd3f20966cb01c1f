"""Which samples make up the global batch of a step and how each is seen: a pure function of the step.

Position k = step * batch + row of an endless stream is sample `shuffled(k mod n)` of epoch k // n. The numbers that
place its view come from Philox keyed by (seed, epoch, sample id). No rank, worker or history enters, so a restart at
any step and any number of data ranks reproduce the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpl_scale.data.samples.order import shuffled
from mpl_scale.mesh import Mesh
from mpl_scale.philox import uniform_numpy

_CHUNK_ROWS = 4096  # rows planned at once: numpy's cost per call is spread over many steps


def rows_of_rank(batch: int, mesh: Mesh) -> np.ndarray:
    """The contiguous rows of a global batch that are a data rank's, int64 [batch / data]."""
    count = batch // mesh.data
    return np.arange(mesh.data_index * count, (mesh.data_index + 1) * count, dtype=np.int64)


@dataclass(frozen=True)
class Draws:
    """One step's samples on this rank."""

    ids: np.ndarray  # int64 [n], sample ids
    epochs: np.ndarray  # int64 [n]
    uniform: np.ndarray  # float64 [n, columns] in (0, 1), for the view


class SamplePlan:
    """The draws of some rows of every global batch."""

    def __init__(
        self,
        ids: np.ndarray,
        *,
        batch: int,
        rows: np.ndarray,
        columns: int,
        seed: int,
        order_stream: int,
        view_stream: int,
    ) -> None:
        """Args:
        ids: int64 [n], the sample ids to draw from.
        batch: images of the global batch.
        rows: int64 [r], this rank's rows of the global batch.
        columns: random numbers per image that the view needs.
        seed: the run's seed.
        order_stream: Philox stream of the epochs' orders.
        view_stream: Philox stream of the views.
        """
        self._ids, self._batch, self._rows, self._columns, self._seed = ids, batch, rows, columns, seed
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
        return Draws(planned.ids[part], planned.epochs[part], planned.uniform[part])

    def view_numbers(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The numbers that place the view of each sample in an epoch, float64 [n, columns].

        Args:
            ids: int64 [n], sample ids.
            epochs: int64 [n].
        """
        if not self._columns or not len(ids):
            return np.zeros((len(ids), self._columns))
        return uniform_numpy(seed=self._seed, stream=self._view_stream, epoch=epochs, ids=ids, columns=self._columns)

    def _draw_all(self, positions: np.ndarray) -> Draws:
        if not len(positions):
            return Draws(positions, positions, self.view_numbers(positions, positions))
        count = len(self._ids)
        epochs, index = np.divmod(positions, count)
        order = shuffled(index, size=count, seed=self._seed, epoch=epochs, stream=self._order_stream)
        ids = np.asarray(self._ids[order])
        return Draws(ids, epochs, self.view_numbers(ids, epochs))
