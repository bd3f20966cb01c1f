"""scikit-learn's digits in memory: as images with the trainer's views, or as vectors without any; labels made worse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.in_memory import Samples

CLASSES, LEVELS = 10, 16


@dataclass(frozen=True)
class Digits:
    """What is done to the data set.

    per_class: labelled images a class. wrong: share of the labelled images whose label is another one, drawn uniformly.
    imbalance: labelled images of the last class as a share of the first's, classes between geometrically; 1: none.
    vectors: 64 numbers an image, normalised, instead of 3 x 8 x 8 pixels. test: share held out of each class.
    """

    per_class: int = 4
    wrong: float = 0.0
    imbalance: float = 1.0
    vectors: bool = False
    test: float = 1 / 3


def make_digits(digits: Digits, *, seed: int) -> Samples:
    """The data set with its parts drawn by the seed: disjoint test part; the unlabelled part holds the labelled one."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    test, labelled, unlabelled = [], [], []
    for label in range(CLASSES):
        ids = rng.permutation(np.flatnonzero(targets == label))
        held_out = round(digits.test * len(ids))
        count = max(1, round(digits.per_class * digits.imbalance ** (label / (CLASSES - 1))))
        test.append(ids[:held_out])
        labelled.append(ids[held_out : held_out + count])
        unlabelled.append(ids[held_out:])
    truth = torch.from_numpy(targets).long()
    labels, known = truth.clone(), np.concatenate(labelled)
    spoilt = rng.permutation(known)[: round(digits.wrong * len(known))]
    labels[spoilt] = (labels[spoilt] + torch.from_numpy(rng.integers(1, CLASSES, len(spoilt)))) % CLASSES
    return Samples(
        inputs=_vectors(pixels) if digits.vectors else _images(pixels),
        labels=labels,
        truth=truth,
        labelled=np.sort(known),
        unlabelled=np.sort(np.concatenate(unlabelled)),
        test=np.sort(np.concatenate(test)),
    )


def _vectors(pixels: np.ndarray) -> torch.Tensor:
    """float32 [N, 64], mean 0 and deviation 1 over the whole set."""
    return torch.from_numpy((pixels - pixels.mean()) / pixels.std()).float()


def _images(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [N, 3, 8, 8], as the PNG files of source `digits` hold them."""
    grey = np.round(pixels.reshape(-1, 1, 8, 8) * 255 / LEVELS).astype(np.uint8)
    return torch.from_numpy(np.repeat(grey, 3, axis=1))
