"""Data sets of vectors instead of images, in memory: no files, no decoding, the same loader, order and splits.

The weak view of a vector is the vector; its strong view adds Gaussian noise (`mpl_scale.data.jitter`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mpl_scale.config.schema import Config
from mpl_scale.data.decode.quarantine import Quarantine
from mpl_scale.data.decode.views import View
from mpl_scale.data.registry import SOURCES
from mpl_scale.data.resident import ResidentImages, WholeSamples
from mpl_scale.data.samples.streams import Purpose, stream_of
from mpl_scale.data.transfer import to_device
from mpl_scale.packages import require_packages
from mpl_scale.philox import uniform_numpy

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
        """No sample id, int64 [0]: vectors are never refused."""
        return np.zeros(0, np.int64)

    def read(self, sample: int) -> np.ndarray:
        """Raises ValueError: vectors have no encoded images."""
        raise ValueError(
            f"mpl_scale.data.source = '{self.source}' has vectors, and this needs images; use another source"
        )

    def name(self, sample: int) -> str:
        """The source and the sample id."""
        return f"{self.source}:{sample}"

    def refusals(self, most: int) -> Mapping[str, str]:
        """No reasons: vectors are never refused."""
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
    require_packages([("mpl_scale.data.source = 'two_moons'", "sklearn")])
    from sklearn.datasets import make_moons

    points, labels = make_moons(2000, noise=0.1, random_state=0)
    return points.astype(np.float32), labels.astype(np.int64)


def input_shape(config: Config) -> tuple[int, ...]:
    """The shape of one sample as networks take it: (C, H, W), or (F,)."""
    length, model = LENGTHS.get(config.data.source), config.model
    return (model.in_chans, model.image_size, model.image_size) if length is None else (length,)


def resident_vectors(images: VectorSet, device: torch.device) -> ResidentImages:
    """The vectors as a resident set whose view is the vector itself."""
    ids = np.arange(len(images), dtype=np.int64)
    view = View(1, 0, (), lambda uniform, shapes: {}, interpolation=None)
    return ResidentImages(images, view, images.inputs.to(device), WholeSamples(), ids, frozenset(), Quarantine())


class Jitter:
    """The strong view of vectors: noise that depends on (seed, stream, epoch, id) alone, Box and Muller's of Philox."""

    def __init__(self, *, seed: int, stream: int, deviation: float) -> None:
        """Args:
        seed: the run's seed.
        stream: of the phase.
        deviation: standard deviation of the noise.
        """
        self._seed, self._stream, self._deviation = seed, stream_of(Purpose.UNLABELLED_VIEW, stream), deviation

    def __call__(self, inputs: torch.Tensor, ids: np.ndarray, epochs: np.ndarray) -> torch.Tensor:
        """Inputs float32 [n, F], of sample ids int64 [n] in epochs int64 [n], with noise."""
        if not self._deviation or not len(inputs):
            return inputs
        pairs = -(-inputs.shape[1] // 2)
        uniform = uniform_numpy(seed=self._seed, stream=self._stream, epoch=epochs, ids=ids, columns=2 * pairs)
        numbers = to_device(uniform.astype(np.float32), inputs.device)
        radius, angle = torch.sqrt(-2 * numbers[:, :pairs].log()), 2 * torch.pi * numbers[:, pairs:]
        noise = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, : inputs.shape[1]]
        return inputs + self._deviation * noise
