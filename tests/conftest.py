"""One thread a process: threads of several that wait for each other's cores make small networks 20 times slower."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in what tests start

import pytest
import torch

from mpl_scale.device import Numerics


@pytest.fixture(autouse=True)
def exact_products(request: pytest.FixtureRequest) -> None:
    """Tests on a GPU compare fp32 with fp32: no TF32, unless a test or the run in it sets it."""
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        Numerics(tf32=False).apply(torch.device("cuda"))
