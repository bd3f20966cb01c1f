"""DALI's `mixed` decoding on the device against the CPU's pipeline: images per second, and whether the pixels agree.

Promised bit for bit: lossless files (PNG) that are not resized. Not promised: JPEG files, whose decoders differ in the
inverse transform and in how they upsample chroma; and resized images, which torch resizes on a CPU and DALI on a GPU
(tests/test_data_views.py bounds the differences there). On a CPU the suite compares the CPU pipeline with DALI resizing
to the one with torch resizing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.parts import Part, Result, Setting
from mpl_scale.config.schema import WeakConfig
from mpl_scale.data.decode.pipeline import DecodePipeline, Decoding, Rows
from mpl_scale.data.decode.views import View, weak_view

CPU = torch.device("cpu")
RESIZED = WeakConfig(kind="random_resized_crop", interpolation="bicubic", flip=True)


@dataclass(frozen=True)
class _Files:
    """Photographs of one format. resized: seen by a random resized crop; else as they are."""

    kind: str
    resized: bool
    side: int
    batch: int
    batches: int

    @property
    def promised(self) -> bool:
        return self.kind == "PNG" and not self.resized

    @property
    def view(self) -> View:
        if self.resized:
            return weak_view(RESIZED, self.side // 2)
        return View(self.side, 0, (), lambda *_: {}, interpolation=None)

    def pipeline(self, device: torch.device, *, threads: int, dali_resizes: bool) -> DecodePipeline:
        from tests.support.photographs import ImagesInMemory, encoded, photograph

        options = {"quality": 90} if self.kind == "JPEG" else {}
        files = [encoded(photograph(index, self.side, self.side), self.kind, **options) for index in range(3)]
        images = ImagesInMemory([files[index % 3] for index in range(self.batch)])
        return DecodePipeline(
            self._requests(),
            images=images,
            view=self.view,
            capacity=self.batch,
            device=device,
            decoding=Decoding(threads=threads, prefetch=2, dali_resizes=dali_resizes),
        )

    def _requests(self) -> Iterator[list[Rows]]:
        generator, ids = np.random.default_rng(0), np.arange(self.batch)
        while True:
            yield [Rows(ids, generator.random((self.batch, self.view.columns)), ids)]


def parts(tiny: bool) -> list[Part]:
    """The one part of this module."""
    return [Part("decode", decode, 60, needs=("nvidia.dali",))]


def decode(setting: Setting) -> Result:
    """Rates of both pipelines and the difference of their first batches, by format and view."""
    side, batch, batches = (32, 4, 2) if setting.tiny else (448, 64, 16)
    rows: Result = {}
    for kind in ("PNG", "JPEG"):
        for resized in (False, True):
            name = f"{kind}{' resized' if resized else ''}"
            rows[name] = _compared(_Files(kind, resized, side, batch, batches), setting)
            setting.keep({"decoding": rows})
    return {"decoding": rows}


def _compared(files: _Files, setting: Setting) -> Result:
    threads = 1 if setting.tiny else 8
    pipelines = {
        "cpu": files.pipeline(CPU, threads=threads, dali_resizes=False),
        "device": files.pipeline(setting.torch_device, threads=threads, dali_resizes=True),
    }
    first, rates = {}, {}
    for name, pipeline in pipelines.items():
        first[name] = pipeline.next().views.cpu().int()
        began = time.perf_counter()
        for _ in range(files.batches):
            views = pipeline.next().views
        views[0, 0, 0, 0].item()
        rates[name] = files.batch * files.batches / (time.perf_counter() - began)
        pipeline.close()
    difference = (first["cpu"] - first["device"]).abs()
    return {
        "images_per_second": rates,
        "bitwise_promised": files.promised,
        "bitwise_equal": not difference.any().item(),
        "share_of_values_that_differ": (difference > 0).double().mean().item(),
        "largest_difference_in_levels": difference.max().item(),
    }
