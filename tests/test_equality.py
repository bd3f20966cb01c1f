"""The sharded step equals plain PyTorch: every engine and ZeRO stage, 1, 2 and 4 ranks, world or sub-group shards."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from tests.support.ranks import pool
from tests.support.reference import Settings, Trace, run_reference
from tests.support.sharded import differences, run_sharded, zero
from tests.support.tiers import crossed, full

# float32: 3 steps of a tiny net accumulate some hundred roundings of 6e-8. float64: the same at 1e-16.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

VIT = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "proj_drop_rate": 0.2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "ls_init_value": 0.5}
TIMM = {
    "vit": Settings(size=16, model="vit_tiny_patch16_224", kwargs=tuple(VIT.items()), drop_path=0.2),
    "convnext": Settings(size=32, model="convnext_atto", kwargs=tuple(CONVNEXT.items()), drop_path=0.2),
}

reference = functools.cache(run_reference)


def assert_equal(world: int, settings: Settings, dtype: torch.dtype, *args: Any) -> None:
    expected = reference(settings, dtype)
    if world == 1:
        traces: list[Trace] = [run_sharded(settings, dtype, *args)]
    else:
        traces = pool(world).run(run_sharded, settings, dtype, *args)
    assert any(abs(c) > 1e-3 for c in expected.cosines)
    for trace in traces:
        for part, difference in differences(trace, expected).items():
            assert difference <= TOLERANCE[dtype], f"{part} differs by {difference:.2e}"


@pytest.mark.parametrize(
    ("world", "shard_size"), [(1, None), (2, None), (2, 1), (4, None), (4, 2)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_engine(world: int, shard_size: int | None, clip: float, dtype: torch.dtype) -> None:
    """Stage 0 is shard_size 1, stages 1 and 2 anything above."""
    assert_equal(world, Settings(clip=clip), dtype, "flat", {}, shard_size)


@pytest.mark.parametrize("rule", ["per_sample", "soft_exact"])
@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (4, 1), (2, 4)])
def test_exact_feedback_by_forward_mode(world: int, parts: int, rule: str) -> None:
    """The whole step, batch norm over all ranks and micro-batches included, against derivatives by double backward."""
    settings = Settings(rule=rule, micro_batches=parts, ranks=world)
    assert_equal(world, settings, torch.float64, "flat", {})


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 4)])
def test_credits_of_unit_size(world: int, parts: int) -> None:
    """Their size is that of the rows of all ranks and micro-batches."""
    settings = Settings(rule="soft_exact", normalise="credits", micro_batches=parts, ranks=world)
    assert_equal(world, settings, torch.float64, "flat", {})


@pytest.mark.parametrize("rule", ["per_sample", "soft_exact"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_exact_feedback_by_forward_mode_under_deepspeed(stage: int, rule: str) -> None:
    assert_equal(2, Settings(rule=rule), torch.float32, "deepspeed", zero(stage))


FROZEN = ("conv1", "bn1")
"""A batch norm by its averages, and nothing before it that learns."""


@pytest.mark.parametrize("rule", ["cosine", "per_sample", "soft_exact"])
@pytest.mark.parametrize(("world", "parts", "frozen"), [(1, 1, FROZEN), (2, 1, FROZEN), (2, 2, ("conv2", "bn2"))])
def test_frozen_parts(world: int, parts: int, frozen: tuple[str, ...], rule: str) -> None:
    """They stay, without weight decay, and the feedback's inner products and derivatives are of the others."""
    settings = Settings(rule=rule, frozen=frozen, micro_batches=parts, ranks=world, clip=0.5)
    assert_equal(world, settings, torch.float64, "flat", {})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_parts_under_deepspeed(stage: int) -> None:
    assert_equal(2, Settings(frozen=FROZEN, clip=0.5), torch.float32, "deepspeed", zero(stage))
    rule = "per_sample" if stage < 3 else "cosine"
    settings = Settings(frozen=("conv2", "bn2"), micro_batches=2, ranks=2, deferred=True, rule=rule)
    assert_equal(2, settings, torch.float32, "deepspeed", zero(stage))


@crossed("stage, world", (0, 1, 2, 3), (2, 4), quick=[*((stage, 2) for stage in range(4)), (2, 4)])
def test_deepspeed_engine(world: int, stage: int) -> None:
    assert_equal(world, Settings(), torch.float32, "deepspeed", zero(stage), None)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_engine_shards_over_a_subgroup(stage: int) -> None:
    """The paper's layout: weights split within a group, replicated over the groups."""
    assert_equal(4, Settings(), torch.float32, "deepspeed", zero(stage), 2)


@pytest.mark.parametrize("deferred", [False, True], ids=["live", "deferred"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_engine_accumulates(world: int, dtype: torch.dtype, deferred: bool) -> None:
    """Micro-batches and a teacher that runs again: the averages of each part's gradients, one update."""
    assert_equal(world, Settings(micro_batches=4, ranks=world, deferred=deferred), dtype, "flat", {})


def test_a_deferred_teacher_alone_changes_nothing() -> None:
    assert_equal(1, Settings(deferred=True), torch.float64, "flat", {})


@pytest.mark.parametrize(("stage", "shard_size"), [(0, None), (1, None), (2, None), (3, None)])
def test_deepspeed_engine_accumulates(stage: int, shard_size: int | None) -> None:
    settings = Settings(micro_batches=2, ranks=2, deferred=True, clip=0.5)
    assert_equal(2, settings, torch.float32, "deepspeed", zero(stage), shard_size)


def both_engines(settings: Settings, stage: int) -> dict[str, float]:
    flat, deepspeed = (run_sharded(settings, torch.float32, engine, zero(stage)) for engine in ("flat", "deepspeed"))
    return differences(flat, deepspeed)


@pytest.mark.parametrize(("stage", "world"), [(1, 2), full(2, 2), full(1, 4), full(2, 4)])
def test_the_engines_agree_over_twenty_steps(world: int, stage: int) -> None:
    """Weights, averages, cosines. 1e-6: roundings of 6e-8 that a small rate and a smooth net hardly enlarge."""
    settings = Settings(steps=20, lr=0.03125)
    for found in pool(world).run(both_engines, settings, stage):
        assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_engine_clips(stage: int) -> None:
    assert_equal(2, Settings(clip=0.5), torch.float32, "deepspeed", zero(stage), None)


LAYOUTS = [(0, "flat"), (2, "flat"), *((stage, "deepspeed") for stage in range(4))]


@crossed(
    "layout, model",
    LAYOUTS,
    list(TIMM),
    quick=[((2, "flat"), "vit"), ((3, "deepspeed"), "vit"), ((2, "flat"), "convnext"), ((2, "deepspeed"), "convnext")],
    ids=lambda value: value if isinstance(value, str) else f"{value[1]}{value[0]}",
)
def test_a_timm_model_as_a_run_builds_it(model: str, layout: tuple[int, str]) -> None:
    """Attention, layer norm, layer scale, dropout, drop-path: against timm's own model. To the flat engine stages 1 and
    2 are one."""
    stage, engine = layout
    if engine == "flat":
        assert_equal(2, TIMM[model], torch.float64, engine, {}, None if stage else 1)
    else:
        assert_equal(2, TIMM[model], torch.float32, engine, zero(stage))


@pytest.mark.parametrize("model", ["vit", full("convnext")])
def test_exact_feedback_of_a_timm_model(model: str) -> None:
    settings = dataclasses.replace(TIMM[model], rule="soft_exact", normalise="credits")
    assert_equal(2, settings, torch.float64, "flat", {})
