"""Part `host` of benchmarks.data: what the host spends on a batch of small images, from files and resident.

Images as CIFAR-10's binary version holds them, 10,000 in each of five training batches, with random pixels; a step
draws 128 labelled and 896 unlabelled ones, shifted by up to 4 pixels and mirrored. Three figures, seconds per batch:

- `cpu`: processor time of all threads, pixels included, on a CPU. What a run without a GPU pays.
- `host`: processor time of the training thread with the pixels on torch's meta device: operators are dispatched and
  compute nothing, so this is what is left for the host where a GPU does the rest. A GPU adds starting the kernels and
  copying to pinned memory. From files there is no such figure: their pixels are the host's work, but for a GPU's
  decoder.
- `wait`: the share of a step that waits for its batch, on a CPU, where a step without it lasts `step_seconds`; and
  `host_wait`, the same with the pixels on the meta device.

Without and with the strong view (Table 5's operations without sample pairing, two of an image, then cutout).
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mpl_scale.augment import StrongView
from mpl_scale.config.schema import DataConfig, StrongConfig, WeakConfig
from mpl_scale.data import BatchSpec, Quarantine, Splits, TrainLoader, load_images, make_splits
from mpl_scale.data.resident import ResidentImages
from mpl_scale.data.resident_parts import ResidentParts
from mpl_scale.mesh import build_mesh

SIDE, LABELLED, UNLABELLED = 32, 128, 896
CPU, META = torch.device("cpu"), torch.device("meta")


def write_cifar(root: Path, *, images: int) -> Path:
    """Random images in CIFAR-10's binary version: five training batches and a test batch of as many each."""
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        records = generator.integers(0, 256, (images, 1 + 3 * SIDE * SIDE), np.uint8)
        records[:, 0] %= 10
        (root / f"{name}.bin").write_bytes(records.tobytes())
    return root


def measure(folder: Path, *, images: int = 10_000, steps: int = 24, step_seconds: float = 0.01) -> dict[str, Any]:
    """The figures, by way and view.

    Args:
        folder: where files may be written.
        images: of each of the six files.
        steps: batches measured.
        step_seconds: what a step takes without its batch.
    """
    os.environ["MPL_SCALE_DATA"] = str(folder / "cache")
    strong = StrongConfig(op_set="no_pairing", num_ops=2, cutout=16)
    config = DataConfig(
        source="cifar10",
        root=str(write_cifar(folder / "cifar10", images=images)),
        split="test_files",
        labelled_per_class=min(400, images // 10),
        weak=WeakConfig(pad=4, flip=True),
        strong=strong,
    )
    splits = make_splits(load_images(config), config=config, seed=0)
    began, cpu = time.perf_counter(), time.process_time()
    resident = ResidentParts(config, splits, image_size=SIDE, device=CPU, quarantine=Quarantine()).train
    assert resident is not None
    found: dict[str, Any] = {
        "images": len(resident.ids),
        "bytes": resident.pixels.nbytes,
        "fill": {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu},
    }
    for view in ("weak", "strong"):
        strong_view = StrongView(config.strong, seed=0, stream=0) if view == "strong" else None
        files = _timed(make_loader(config, splits, strong_view=strong_view), steps, step_seconds)
        kept = _timed(make_loader(config, splits, strong_view=strong_view, resident=resident), steps, step_seconds)
        found[view] = {
            "files": {"cpu": files.cpu, "wait": files.wait},
            "resident": {"cpu": kept.cpu, "wait": kept.wait},
            "files_cpu_over_resident_cpu": files.cpu / kept.cpu,
        }
        try:
            on_meta = replace(resident, pixels=resident.pixels.to(META))
            loader = make_loader(config, splits, strong_view=strong_view, device=META, resident=on_meta)
            host = _timed(loader, steps, step_seconds)
        except NotImplementedError as error:  # an operator that torch has no meta version of
            found[view]["resident"]["host"] = str(error).splitlines()[0][:100]
            continue
        found[view]["resident"] |= {"host": host.thread, "host_wait": host.wait}
        found[view]["files_cpu_over_resident_host"] = files.cpu / host.thread
    return found


def make_loader(
    config: DataConfig,
    splits: Splits,
    *,
    strong_view: StrongView | None,
    size: int = SIDE,
    batches: tuple[int, int] = (LABELLED, UNLABELLED),
    device: torch.device = CPU,
    resident: ResidentImages | None = None,
) -> TrainLoader:
    """The loader of a run of one rank. size: of the images, pixels; batches: labelled and unlabelled images."""
    labelled, unlabelled = batches
    batch = BatchSpec(
        image_size=size, labelled=labelled, unlabelled=unlabelled, seed=0, stream=0, strong_view=strong_view
    )
    return TrainLoader(config, splits, batch=batch, mesh=build_mesh(device=device), resident=resident)


class _Times(NamedTuple):
    """Seconds of a batch: of the processor, all threads; of the calling thread alone. wait: share of a step."""

    cpu: float
    thread: float
    wait: float


def _timed(loader: TrainLoader, steps: int, step_seconds: float) -> _Times:
    shares = []
    for _ in range(4):
        next(loader)
    cpu, thread = time.process_time(), time.thread_time()
    for _ in range(steps):
        began = time.perf_counter()
        next(loader)
        waited = time.perf_counter() - began
        time.sleep(step_seconds)  # the device is busy
        shares.append(waited / (time.perf_counter() - began))
    cpu, thread = time.process_time() - cpu, time.thread_time() - thread
    loader.close()
    return _Times(cpu / steps, thread / steps, statistics.mean(shares))
