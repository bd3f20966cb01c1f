"""What RandAugment's operations cost on a CPU, against torchvision's on PIL images.

    python -m benchmarks.augment --sizes 32 224 512 --rounds 30 --output benchmarks/results/cpu/augment.json

One thread. Ours are given a batch of tensors, torchvision's a list of PIL images of the same pixels; neither pays for
decoding or for turning one into the other. The two take turns (A B A B ...) and a round is timed in the thread's CPU
seconds, which other processes do not lengthen by making it wait; an operation is judged by the least of its rounds,
and the ratio is also given as the median of the rounds' own. "view" is the whole strong view, N = 2 and M = 9 of the
list without Sample Pairing, against torchvision's RandAugment: of 8 draws for each image, the same in every round.
Rotations and vertical shears of large images are Pillow's own (mpl_scale/augment/large.py): there the ratio is what
turning tensors into pictures and back costs. Prints a table and writes OUTPUT.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as theirs

from benchmarks import report
from mpl_scale.augment import OP_SETS, OPS, Given, StrongView
from mpl_scale.config.schema import StrongConfig

Run = Callable[[], object]
LIMITS = StrongConfig()
VIEW, EPOCHS = 8, 8  # batches in one call of the whole view, and calls in a round: every operation is drawn often


def affine(
    image: Image.Image, *, shear: tuple[float, float] = (0.0, 0.0), move: tuple[int, int] = (0, 0)
) -> Image.Image:
    """An affine transform with the arguments that torchvision's RandAugment gives."""
    return theirs.affine(
        image,
        angle=0.0,
        translate=list(move),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.NEAREST,
        fill=[0, 0, 0],
        center=[0, 0],
    )


def slope(amount: float) -> float:
    return float(np.degrees(np.arctan(amount)))


THEIRS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "autocontrast": lambda image, _: theirs.autocontrast(image),
    "brightness": theirs.adjust_brightness,
    "color": theirs.adjust_saturation,
    "contrast": theirs.adjust_contrast,
    "equalize": lambda image, _: theirs.equalize(image),
    "invert": lambda image, _: theirs.invert(image),
    "sharpness": theirs.adjust_sharpness,
    "posterize": lambda image, bits: theirs.posterize(image, int(bits)),
    "solarize": lambda image, threshold: theirs.solarize(image, threshold),
    "rotate": lambda image, degrees: theirs.rotate(
        image, degrees, interpolation=InterpolationMode.NEAREST, fill=[0, 0, 0]
    ),
    "shear_x": lambda image, amount: affine(image, shear=(slope(amount), 0.0)),
    "shear_y": lambda image, amount: affine(image, shear=(0.0, slope(amount))),
    "translate_x": lambda image, pixels: affine(image, move=(int(pixels), 0)),
    "translate_y": lambda image, pixels: affine(image, move=(0, int(pixels))),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224, 512], help="height and width, pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 4, 2], help="images an operation is given")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/augment.json"))
    options = parser.parse_args()
    if len(options.sizes) != len(options.batches):
        parser.error(f"--batches {options.batches} needs one number for each of --sizes {options.sizes}")
    torch.set_num_threads(1)
    results = []
    for size, batch in zip(options.sizes, options.batches, strict=True):
        races = [(name, batch, runs) for name, runs in cases(size, batch).items()]
        races.append(("view", VIEW * EPOCHS * batch, view_runs(size, VIEW * batch)))
        for name, count, (ours, reference) in races:
            timed = race(ours, reference, count, options.rounds)
            results.append({"operation": name, "size": size, "batch": count, **timed})
            show(results[-1])
    document = {
        **report.provenance("benchmarks.augment", torch.device("cpu")),
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "unit": "CPU microseconds per image",
        "results": results,
    }
    report.write(options.output, document)
    return 0


def cases(size: int, batch: int) -> dict[str, tuple[Run, Run]]:
    """Ours and theirs for every operation that torchvision has too."""
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (batch, 3, size, size), dtype=np.uint8))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    strength = generator.uniform(-0.9, 0.9, batch)
    runs: dict[str, tuple[Run, Run]] = {}
    for name in OP_SETS["no_pairing"]:
        operation = OPS[name]
        amount = strength if operation.amount is None else operation.amount(strength, LIMITS, (size, size))
        runs[name] = operation_runs(name, images, pictures, amount)
    return runs


def view_runs(size: int, batch: int) -> tuple[Run, Run]:
    """The whole strong view of a batch in a few epochs, and torchvision's of the list of the same images."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), dtype=np.uint8))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    view, ids = StrongView(LIMITS, seed=0, stream=0), np.arange(batch)
    augment = RandAugment(num_ops=2, magnitude=9)

    def ours() -> None:
        for epoch in range(EPOCHS):
            view(images, ids, np.full(batch, epoch))

    def reference() -> None:
        torch.manual_seed(0)
        for _ in range(EPOCHS):
            for picture in pictures:
                augment(picture)

    return ours, reference


def operation_runs(name: str, images: torch.Tensor, pictures: list[Image.Image], amount: np.ndarray) -> tuple[Run, Run]:
    """One operation on a batch, and on the list of the same images."""
    operation, reference, values = OPS[name], THEIRS[name], amount.tolist()
    return (
        lambda: operation(images, amount, Given()),
        lambda: [reference(picture, value) for picture, value in zip(pictures, values, strict=True)],
    )


def race(ours: Run, reference: Run, batch: int, rounds: int) -> dict[str, Any]:
    """CPU microseconds per image of both, by round."""
    seconds: dict[str, list[float]] = {"ours": [], "torchvision": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("torchvision", reference)):
            began = time.thread_time()
            run()
            seconds[name].append((time.thread_time() - began) * 1e6 / batch)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["torchvision"], strict=True)]
    least = {name: round(min(values), 2) for name, values in seconds.items()}
    return {
        **least,
        "ratio_of_least": round(least["ours"] / least["torchvision"], 3),
        "median_ratio": round(statistics.median(ratios), 3),
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['size']:4d} {row['operation']:13s} ours {row['ours']:9.1f} us  torchvision "
        f"{row['torchvision']:9.1f} us  ratio {row['ratio_of_least']:5.2f} (median {row['median_ratio']:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
