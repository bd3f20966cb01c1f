"""Images that stay decoded: uint8 in the device's memory, every view of them made there.

What no random number changes about a view is done once, when an image is decoded: it is resized to image_size. What is
left for each step is a window that may leave the image by `margin` pixels, and a mirroring. All windows of all images
are one strided view of the stored bytes, so that a batch is one `index_select` from it, and a second one of the rows to
mirror. The numbers are those of the path from files, and so are the bytes.

Bad images are found while the others are decoded. In each list (labelled, unlabelled, test) the next good image takes
the place of a bad one, as on the path from files (decode.py).

    stored bytes    guard | image 0: red, green, blue | image 1: ...
    of a plane      image_size + margin lines of image_size + margin bytes, the image in the upper left corner

The margin below one plane is the margin above the next one, and the margin to the right of one line is that to the left
of the next; the guard is the margin above the first plane.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.decode.pipeline import (
    Decoded,
    DecodePipeline,
    DecodeRequest,
    Decoding,
    Rows,
    candidates,
    no_substitute,
)
from mpl_scale.data.decode.quarantine import Quarantine
from mpl_scale.data.decode.views import View
from mpl_scale.data.registry import ImageSet
from mpl_scale.data.transfer import to_device

_DECODED_AT_ONCE = 512
_PLANNED_ROWS = 4096  # copied to the device at once: the cost of a copy, and numpy's per call, is spread over steps


@dataclass(frozen=True)
class Layout:
    """Where the pixels of an image lie in the stored bytes."""

    side: int
    margin: int
    channels: int = 3

    @property
    def line(self) -> int:
        """Bytes of a line of one channel, margin included."""
        return self.side + self.margin

    @property
    def plane(self) -> int:
        """Bytes of one channel, margins included."""
        return self.line**2

    @property
    def guard(self) -> int:
        """Bytes before the first image."""
        return self.margin * self.line + self.margin

    def bytes(self, images: int) -> int:
        """Bytes for a number of images."""
        return self.guard + images * self.channels * self.plane

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """The images in the stored bytes, uint8 [N, channels, side, side]."""
        planes = pixels[self.guard :].view(-1, self.channels, self.line, self.line)
        return planes[..., : self.side, : self.side]

    def windows(self, pixels: torch.Tensor) -> torch.Tensor:
        """All windows, uint8 [bytes, channels, side, side]: at place p those whose upper left pixel is byte p."""
        reach = (self.channels - 1) * self.plane + (self.side - 1) * (
            self.line + 1
        )  # from a window's first byte to its last
        shape = (len(pixels) - reach, self.channels, self.side, self.side)
        return pixels.as_strided(shape, (1, self.plane, self.line, 1))

    def place(self, rows: np.ndarray, corners: np.ndarray | None) -> np.ndarray:
        """The windows at corners int [n, 2], (top, left), of images `rows`, int64 [n]; None: at (0, 0)."""
        places = self.guard + rows * (self.channels * self.plane)
        return places if corners is None else places + corners[:, 0] * self.line + corners[:, 1]


class Places(Protocol):
    """Where what a step sees of the stored samples lies."""

    def windows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Everything that can be gathered, [places, ...]: row p is what lies at place p."""

    def place(self, rows: np.ndarray, corners: np.ndarray | None) -> np.ndarray:
        """int64 [n], of samples `rows`, int64 [n], at corners int [n, 2]; None: whole ones."""


class WholeSamples:
    """Places of samples without windows, such as vectors: their rows."""

    def windows(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def place(self, rows: np.ndarray, corners: np.ndarray | None) -> np.ndarray:
        assert corners is None
        return rows


def stored_view(view: View) -> View | None:
    """The part of a view that no random number changes; None: none does, so its images cannot be kept."""
    if not view.columns:
        return view
    if view.margin is None:
        return None
    return replace(view, columns=0, steps=(), place=lambda uniform, shapes: {})


def stored_bytes(view: View, images: int, *, channels: int) -> int:
    """Bytes for a number of images, for a view that has a `stored_view`."""
    return _layout(view, channels).bytes(images)


def _layout(view: View, channels: int) -> Layout:
    return Layout(view.image_size, view.margin or 0, channels)


@dataclass(frozen=True)
class ResidentImages:
    """Decoded images of one or more lists, for one view; or vectors, whose view is the vector.

    pixels: uint8, as `Layout` says; of vectors floating point [N, F], what networks are given.
    places: of what is seen.
    ids: int64 [N], sorted, of which images they are.
    bad: those ids that cannot be decoded; their pixels are another image's.
    quarantine: where these are kept; it counts what is drawn.
    """

    images: ImageSet
    view: View
    pixels: torch.Tensor
    places: Places
    ids: np.ndarray
    bad: frozenset[int]
    quarantine: Quarantine

    @classmethod
    def decode(
        cls,
        images: ImageSet,
        lists: Sequence[np.ndarray],
        *,
        view: View,
        config: DataConfig,
        device: torch.device,
        quarantine: Quarantine,
    ) -> ResidentImages:
        """Decode each image once.

        Args:
            images: the data set.
            lists: int64 [n] each, sorted sample ids.
            view: how they will be seen; it has a `stored_view`.
            config: `threads` and `max_pixels` are read.
            device: where they are kept.
            quarantine: where bad images are kept.

        Raises:
            ValueError: a hundred images in a row cannot be decoded; it names the first ones.
        """
        kept = stored_view(view)
        assert kept is not None
        ids = lists[0] if len(lists) == 1 else np.unique(np.concatenate(lists))
        layout = _layout(view, config.decoded_channels)
        pixels = torch.full((layout.bytes(len(ids)),), view.fill, dtype=torch.uint8, device=device)
        chunks = [ids[first : first + _DECODED_AT_ONCE] for first in range(0, len(ids), _DECODED_AT_ONCE)]
        decoder = DecodePipeline(
            ([Rows(chunk, np.zeros((len(chunk), 0)), ids)] for chunk in chunks),
            images=images,
            view=kept,
            capacity=_DECODED_AT_ONCE,
            device=device,
            quarantine=quarantine,
            decoding=Decoding.of(config, count_draws=False),
        )
        try:
            bad: list[int] = []
            for chunk, out in zip(chunks, layout.images(pixels).split(_DECODED_AT_ONCE), strict=True):
                decoded = decoder.next()
                out.copy_(decoded.views)
                bad += chunk[decoded.samples != chunk].tolist()
        finally:
            decoder.close()
        return cls(images, view, pixels, layout, ids, frozenset(bad), quarantine)

    @cached_property
    def _row_of_id(self) -> np.ndarray:
        """int32 [last id - first id + 1], the row of each id: a search takes a hundred times longer."""
        rows = np.zeros(self.ids[-1] - self.ids[0] + 1, np.int32)
        rows[self.ids - self.ids[0]] = np.arange(len(self.ids))
        return rows

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Positions in memory of the images with these ids, int64 [n]."""
        return self._row_of_id[samples - self.ids[0]].astype(np.int64)

    def used(self, rows: Rows) -> np.ndarray:
        """The ids that are seen for those drawn: the same, but for substitutes. ValueError where there are none."""
        if not self.bad or self.bad.isdisjoint(rows.samples.tolist()):
            return rows.samples
        return np.array([self._substitute(sample, rows.pool) for sample in rows.samples.tolist()], np.int64)

    def _substitute(self, sample: int, pool: np.ndarray) -> int:
        for candidate in candidates(sample, pool):
            if candidate not in self.bad:
                return candidate
        raise no_substitute(self.images, sample, pool, quarantine=self.quarantine)


class _Planned(NamedTuple):
    """One request, on the device."""

    places: torch.Tensor  # int64 [n], of the windows
    mirrored: torch.Tensor  # int64 [m], rows
    labels: torch.Tensor  # int64 [n of the first list]
    asked: np.ndarray  # int64 [n], ids
    used: np.ndarray


class ResidentViews:
    """A ViewSource of resident images: several requests are planned and copied to the device at once."""

    def __init__(self, requests: Iterator[DecodeRequest], resident: ResidentImages) -> None:
        """Args:
        requests: one per batch, endless or not; consumed several at a time.
        resident: the images they ask for.
        """
        self._requests, self._resident = requests, resident
        self._device = resident.pixels.device
        self._windows = resident.places.windows(resident.pixels)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # batches may be made on another one
        self._planned: deque[_Planned] = deque()

    def next(self) -> Decoded:
        """The views of the next request, on the device and the caller's own.

        Raises:
            StopIteration: the requests have ended.
            ValueError: too many images are bad; it names the first ones.
        """
        if not self._planned:
            self._plan()
        places, mirrored, labels, asked, used = self._planned.popleft()
        self._resident.quarantine.count_draws(asked, used)
        views = self._windows.index_select(0, places)
        if len(mirrored):
            views.index_copy_(0, mirrored, views.index_select(0, mirrored).flip(3))
        return Decoded(views, used, labels)

    def close(self) -> None:
        """Forget the planned rows."""
        self._planned.clear()

    def _plan(self) -> None:
        """The next requests, as many as have about _PLANNED_ROWS rows: in one copy to the device."""
        requests = [next(self._requests)]
        rows = size = sum(len(part.samples) for part in requests[0])
        while rows + size <= _PLANNED_ROWS and (request := next(self._requests, None)) is not None:
            requests.append(request)
            rows += sum(len(part.samples) for part in request)
        resident, view = self._resident, self._resident.view
        used = [[resident.used(part) for part in request] for request in requests]
        samples = [np.concatenate(parts) for parts in used]
        counts = [len(ids) for ids in samples]
        uniform = np.concatenate([part.uniform for request in requests for part in request])
        shapes = np.broadcast_to(np.int64(view.image_size), (len(uniform), 2))
        placement = view.place(uniform, shapes) if view.columns else {}
        places = resident.places.place(resident.rows(np.concatenate(samples)), placement.get("windows"))
        flips = placement.get("flips", np.zeros(len(uniform), np.int32))
        mirrored = [np.flatnonzero(part) for part in np.split(flips, np.cumsum(counts)[:-1])]
        labels = [np.asarray(resident.images.labels[parts[0]], np.int64) for parts in used]
        kinds = [[places], mirrored, labels]
        lengths = [counts, [len(part) for part in mirrored], [len(part) for part in labels]]
        packed = to_device(np.concatenate([part for kind in kinds for part in kind]), self._device)
        parts = iter(packed.split([length for kind in lengths for length in kind]))
        on_device = [list(itertools.islice(parts, len(requests))) for _ in kinds]
        asked = [np.concatenate([part.samples for part in request]) for request in requests]
        self._planned.extend(map(_Planned, *on_device, asked, samples))
