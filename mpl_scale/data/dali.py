"""NVIDIA DALI: encoded files to uint8 views. The only file that imports DALI.

DALI decides nothing. Python hands it, batch by batch, the files with their crop windows and flips (plan.py), and it
decodes, resizes, crops and mirrors: on CPU threads (`device_id=None`), or on the GPU with hardware-assisted ("mixed")
decoding. Both run the same graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from mpl_scale.data.probe import UnreadableImage, unreadable_error
from mpl_scale.data.registry import ImageSet


@dataclass(frozen=True)
class DecodeRequest:
    """What one batch is made of."""

    samples: np.ndarray  # int64 [n], sample ids
    windows: np.ndarray  # int32 [n, 2], top and left of the crop window in the resized image, pixels
    flips: np.ndarray  # int32 [n], 1: mirrored


class DecodePipeline:
    """Runs requests through DALI, reading and decoding a few ahead."""

    def __init__(
        self,
        requests: Iterator[DecodeRequest],
        *,
        images: ImageSet,
        batch: int,
        image_size: int,
        resize: bool,
        fill: int,
        device: torch.device,
        threads: int,
        prefetch: int,
    ) -> None:
        """Args:
        requests: one per batch, endless or not; consumed up to `prefetch` batches ahead of `next`.
        images: what the requests' samples are.
        batch: images of every request; 0: nothing is decoded, and requests are consumed one by one.
        image_size: height and width of the result, pixels.
        resize: False promises that every file already has that size.
        fill: value of pixels outside the image.
        device: cpu or cuda.
        threads: CPU threads.
        prefetch: batches prepared ahead.
        """
        self._requests, self._images = requests, images
        self._in_flight: deque[DecodeRequest] = deque()
        self._device = device
        self._nothing = None if batch else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8, device=device)
        self._pipeline: Any = None
        if batch:
            self._pipeline = _views(
                self._read_next,
                image_size=image_size,
                resize=resize,
                fill=fill,
                decoder=_decoder(device),
                batch_size=batch,
                num_threads=threads,
                device_id=_device_id(device),
                prefetch_queue_depth=prefetch,
            )
            self._pipeline.build()

    def next(self) -> torch.Tensor:
        """The views of the next request: uint8 [n, 3, H, W] on the device, contiguous and the caller's own.

        Raises:
            StopIteration: the requests have ended.
            ValueError: files that cannot be read or decoded, with their names.
        """
        if self._nothing is not None:
            next(self._requests)
            return self._nothing
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (images,) = self._pipeline.run(stream)
        except RuntimeError as error:
            culprits = self._culprits()
            if culprits is None:
                raise
            raise culprits from error
        self._in_flight.popleft()
        # DALI reuses its buffer: copy, into the layout of the networks.
        return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Stop DALI's threads and free its buffers; `next` may not be called again."""
        self._pipeline = None

    def _read_next(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        request = next(self._requests)
        self._in_flight.append(request)
        return [self._read(int(sample)) for sample in request.samples], request.windows, request.flips

    def _culprits(self) -> ValueError | None:
        """DALI does not say which image failed: decode every file in flight by itself."""
        samples = dict.fromkeys(int(sample) for request in self._in_flight for sample in request.samples)
        failed = [sample for sample in samples if not _decodes(self._read(sample), self._device)]
        return (
            unreadable_error(dict.fromkeys(map(self._images.name, failed), "DALI cannot decode it")) if failed else None
        )

    def _read(self, sample: int) -> np.ndarray:
        try:
            return self._images.read(sample)
        except UnreadableImage as error:
            raise unreadable_error({self._images.name(sample): str(error)}) from error


@pipeline_def
def _views(source: Callable[[], Any], *, image_size: int, resize: bool, fill: int, decoder: str) -> Any:
    """The graph: encoded files, windows and flips to uint8 [image_size, image_size, 3] views."""
    encoded, windows, flips = fn.external_source(
        source,
        num_outputs=3,
        dtype=[DALIDataType.UINT8, DALIDataType.INT32, DALIDataType.INT32],
        ndim=[1, 1, 0],
        batch=True,
    )
    images: Any = fn.decoders.image(encoded, device=decoder, output_type=DALIImageType.RGB)
    if resize:
        images = fn.resize(
            images, size=[image_size, image_size], interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
        )
    images = fn.slice(
        images, windows, [image_size, image_size], axes=(0, 1), out_of_bounds_policy="pad", fill_values=fill
    )
    return fn.flip(images, horizontal=flips)


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1)
def _decode_one(encoded: np.ndarray, *, decoder: str) -> Any:
    source = fn.external_source(lambda: [encoded], dtype=DALIDataType.UINT8, ndim=1, batch=True)
    return fn.decoders.image(source, device=decoder, output_type=DALIImageType.RGB)


def _decodes(encoded: np.ndarray, device: torch.device) -> bool:
    pipeline = _decode_one(encoded, decoder=_decoder(device), device_id=_device_id(device))
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


def _decoder(device: torch.device) -> str:
    return "mixed" if device.type == "cuda" else "cpu"


def _device_id(device: torch.device) -> int | None:
    return (device.index or 0) if device.type == "cuda" else None
