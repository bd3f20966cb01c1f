"""Batches come in order and unchanged; an error comes with the batch it belongs to."""

from __future__ import annotations

import pytest
import torch

from mpl_scale.data.prefetch import Prefetcher
from mpl_scale.types import Batch

BATCHES = 5


class Counting:
    """Batches filled with their number; the one after the last cannot be made."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.made, self.closed = device, 0, False

    def __next__(self) -> Batch:
        if self.made == BATCHES:
            raise ValueError("file 5 cannot be decoded")
        number = torch.full((64, 3, 64, 64), float(self.made), device=self.device)
        for _ in range(20):  # long enough that a step that does not wait would read it too early
            number = (number * 3 + 1 - 1) / 3
        self.made += 1
        labels = torch.full((64,), self.made - 1, device=self.device)
        return Batch(number, labels, labels, number, number, labels)

    def close(self) -> None:
        self.closed = True


def check(device: torch.device) -> None:
    loader = Counting(device)
    prefetched = Prefetcher(loader, device)
    for number in range(BATCHES):
        batch = next(prefetched)
        assert batch.labels.tolist() == [number] * 64
        assert torch.allclose(batch.weak, torch.full_like(batch.weak, number))
    with pytest.raises(ValueError, match="file 5"):
        next(prefetched)
    prefetched.close()
    assert loader.closed


def test_batches_in_order() -> None:
    check(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the test above is its CPU twin")
def test_batches_in_order_from_a_side_stream() -> None:
    check(torch.device("cuda", 0))
