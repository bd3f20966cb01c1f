"""Batches as networks are given them."""

from __future__ import annotations

import dataclasses

import torch

from mpl_scale.types import Batch, as_they_are


def normalised(batch: Batch) -> Batch:
    """The same batch with floating-point images."""
    images = {name: getattr(batch, name) for name in ("labelled", "weak", "strong")}
    assert all(pixels.dtype == torch.uint8 for pixels in images.values())
    inputs = {name: batch.normalise(pixels) for name, pixels in images.items()}
    return dataclasses.replace(batch, **inputs, normalise=as_they_are)
