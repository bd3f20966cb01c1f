"""Ranks that hold other batches are told so at once, all of them; nobody waits for a time-out."""

from __future__ import annotations

import pytest
import torch

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.spatial import parallelize
from tests.support.ranks import pool


def feed(shapes: list[tuple[int, int, int, int]]) -> str:
    """What this rank is told when rank r feeds shapes[r]."""
    mesh = build_mesh(device=torch.device("cpu"), width=2)
    section = NetworkConfig(name="digits_cnn")
    shared = ModelConfig(teacher=section, student=section, num_classes=10, image_size=8)
    model = build_model(section, shared, field="model", seed=0, group=mesh.world_group)
    model = parallelize(model, mesh=mesh, image_size=8, switch_at="never").eval()
    try:
        model(torch.zeros(shapes[mesh.rank]))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "shapes",
    [[(2, 3, 8, 4), (3, 3, 8, 4)], [(2, 3, 8, 4), (2, 3, 8, 5)], [(2, 3, 8, 4), (2, 3, 9, 4)]],
    ids=["rows", "columns", "height"],
)
def test_a_rank_with_another_batch_is_named_on_all_ranks(shapes: list[tuple[int, int, int, int]]) -> None:
    first, second = pool(2).run(feed, shapes)
    assert first == second
    assert first.startswith("rank 1 of the width group: not the expected slice of rank 0's batch")
    assert f"rank 1: {list(shapes[1])}" in first


def test_equal_batches_pass() -> None:
    assert pool(2).run(feed, [(2, 3, 8, 4), (2, 3, 8, 4)]) == ["", ""]
