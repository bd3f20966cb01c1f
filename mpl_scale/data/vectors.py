"""Data sets of vectors instead of images, in memory: no files, no decoding, the same order of samples and splits.

The weak view of a vector is the vector; its strong view adds Gaussian noise (`mpl_scale.data.jitter`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from mpl_scale.config.schema import Config, DataConfig
from mpl_scale.data.plan import Draws, SamplePlan, rows_of_rank
from mpl_scale.data.registry import SOURCES
from mpl_scale.data.splits import Splits
from mpl_scale.data.streams import Purpose, stream_of
from mpl_scale.mesh import Mesh
from mpl_scale.philox import uniform_numpy
from mpl_scale.types import Batch

LENGTHS: dict[str, int] = {}
"""Numbers of a sample, by source; all other sources are of images."""

MakeVectors = Callable[[], tuple[np.ndarray, np.ndarray]]
"""() -> inputs float32 [N, length], labels int64 [N] in [0, classes)."""


@dataclass(frozen=True)
class VectorSet:
    """An ImageSet of vectors: `inputs` are what a network sees."""

    source: str
    inputs: torch.Tensor  # float32 [N, F]
    labels: np.ndarray  # int64 [N]
    classes: tuple[str, ...]

    bad = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2]: 1 and F."""
        return np.full((len(self), 2), (1, self.inputs.shape[1]), np.int32)

    @property
    def refused(self) -> np.ndarray:
        """int64 [0]."""
        return np.zeros(0, np.int64)

    def read(self, sample: int) -> np.ndarray:
        """Nothing is encoded."""
        raise ValueError(
            f"mpl_scale.data.source = '{self.source}' has vectors, and this needs images; use another source"
        )

    def name(self, sample: int) -> str:
        """Source and number."""
        return f"{self.source}:{sample}"

    def refusals(self, most: int) -> Mapping[str, str]:
        """None."""
        return {}


def register_vectors(name: str, *, length: int, classes: int) -> Callable[[MakeVectors], MakeVectors]:
    """Make a function `() -> (inputs, labels)` available as `mpl_scale.data.source`."""

    def add(make: MakeVectors) -> MakeVectors:
        def load(root: object) -> VectorSet:
            if root is not None:
                raise ValueError(f"mpl_scale.data.root = '{root}', but source '{name}' reads no files; remove root")
            inputs, labels = make()
            return VectorSet(name, torch.from_numpy(inputs), labels, tuple(map(str, range(classes))))

        SOURCES[name] = load
        LENGTHS[name] = length
        return make

    return add


@register_vectors("two_moons", length=2, classes=2)
def two_moons() -> tuple[np.ndarray, np.ndarray]:
    """2,000 points in two clusters (section 3.1); their noise, 0.1, is open in the paper."""
    try:
        from sklearn.datasets import make_moons
    except ImportError as error:
        raise ValueError(
            "mpl_scale.data.source = 'two_moons' is drawn by scikit-learn, which is not installed; "
            "pip install mpl-scale[digits]"
        ) from error
    points, labels = make_moons(2000, noise=0.1, random_state=0)
    return points.astype(np.float32), labels.astype(np.int64)


def input_shape(config: Config) -> tuple[int, ...]:
    """The shape of one sample as networks take it: (3, H, W), or (F,)."""
    length = LENGTHS.get(config.data.source)
    return (3, config.model.image_size, config.model.image_size) if length is None else (length,)


def jittered(inputs: torch.Tensor, draws: Draws, *, seed: int, stream: int, deviation: float) -> torch.Tensor:
    """Vectors with noise that depends on (seed, stream, epoch, id) alone: Box and Muller's, of Philox numbers.

    Args:
        inputs: float32 [n, F].
        draws: whose vectors they are.
        seed: the run's seed.
        stream: of the phase.
        deviation: standard deviation of the noise.
    """
    if not deviation or not len(inputs):
        return inputs
    pairs = -(-inputs.shape[1] // 2)
    number = stream_of(Purpose.UNLABELLED_VIEW, stream)
    uniform = uniform_numpy(seed=seed, stream=number, epoch=draws.epochs, ids=draws.ids, columns=2 * pairs)
    numbers = torch.from_numpy(uniform.astype(np.float32))
    radius, angle = torch.sqrt(-2 * numbers[:, :pairs].log()), 2 * torch.pi * numbers[:, pairs:]
    noise = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, : inputs.shape[1]]
    return inputs + deviation * noise


class VectorLoader:
    """An endless iterator of `Batch`: what loader.TrainLoader is for images."""

    def __init__(
        self,
        *,
        config: DataConfig,
        splits: Splits,
        labelled_batch: int,
        unlabelled_batch: int,
        mesh: Mesh,
        seed: int,
        stream: int,
        start_step: int,
    ) -> None:
        """The arguments are TrainLoader's."""
        assert isinstance(splits.images, VectorSet)
        self._images, self._config, self._device = splits.images, config, mesh.device
        self._seed, self._stream, self._step = seed, stream, start_step
        self._labelled = self._plan(splits.labelled, labelled_batch, mesh, Purpose.LABELLED_ORDER)
        self._unlabelled = self._plan(splits.unlabelled, unlabelled_batch, mesh, Purpose.UNLABELLED_ORDER)
        self._rows = tuple(
            torch.from_numpy(rows_of_rank(n, mesh)).to(mesh.device) for n in (labelled_batch, unlabelled_batch)
        )

    def _plan(self, ids: np.ndarray, batch: int, mesh: Mesh, purpose: Purpose) -> SamplePlan:
        order = stream_of(purpose, self._stream)
        rows = rows_of_rank(batch, mesh)
        return SamplePlan(
            ids, batch=batch, rows=rows, columns=0, seed=self._seed, order_stream=order, view_stream=order
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next step's batch."""
        labelled, unlabelled = self._labelled.draw(self._step), self._unlabelled.draw(self._step)
        self._step += 1
        seen, weak = self._inputs(labelled), self._inputs(unlabelled)
        if self._config.labelled_view == "strong":
            seen = self._strong(seen, labelled)
        return Batch(
            labelled=seen.to(self._device),
            labels=torch.from_numpy(self._images.labels[labelled.ids]).to(self._device),
            labelled_rows=self._rows[0],
            weak=weak.to(self._device),
            strong=self._strong(weak, unlabelled).to(self._device),
            unlabelled_rows=self._rows[1],
        )

    def _inputs(self, draws: Draws) -> torch.Tensor:
        return self._images.inputs[torch.from_numpy(draws.ids)]

    def _strong(self, inputs: torch.Tensor, draws: Draws) -> torch.Tensor:
        return jittered(inputs, draws, seed=self._seed, stream=self._stream, deviation=self._config.jitter)

    def close(self) -> None:
        """Nothing is read ahead."""
