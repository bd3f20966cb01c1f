"""Sample ids to uint8 views, a few batches ahead, with the next good image in the place of each bad one.

An image is bad for a view when its file cannot be read, its header fails the probe, or DALI cannot decode the part that
the view shows. DALI gives up on the whole pipeline then, with all batches in flight: the culprit is found, the pipeline
is built anew, and the same batches are asked for again. The substitute is the next id of the list the image was drawn
from; it is seen as the bad image would have been (the same random numbers), as if its file stood there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np
import torch

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.decode.quarantine import Quarantine
from mpl_scale.data.decode.resize import Resizer
from mpl_scale.data.decode.views import Placement, View, decoding_steps
from mpl_scale.data.encoded.header import MOST_PIXELS, UnreadableImage
from mpl_scale.data.encoded.other_formats import pil_decode
from mpl_scale.data.encoded.probe import DecodeError, for_dali, pam_pixels, unreadable_error
from mpl_scale.data.registry import ImageSet

if TYPE_CHECKING:
    from mpl_scale.data.decode.dali import Graph

LONGEST_RUN = 100
"""Bad images in a row of a list before it is given up: no substitute is far away in a set that is any good."""
_TINY = (np.zeros(2, np.int32), np.ones(2, np.int32))  # the crop that any other crop needs, too
_UNDECODABLE = "DALI cannot decode it"
_PARTLY_UNDECODABLE = "DALI cannot decode the part that is seen"


class Rows(NamedTuple):
    """The images of a batch that come from one list, and their random numbers."""

    samples: np.ndarray  # int64 [n], sample ids
    uniform: np.ndarray  # float64 [n, the view's columns], in (0, 1)
    pool: np.ndarray  # int64 [N], the list, sorted: where substitutes come from


DecodeRequest = Sequence[Rows]
"""What one batch is made of."""


class Decoded(NamedTuple):
    """One batch of decoded views."""

    views: torch.Tensor  # uint8 [n, 3 or in_chans, H, W]
    samples: np.ndarray  # int64 [n], the ids that were decoded: those of the request, but for substitutes
    labels: torch.Tensor | None = None  # int64 [n of the first list], on the device; None: not looked up


class ViewSource(Protocol):
    """The views of one request after another: decoded from files, or made from resident images (resident.py)."""

    def next(self) -> Decoded:
        """The views of the next request, on the device and the caller's own.

        Raises:
            StopIteration: the requests have ended.
            ValueError: too many images are bad; it names the first ones.
        """

    def close(self) -> None:
        """Stop working ahead; `next` may not be called again."""


def grey_of(views: torch.Tensor) -> torch.Tensor:
    """PIL's convert("L") in each of three channels: uint8 [n, 3, H, W], contiguous as it was. Grey views stay."""
    red, green, blue = views.to(torch.int32).unbind(1)
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return torch.empty_like(views).copy_(grey.unsqueeze(1))


def candidates(sample: int, pool: np.ndarray) -> Iterator[int]:
    """The sample itself, then those that may take its place: the next ids of the sorted list it was drawn from."""
    place = int(np.searchsorted(pool, sample))
    yield sample
    for step in range(1, min(LONGEST_RUN, len(pool))):
        yield int(pool[(place + step) % len(pool)])


def no_substitute(images: ImageSet, sample: int, pool: np.ndarray, *, quarantine: Quarantine) -> ValueError:
    """The error where none of candidates(sample, pool) can be decoded; it names those."""
    reasons = {
        images.name(candidate): quarantine.bad.get(candidate, _PARTLY_UNDECODABLE)
        for candidate in candidates(sample, pool)
    }
    return ValueError(
        f"{len(reasons)} images in a row cannot be read or decoded, of a list of {len(pool)}: "
        f"{unreadable_error(reasons)}"
    )


@dataclass
class _Batch:
    """A request on its way through DALI."""

    request: DecodeRequest
    samples: list[int]
    encoded: list[np.ndarray]
    placement: Placement

    def crop(self, row: int) -> tuple[np.ndarray, np.ndarray] | None:
        return _crop(self.placement, row)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How files are decoded.

    threads: of the CPU. prefetch: batches prepared ahead. max_pixels: larger images are bad. channels_last: memory
    layout of the views. dali_resizes: whether DALI resizes, too; None: on a GPU. count_draws: whether the quarantine
    counts the images, and ends the run where too many are bad. grey: whether the views' three channels are one grey
    value, as PIL's mode L has it. channels: of the views; where they are not 3, images are raw pixels (`pam`), and
    nothing is decoded.
    """

    threads: int = 1
    prefetch: int = 1
    max_pixels: int = MOST_PIXELS
    channels_last: bool = False
    dali_resizes: bool | None = None
    count_draws: bool = True
    grey: bool = False
    channels: int = 3

    @classmethod
    def of(cls, config: DataConfig, *, channels_last: bool = False, count_draws: bool = True) -> Self:
        """As the data section says."""
        return cls(
            threads=config.threads,
            prefetch=config.prefetch,
            max_pixels=config.max_pixels,
            channels_last=channels_last,
            count_draws=count_draws,
            grey=len(config.mean) == 1,
            channels=config.decoded_channels,
        )


class DecodePipeline:
    """Runs requests through DALI, reading and decoding a few ahead."""

    def __init__(
        self,
        requests: Iterator[DecodeRequest],
        *,
        images: ImageSet,
        view: View,
        capacity: int,
        device: torch.device,
        quarantine: Quarantine | None = None,
        decoding: Decoding = Decoding(),
    ) -> None:
        """Args:
        requests: one per batch, endless or not; consumed up to `prefetch` + 1 batches ahead of `next`, on a CPU by
            another thread.
        images: what the requests' samples are.
        view: how they are seen.
        capacity: most images of a request; 0: nothing is decoded, and requests are consumed one by one.
        device: cpu or cuda.
        quarantine: where bad images are kept; None: in a list of its own.
        decoding: how.
        """
        self._requests, self._images, self._view = requests, images, view
        self._capacity, self._device, self._decoding = capacity, device, decoding
        self._quarantine = quarantine or Quarantine()
        self._layout = torch.channels_last if decoding.channels_last else torch.contiguous_format
        self._in_flight: deque[_Batch] = deque()
        self._again: deque[DecodeRequest] = deque()  # what was in flight when DALI gave up
        on_device = device.type == "cuda" if decoding.dali_resizes is None else decoding.dali_resizes
        self._dali_resizes = on_device and decoding.channels == 3
        self._steps = decoding_steps(view, resizes=self._dali_resizes)
        self._resizer = Resizer(view, threads=decoding.threads, layout=self._layout)
        # One thread, so that one batch at a time is worked on; while it has failed, nothing is.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="decode") if device.type == "cpu" else None
        self._graph: Graph | None = None
        self._ahead: Future[torch.Tensor] | None = None

    def next(self) -> Decoded:
        """The views of the next request, on the device and the caller's own.

        Raises:
            StopIteration: the requests have ended.
            ValueError: too many images are bad; it names the first ones.
        """
        if not self._capacity:
            next(self._requests)
            size = self._view.image_size
            shape = (0, self._decoding.channels, size, size)
            return Decoded(torch.empty(shape, dtype=torch.uint8, device=self._device), np.zeros(0, np.int64))
        while True:
            try:
                views = self._views()
                break
            except DecodeError as error:
                self._graph = None  # before another one is built
                self._find_culprits(error)
                self._again.extendleft(batch.request for batch in reversed(self._in_flight))
                self._in_flight.clear()
        batch = self._in_flight.popleft()
        if self._worker is not None:
            self._ahead = self._worker.submit(self._make)
        asked, used = np.concatenate([rows.samples for rows in batch.request]), np.array(batch.samples, np.int64)
        if self._decoding.count_draws:
            self._quarantine.count_draws(asked, used)
        return Decoded(grey_of(views) if self._decoding.grey else views, used)

    def close(self) -> None:
        """Stop all threads and free DALI's buffers; `next` may not be called again."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
        self._resizer.close()
        self._graph = None

    def _views(self) -> torch.Tensor:
        """The views of the oldest batch in flight: what the other thread has made ahead, or made now."""
        if self._worker is None:
            return self._make()
        ahead, self._ahead = self._ahead or self._worker.submit(self._make), None
        return ahead.result()

    def _make(self) -> torch.Tensor:
        if self._decoding.channels != 3:
            self._read_next()
            batch = self._in_flight[-1]
            parts = [_part(pixels, batch.crop(row)) for row, pixels in enumerate(batch.encoded)]
            return self._resizer(parts, batch.placement).to(self._device)
        if self._graph is None:
            from mpl_scale.data.decode.dali import Graph  # imports DALI: a run that decodes nothing does without it

            self._graph = Graph(
                self._read_next,
                view=self._view,
                resizes=self._dali_resizes,
                capacity=self._capacity,
                device=self._device,
                threads=self._decoding.threads,
                prefetch=self._decoding.prefetch,
            )
        images = self._graph.run()
        if isinstance(images, torch.Tensor):
            # DALI reuses its buffer: copy, into the layout of the networks.
            return images.permute(0, 3, 1, 2).clone(memory_format=self._layout)
        return self._resizer(images, self._in_flight[0].placement)

    def _read_next(self) -> list[object]:
        batch = self._prepare(self._again.popleft() if self._again else next(self._requests))
        self._in_flight.append(batch)
        return [batch.encoded, *(batch.placement[step] for step in self._steps)]

    def _prepare(self, request: DecodeRequest) -> _Batch:
        """Read every file of a request, or the one that takes its place, and place the view on it."""
        samples: list[int] = []
        encoded: list[np.ndarray] = []
        shapes: list[tuple[int, int]] = []
        for rows in request:
            for row, sample in enumerate(rows.samples.tolist()):
                chosen, file, shape = self._readable(sample, rows.uniform[row], rows.pool)
                samples.append(chosen)
                encoded.append(file)
                shapes.append(shape)
        uniform = np.concatenate([rows.uniform for rows in request])
        return _Batch(request, samples, encoded, self._view.place(uniform, np.array(shapes, np.int64)))

    def _readable(self, sample: int, uniform: np.ndarray, pool: np.ndarray) -> tuple[int, np.ndarray, tuple[int, int]]:
        """The first image of the pool from `sample` on that is not known to be bad for this view.

        Returns its id, its encoded bytes, and the height and width it decodes to.
        """
        known = self._quarantine
        for chosen in candidates(sample, pool):
            if chosen in known.bad:
                continue
            try:
                encoded, shape = self._read(chosen)
            except UnreadableImage as error:
                known.add(chosen, self._images.name(chosen), reason=str(error))
                continue
            if chosen in known.partly_bad:
                placement = self._view.place(uniform[None], np.array([shape], np.int64))
                if not self._decodes(encoded, _crop(placement, 0)):
                    continue
            return chosen, encoded, shape
        raise no_substitute(self._images, sample, pool, quarantine=known)

    def _read(self, sample: int) -> tuple[np.ndarray, tuple[int, int]]:
        """What DALI is given for an image, and the height and width it decodes to."""
        by_pil, encoded = sample in self._quarantine.by_pil, self._images.read(sample)
        pixels = pam_pixels(encoded, channels=self._decoding.channels)
        if pixels is not None:
            return pixels, (pixels.shape[0], pixels.shape[1])
        return for_dali(encoded, max_pixels=self._decoding.max_pixels, by_pil=by_pil)

    def _left_to_pil(self, sample: int) -> bool:
        """Whether PIL decodes an image of which DALI decodes nothing; from now on it is asked to."""
        if sample in self._quarantine.by_pil:
            return False
        try:
            pil_decode(self._images.read(sample).data)
        except UnreadableImage:
            return False
        self._quarantine.leave_to_pil(sample, self._images.name(sample))
        return True

    def _decodes(self, encoded: np.ndarray, crop: tuple[np.ndarray, np.ndarray] | None) -> bool:
        from mpl_scale.data.decode.dali import decodes

        return decodes(encoded, self._device, crop=crop)

    def _find_culprits(self, error: DecodeError) -> None:
        """Quarantine what DALI cannot decode of the batches in flight; raise the error again if that is nothing."""
        everywhere = [(batch, row) for batch in self._in_flight for row in range(len(batch.samples))]
        named = [(batch, row) for batch, row in everywhere if row == error.position]
        for candidates in (named, everywhere):
            culprits = [
                (batch, row) for batch, row in candidates if not self._decodes(batch.encoded[row], batch.crop(row))
            ]
            if culprits:
                break
        else:
            raise error
        for batch, row in culprits:
            sample, crop = batch.samples[row], batch.crop(row)
            total = crop is None or not self._decodes(batch.encoded[row], _TINY)
            if total and self._left_to_pil(sample):
                continue
            self._quarantine.add(sample, self._images.name(sample), reason=_UNDECODABLE, everywhere=total)


def _part(pixels: np.ndarray, crop: tuple[np.ndarray, np.ndarray] | None) -> torch.Tensor:
    """What a view shows of pixels [H, W, C], before it is resized."""
    (top, left), (height, width) = ((0, 0), pixels.shape[:2]) if crop is None else crop
    return torch.from_numpy(pixels[top : top + height, left : left + width].copy())


def _crop(placement: Placement, row: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Start and shape of the part of an image that is decoded; None: all of it."""
    if "crop_starts" not in placement:
        return None
    return placement["crop_starts"][row], placement["crop_shapes"][row]
