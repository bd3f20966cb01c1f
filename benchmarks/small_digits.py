"""Small real image sets in memory: scikit-learn's digits and Fashion-MNIST, as images or vectors, made harder."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.in_memory import Samples

CLASSES = 10
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""


@dataclass(frozen=True)
class Digits:
    """What is done to the data set.

    per_class: labelled images a class. wrong: share of the labelled images whose label is another one, drawn uniformly.
    imbalance: labelled images of the last class as a share of the first's, classes between geometrically; 1: none.
    vectors: the pixels as numbers, normalised, instead of 3 x H x W pixels. test: share held out of each class.
    known: classes that are labelled and tested, the first ones; the unlabelled part holds all. tail: unlabelled images
    of the last class as a share of the first's, as `imbalance`. pool: images a class that the seed draws from the data
    set; None: all. data: "digits" (1,797 images, 8 x 8) or "fashion_mnist" (70,000; as vectors at 14 x 14).
    """

    per_class: int = 4
    wrong: float = 0.0
    imbalance: float = 1.0
    vectors: bool = False
    test: float = 1 / 3
    known: int = CLASSES
    tail: float = 1.0
    pool: int | None = None
    data: str = "digits"


def make_digits(digits: Digits, *, seed: int) -> Samples:
    """The data set with its parts drawn by the seed: disjoint test part; the unlabelled part holds the labelled one."""
    inputs, targets = _inputs(digits.data, vectors=digits.vectors)
    rng = np.random.default_rng(seed)
    test, labelled, unlabelled = [], [], []
    for label in range(CLASSES):
        ids = rng.permutation(np.flatnonzero(targets == label))[: digits.pool]
        held_out = round(digits.test * len(ids))
        place = label / (CLASSES - 1)
        count = max(1, round(digits.per_class * digits.imbalance**place))
        kept = max(count, round((len(ids) - held_out) * digits.tail**place))
        if label < digits.known:
            test.append(ids[:held_out])
            labelled.append(ids[held_out : held_out + count])
        unlabelled.append(ids[held_out : held_out + kept])
    truth = torch.from_numpy(targets).long()
    labels, known = truth.clone(), np.concatenate(labelled)
    spoilt = rng.permutation(known)[: round(digits.wrong * len(known))]
    labels[spoilt] = (labels[spoilt] + torch.from_numpy(rng.integers(1, CLASSES, len(spoilt)))) % CLASSES
    return Samples(
        inputs=inputs,
        labels=labels,
        truth=truth,
        labelled=np.sort(known),
        unlabelled=np.sort(np.concatenate(unlabelled)),
        test=np.sort(np.concatenate(test)),
    )


@cache
def _inputs(data: str, *, vectors: bool) -> tuple[torch.Tensor, np.ndarray]:
    """All images: float32 [N, H W] of mean 0 and deviation 1, or uint8 [N, 3, H, W]; and their classes, int [N]."""
    pixels, targets = _pixels(data)
    if vectors and data == "fashion_mnist":
        pixels = pixels.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    if vectors:
        return torch.from_numpy(((pixels - pixels.mean()) / pixels.std()).reshape(len(pixels), -1)).float(), targets
    grey = np.round(pixels[:, None] * 255).astype(np.uint8)
    return torch.from_numpy(np.repeat(grey, 3, axis=1)), targets


def _pixels(data: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N, H, W] in [0, 1], and the classes, int [N]."""
    if data == "digits":
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)
        return pixels.reshape(-1, 8, 8) / 16, targets
    if data != "fashion_mnist":
        raise ValueError(f"data = {data!r}: use digits or fashion_mnist")
    images, targets = (
        np.concatenate([_idx(part, kind) for part in ("train", "t10k")]) for kind in ("images", "labels")
    )
    return images / 255, targets


def _idx(part: str, kind: str) -> np.ndarray:
    """A file of Fashion-MNIST, uint8 [N, 28, 28] or [N]."""
    path = FASHION_MNIST / f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"
    if not path.exists():
        raise FileNotFoundError(f"{path}: install Debian's package dataset-fashion-mnist")
    content = gzip.decompress(path.read_bytes())
    header = 16 if kind == "images" else 8
    values = np.frombuffer(content, np.uint8, offset=header)
    return values.reshape(-1, 28, 28) if kind == "images" else values
