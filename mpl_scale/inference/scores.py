"""Score every image of a set with a network: softmax probabilities of its most probable classes, chunk by chunk.

A chunk is a fixed range of sample ids and leaves one file, scores-NNNNNN.npy, by a rename; so a stopped run resumes
with the chunks that are missing, on any number of ranks. Batches never cross chunks: what a chunk's file holds does not
depend on who made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mpl_scale.config import Config
from mpl_scale.data import ImageSet, Quarantine
from mpl_scale.data.decode.pipeline import DecodePipeline, DecodeRequest, Decoding, Rows
from mpl_scale.data.decode.views import evaluation_view
from mpl_scale.data.normalise import Normalise
from mpl_scale.files import replacing, save_array

_NEAR = 1000


class Column(NamedTuple):
    """Something else that is kept of each image.

    dtype: a field of the score files. values: of ids int64 [n] and logits float32 [n, K], an array [n, ...].
    """

    dtype: tuple[str, str] | tuple[str, str, tuple[int, ...]]
    values: Callable[[np.ndarray, torch.Tensor], np.ndarray]


@dataclass(frozen=True)
class ScoreFiles:
    """The chunks of `count` samples, `size` each, and their files in `folder`; `top` classes are kept of each image."""

    folder: Path
    count: int
    size: int
    top: int
    columns: tuple[Column, ...] = ()

    @property
    def chunks(self) -> int:
        """Number of chunks, the last of which may be shorter."""
        return -(-self.count // self.size)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a row: classes by falling probability, all -1 where the image could not be read."""
        fields = [("classes", "<i4", (self.top,)), ("probabilities", "<f4", (self.top,))]
        return np.dtype([*fields, *(column.dtype for column in self.columns)])

    def ids(self, chunk: int) -> np.ndarray:
        """Sample ids of a chunk, int64."""
        return np.arange(chunk * self.size, min((chunk + 1) * self.size, self.count), dtype=np.int64)

    def missing(self) -> list[int]:
        """Chunks without a whole file."""
        return [chunk for chunk in range(self.chunks) if not self._is_whole(chunk)]

    def write(self, chunk: int, rows: np.ndarray) -> None:
        """Leave the file of a chunk."""
        with replacing(self._path(chunk)) as draft:
            save_array(draft, rows)

    def read(self, chunk: int) -> np.ndarray:
        """A chunk's rows, memory-mapped."""
        return np.load(self._path(chunk), mmap_mode="r")

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The rows of some images, int64 [m] ascending."""
        rows = np.empty(len(ids), self.dtype)
        bounds = np.searchsorted(ids, np.arange(self.chunks + 1) * self.size)
        for chunk in range(self.chunks):
            own = slice(bounds[chunk], bounds[chunk + 1])
            rows[own] = self.read(chunk)[ids[own] - chunk * self.size]
        return rows

    def _path(self, chunk: int) -> Path:
        return self.folder / f"scores-{chunk:06d}.npy"

    def _is_whole(self, chunk: int) -> bool:
        try:
            rows = self.read(chunk)
        except (OSError, ValueError, EOFError):
            return False
        return rows.dtype == self.dtype and len(rows) == len(self.ids(chunk))


@dataclass(frozen=True)
class Scorer:
    """Leaves the files of chunks. Images are seen as `data.evaluation` says; what the set refused is left out.

    files: where scores go. images: the set. module: the network, on the device, in evaluation mode. config: its
    `model` and `data` sections are read. channels_last: memory layout of the images.
    """

    files: ScoreFiles
    images: ImageSet
    module: nn.Module
    config: Config
    device: torch.device
    channels_last: bool = False

    def score(
        self, chunks: Sequence[int], *, quarantine: Quarantine, report: Callable[[int], None] = lambda images: None
    ) -> None:
        """Score some chunks.

        Args:
            chunks: by number.
            quarantine: where images that cannot be read or decoded are kept.
            report: told after each batch how many images are done.

        Raises:
            ValueError: too many images are bad, or the network gives non-finite values.
        """
        data = self.config.data
        batches = {chunk: self._batches(chunk) for chunk in chunks}
        decoder = DecodePipeline(
            self._requests(batches),
            images=self.images,
            view=evaluation_view(data.evaluation, self.config.model.image_size),
            capacity=data.evaluation_batch,
            device=self.device,
            quarantine=quarantine,
            decoding=Decoding.of(data, channels_last=self.channels_last),
        )
        normalise = Normalise(data, device=self.device, dtype=torch.float32, channels_last=self.channels_last)
        done = 0
        try:
            for chunk in chunks:
                rows = np.zeros(len(self.files.ids(chunk)), self.files.dtype)
                rows["classes"] = -1
                for ids in batches[chunk]:
                    decoded = decoder.next()
                    logits = _logits(self.module, normalise(decoded.views))
                    best = logits.softmax(1).topk(self.files.top, dim=1)
                    good = np.flatnonzero(decoded.samples == ids)  # the others are substitutes
                    own = ids[good] - chunk * self.files.size
                    rows["classes"][own] = best.indices.cpu().numpy()[good]
                    rows["probabilities"][own] = best.values.cpu().numpy()[good]
                    for column in self.files.columns:
                        rows[column.dtype[0]][own] = column.values(ids[good], logits[good])
                    done += len(ids)
                    report(done)
                self.files.write(chunk, rows)
        finally:
            decoder.close()

    def _requests(self, batches: Mapping[int, Sequence[np.ndarray]]) -> Iterator[DecodeRequest]:
        for chunk, own in batches.items():
            for ids in own:
                yield [Rows(ids, np.zeros((len(ids), 0)), self._substitutes(chunk))]

    def _substitutes(self, chunk: int) -> np.ndarray:
        """What is decoded in the place of a bad image: the chunk's images, and some before it: it may be short."""
        ids = self.files.ids(chunk)
        near = np.arange(max(0, int(ids[0]) - _NEAR), int(ids[-1]) + 1, dtype=np.int64)
        return np.setdiff1d(near, self.images.refused, assume_unique=True)

    def _batches(self, chunk: int) -> list[np.ndarray]:
        size = self.config.data.evaluation_batch
        ids = np.setdiff1d(self.files.ids(chunk), self.images.refused, assume_unique=True)
        return [ids[start : start + size] for start in range(0, len(ids), size)]


@torch.no_grad()
def _logits(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """float32 [n, K]."""
    logits: torch.Tensor = module(images).float()
    if not torch.isfinite(logits).all():
        raise ValueError("the network's logits are not finite; take an earlier checkpoint")
    return logits
