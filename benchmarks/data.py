"""Images per second and core: decode, crop, resize, flip and RandAugment, against timm's and torchvision's loaders.

    python -m benchmarks.data --output benchmarks/results/cpu/data.json

All loaders do the same work on the same JPEG files, photographs that installed packages ship: random resized crop
(bicubic, antialiased), flip, RandAugment (two operations, magnitude 9), normalisation to a float batch. Ours is
DecodePipeline, StrongView and Normalise; theirs are `timm.data.create_loader` and torchvision's transforms under
torch's DataLoader, without worker processes. The sets of operations differ a little: each has its own fourteen.

The loaders take turns, a batch each (A B C A B C ...), so that drift of the machine cancels in the ratios; a ratio is
taken within each round. What is measured is processor time, of all threads, until nobody works ahead any more: what a
core-second buys, also where other processes slow the clock on the wall down. Stages are cumulative.

`stall`: the share of a small training step spent waiting for TrainLoader, which decodes one step ahead on one thread.
`host`: what the host spends on a batch of small images, from files and resident (data_host.py).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import PIL
import timm
import torch
import torchvision
from timm.data import create_dataset, create_loader
from torchvision.transforms import InterpolationMode, v2

from benchmarks import data_host
from benchmarks.report import provenance, write
from mpl_scale.augment import StrongView
from mpl_scale.config.schema import DataConfig, StrongConfig, WeakConfig
from mpl_scale.data import Splits, load_images
from mpl_scale.data.decode.pipeline import DecodePipeline, Rows
from mpl_scale.data.decode.views import View, weak_view
from mpl_scale.data.normalise import Normalise
from tests.support.photographs import NAMES, encoded, photograph

WIDTH, HEIGHT, QUALITY = 500, 375, 90
CPU = torch.device("cpu")
PARTS = ("loaders", "stall", "host")
STAGES = ("decode", "crop_resize_flip", "augment")
WEAK = WeakConfig(kind="random_resized_crop", interpolation="bicubic", flip=True)
STRONG = StrongConfig(op_set="no_pairing", num_ops=2, magnitude=9.0, random_magnitude=False)
Source = Callable[[], object]
"""Loads one batch."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--stall_steps", type=int, default=12)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--host_steps", type=int, default=24)
    parser.add_argument("--host_images", type=int, default=10_000, help="of each of six files")
    parser.add_argument("--output", type=Path, default=Path("runs/data.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # Enough for one epoch: timm's loader reads a batch ahead, and none at an epoch's end.
        root = _write_files(Path(folder) / "files", count=(options.rounds + 3) * options.batch)
        sizes = options.sizes if "loaders" in options.parts else []
        found = {str(size): _measure(root, size, options) for size in sizes}
        stall = _stall(root, options) if "stall" in options.parts else None
        host = None
        if "host" in options.parts:
            host = data_host.measure(Path(folder), images=options.host_images, steps=options.host_steps)
    document = {
        **provenance("benchmarks.data", CPU),
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "files": f"JPEG, {WIDTH}x{HEIGHT}, quality {QUALITY}, 4:2:0",
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "images_per_core_second": found,
        "stall": stall,
        "host": host,
    }
    write(options.output, document)
    for size, loaders in found.items():
        for name, stages in loaders.items():
            words = [f"{stage} {result['images_per_core_second']:.0f}" for stage, result in stages.items()]
            print(f"{size} {name}: images per core-second: {', '.join(words)}")
        print(f"{size} ours / timm: {loaders['ours']['augment']['ratio_to_timm']:.2f}")
    print(f"stall: {stall}")
    print(f"host: {host}")
    return 0


def _write_files(root: Path, *, count: int) -> Path:
    contents = [encoded(photograph(index, WIDTH, HEIGHT), "JPEG", quality=QUALITY) for index in range(len(NAMES))]
    for index in range(count):
        folder = root / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(contents[index % len(contents)])
    return root


def _measure(root: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Per loader and stage: images per core-second, and every measured second of a batch."""
    sources: dict[tuple[str, str], Source] = {}
    for stage in STAGES:
        sources["ours", stage] = _ours(root, size, options.batch, stage)
        sources["timm", stage] = _timm(root, size, options.batch, stage)
        sources["torchvision", stage] = _torchvision(root, size, options.batch, stage)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sources}
    for source in sources.values():
        source()
    _settled()
    for _ in range(options.rounds):
        for key, source in sources.items():
            core = time.process_time()
            source()
            seconds[key].append(_settled() - core)
    found: dict[str, Any] = {name: {} for name, _ in sources}
    for (name, stage), core in seconds.items():
        found[name][stage] = {
            "images_per_core_second": options.batch / statistics.median(core),
            "ratio_to_timm": statistics.median(b / a for a, b in zip(core, seconds["timm", stage], strict=True)),
            "core_seconds_per_batch": core,
        }
    return found


def _settled() -> float:
    """The processor time, once no thread works ahead any more: every batch is paid for in its own turn."""
    last = time.process_time()
    for calm in itertools.count():
        time.sleep(0.1)
        now = time.process_time()
        if now - last < 0.002 and calm:
            return now
        last = now
    raise AssertionError


def _ours(root: Path, size: int, batch: int, stage: str) -> Source:
    images = load_images(DataConfig(source="folder", root=str(root)))
    ids = np.arange(len(images))
    view = View(size, 0, (), lambda *_: {}, interpolation=None) if stage == "decode" else weak_view(WEAK, size)
    generator = np.random.default_rng(0)

    def requests() -> Iterator[list[Rows]]:
        while True:
            yield [Rows(generator.choice(ids, batch), generator.random((batch, view.columns)), ids)]

    pipeline = DecodePipeline(requests(), images=images, view=view, capacity=batch, device=CPU)
    config = DataConfig(strong=STRONG)
    strong = StrongView(config.strong, seed=0, stream=0)
    normalise = Normalise(config, device=CPU, dtype=torch.float32)
    epochs = itertools.count()

    def load() -> object:
        decoded = pipeline.next()
        if stage == "decode":
            return decoded
        views = decoded.views
        if stage == "augment":
            views = strong(views, decoded.samples, np.full(batch, next(epochs)))
        return normalise(views)

    return load


def _timm(root: Path, size: int, batch: int, stage: str) -> Source:
    dataset = create_dataset("", str(root))
    loader = create_loader(
        dataset,
        (3, size, size),
        batch,
        is_training=True,
        use_prefetcher=True,
        auto_augment="rand-m9-n2" if stage == "augment" else None,
        interpolation="bicubic",
        color_jitter=None,
        num_workers=0,
        persistent_workers=False,
        device=CPU,
    )
    if stage == "decode":
        dataset.transform = None
        return _decoded_by_pil(dataset, batch)
    return _endless(loader)


def _torchvision(root: Path, size: int, batch: int, stage: str) -> Source:
    crop = v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    augment = [v2.RandAugment(num_ops=2, magnitude=9)] if stage == "augment" else []
    finish = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(DataConfig().mean, DataConfig().std),
    ]
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *augment, *finish])
    dataset = torchvision.datasets.ImageFolder(str(root), transform=None if stage == "decode" else transform)
    if stage == "decode":
        return _decoded_by_pil(dataset, batch)
    return _endless(torch.utils.data.DataLoader(dataset, batch, shuffle=True, drop_last=True))


def _decoded_by_pil(dataset: Any, batch: int) -> Source:
    order = itertools.cycle(range(len(dataset)))

    def load() -> object:
        return [np.asarray(dataset[index][0]) for index in itertools.islice(order, batch)]

    return load


def _endless(loader: Any) -> Source:
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: next(batches)


def _stall(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The share of each step that waits for data: a step trains a ResNet-18 on both views, on one thread."""
    images = load_images(DataConfig(source="folder", root=str(root)))
    ids, size, batch = np.arange(len(images)), options.sizes[0], 8
    config = DataConfig(weak=WEAK, strong=STRONG, threads=1, prefetch=2)
    loader = data_host.make_loader(
        config,
        Splits(images=images, test=ids, labelled=ids, unlabelled=ids),
        strong_view=StrongView(config.strong, seed=0, stream=0),
        size=size,
        batches=(batch, batch),
    )
    model = timm.create_model("resnet18", num_classes=2)
    shares = []
    for step in range(options.stall_steps + 2):
        began = time.perf_counter()
        loaded = next(loader)
        waited = time.perf_counter() - began
        logits = model(loaded.normalise(torch.cat([loaded.labelled, loaded.strong])))
        torch.nn.functional.cross_entropy(logits[:batch], loaded.labels).backward()
        if step >= 2:
            shares.append(waited / (time.perf_counter() - began))
    loader.close()
    return {
        "step": f"resnet18 forward and backward, {2 * batch} images of {size}x{size}, one thread; {3 * batch} views",
        "median_share": statistics.median(shares),
        "shares": shares,
    }


if __name__ == "__main__":
    raise SystemExit(main())
