"""NVIDIA DALI: encoded files to uint8 views. The only file that imports DALI; itself imported when a file is decoded.

DALI decides nothing. Python hands it, batch by batch, the files and what a view does with each (views.py), and it
decodes, resizes, crops and mirrors: on CPU threads (`device_id=None`), or on the GPU with hardware-assisted ("mixed")
decoding. Both can run the same graph; on a CPU it is ended after decoding, because others resize faster (resize.py).
Where a view shows a part of the image, no more than that part is decoded; its pixels are those of a whole decode, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from mpl_scale.data.decode.views import View, decoding_steps
from mpl_scale.data.encoded.probe import DecodeError

_INTERPOLATION = {"bilinear": DALIInterpType.INTERP_LINEAR, "bicubic": DALIInterpType.INTERP_CUBIC}
_STEP_TYPES = {  # of views.Placement: type, and dimensions per image
    "crop_starts": (DALIDataType.INT32, 1),
    "crop_shapes": (DALIDataType.INT32, 1),
    "sizes": (DALIDataType.FLOAT, 1),
    "windows": (DALIDataType.INT32, 1),
    "flips": (DALIDataType.INT32, 0),
}


class Graph:
    """A running DALI pipeline for one view."""

    def __init__(
        self,
        source: Callable[[], list[Any]],
        *,
        view: View,
        resizes: bool,
        capacity: int,
        device: torch.device,
        threads: int,
        prefetch: int,
    ) -> None:
        """Args:
        source: called for each batch, some batches ahead: the encoded files, a list of uint8 [bytes], then the arrays
            of the view's steps, those that are run here. StopIteration ends the batches.
        view: what is done with the images.
        resizes: False: only decodes the parts.
        capacity: most images of a batch.
        device: cpu or cuda.
        threads: CPU threads.
        prefetch: batches prepared ahead.
        """
        self._device, self._resizes = device, resizes
        self._pipeline: Any = _views(
            source,
            view=view,
            steps=decoding_steps(view, resizes=resizes),
            resizes=resizes,
            decoder=_decoder(device),
            batch_size=capacity,
            num_threads=threads,
            device_id=_device_id(device),
            prefetch_queue_depth=prefetch,
        )
        self._pipeline.build()

    def run(self) -> list[torch.Tensor] | torch.Tensor:
        """The next batch on the device, in DALI's own memory, good until the next call.

        Returns:
            The views, uint8 [n, H, W, 3]; where nothing is resized, the decoded parts, uint8 [h, w, 3] each.

        Raises:
            StopIteration: the source has ended.
            DecodeError: some image cannot be decoded; build another graph.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (images,) = self._pipeline.run(stream)
        except RuntimeError as error:
            raise DecodeError(str(error)) from error
        if self._resizes:
            return torch.from_dlpack(images.as_tensor())
        return [torch.from_dlpack(image) for image in images]


def decodes(encoded: np.ndarray, device: torch.device, *, crop: tuple[np.ndarray, np.ndarray] | None = None) -> bool:
    """Whether DALI decodes an image, or the part of it that starts at crop[0] and has the shape crop[1]."""
    pipeline = _decode_one(encoded, crop, decoder=_decoder(device), device_id=_device_id(device))
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


@pipeline_def
def _views(source: Callable[[], Any], *, view: View, steps: tuple[str, ...], resizes: bool, decoder: str) -> Any:
    """The graph: encoded files and the view's steps to uint8 [image_size, image_size, 3] views, or to decoded parts."""
    types, dimensions = zip((DALIDataType.UINT8, 1), *(_STEP_TYPES[name] for name in steps), strict=True)
    encoded, *inputs = fn.external_source(
        source, num_outputs=1 + len(steps), dtype=list(types), ndim=list(dimensions), batch=True
    )
    step: dict[str, Any] = dict(zip(steps, inputs, strict=True))
    square = [view.image_size, view.image_size]
    images: Any = _decoded(encoded, step.get("crop_starts"), step.get("crop_shapes"), decoder=decoder)
    if not resizes:
        return images
    if view.interpolation is not None:
        images = fn.resize(
            images, size=step.get("sizes", square), interp_type=_INTERPOLATION[view.interpolation], antialias=True
        )
    if "windows" in step:
        images = fn.slice(
            images, step["windows"], square, axes=(0, 1), out_of_bounds_policy="pad", fill_values=view.fill
        )
    return fn.flip(images, horizontal=step["flips"]) if "flips" in step else images


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1)
def _decode_one(encoded: np.ndarray, crop: tuple[np.ndarray, np.ndarray] | None, *, decoder: str) -> Any:
    source = fn.external_source(lambda: [encoded], dtype=DALIDataType.UINT8, ndim=1, batch=True)
    return _decoded(source, *(crop or (None, None)), decoder=decoder)


def _decoded(encoded: Any, starts: Any, shapes: Any, *, decoder: str) -> Any:
    if starts is None:
        return fn.decoders.image(encoded, device=decoder, output_type=DALIImageType.RGB)
    return fn.decoders.image_slice(
        encoded,
        starts,
        shapes,
        axes=(0, 1),
        normalized_anchor=False,
        normalized_shape=False,
        device=decoder,
        output_type=DALIImageType.RGB,
    )


def _decoder(device: torch.device) -> str:
    return "mixed" if device.type == "cuda" else "cpu"


def _device_id(device: torch.device) -> int | None:
    return (device.index or 0) if device.type == "cuda" else None
