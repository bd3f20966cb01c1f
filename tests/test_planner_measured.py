"""Planned bytes against a census of live engines: real networks on four real ranks, every engine, stage and width."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mpl_scale.config.schema import Config, ModelConfig, NetworkConfig, OptimConfig, ParallelConfig
from mpl_scale.engine import build_network
from mpl_scale.engine.recompute import apply_recompute
from mpl_scale.mesh import Mesh, build_mesh
from mpl_scale.models import Pass, build_model
from mpl_scale.mpl import METHODS, MovingAverage
from mpl_scale.planner import StorageCensus, reachable_bytes
from mpl_scale.planner.job import Choice, Job
from mpl_scale.planner.memory import network_state
from mpl_scale.spatial import input_columns, parallelize
from tests.support.configs import tiny
from tests.support.ranks import pool
from tests.support.tiers import full

BUCKET, BATCH, RANKS = 20_000, 4, 4
SIZES = {"wide_resnet28_2": 32, "tf_efficientnet_b0": 32, "resnet50": 32}
EVERYTHING = [
    (name, engine, stage, width, "none")
    for name in SIZES
    for width in (1, 2, 4)
    for engine, stages in (("flat", (0, 1, 2)), ("deepspeed", (0, 1, 2, 3)))
    for stage in stages
]
ALWAYS = [
    ("wide_resnet28_2", "deepspeed", 0, 1, "none"),
    ("wide_resnet28_2", "deepspeed", 1, 2, "none"),
    ("wide_resnet28_2", "deepspeed", 2, 1, "bn_act"),
    ("wide_resnet28_2", "deepspeed", 3, 4, "none"),
    ("tf_efficientnet_b0", "flat", 0, 4, "none"),
    ("tf_efficientnet_b0", "flat", 1, 1, "block"),
    ("resnet50", "flat", 2, 2, "none"),
]
CASES = sorted({*ALWAYS, *EVERYTHING}) if os.environ.get("MPL_SCALE_TEST_ALL") else ALWAYS
REPEATED = (ALWAYS[0], ALWAYS[5], ALWAYS[6])
"""test_planner_static.py measures the state of every engine and stage, test_planner_summary.py whole blocks again."""


def settings(name: str) -> ModelConfig:
    network = NetworkConfig(name=name)
    return ModelConfig(teacher=network, student=network, num_classes=10, image_size=SIZES[name])


def zero(stage: int) -> dict[str, Any]:
    return {"stage": stage, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}


def measured(name: str, engine: str, stage: int, width: int, recompute: str) -> tuple[int, int]:
    """(kept activations, static bytes) of a student on this rank."""
    shared = settings(name)
    mesh = build_mesh(
        device=torch.device("cpu"), width=width, shard_size=1 if engine == "flat" and stage == 0 else None
    )
    model = build_model(shared.student, shared, field="m", seed=0, group=mesh.world_group)
    model = apply_recompute(parallelize(model, mesh=mesh, image_size=shared.image_size), recompute)  # type: ignore[arg-type]
    network = build_network(
        model,
        engine=engine,  # type: ignore[arg-type]
        optim=OptimConfig(name="rmsprop", lr=0.01),
        ds_config={"zero_optimization": zero(stage), "gradient_clipping": 0.0},
        mesh=mesh,
    )
    average = MovingAverage(network, decay=0.9)
    start, stop = input_columns(shared.image_size, width)[mesh.width_index]
    images, labels = torch.randn(BATCH, 3, shared.image_size, stop - start), torch.arange(BATCH)
    held = {}
    pass_ = Pass(seed=0, stream=0, step=torch.zeros((), dtype=torch.int64), rows=labels)
    with StorageCensus() as census:
        logits = network.forward(images, pass_)
        loss = F.cross_entropy(logits, labels)
    parameters = [p.data for p in model.parameters()]  # at stage 3 gathered, and no activations
    kept = census.live_bytes(apart_from=(*parameters, *model.parameters(), *model.buffers(), images, logits, loss))
    if engine == "deepspeed":  # the flat engine allocates nothing in a step, DeepSpeed its states in the first one
        network.accumulate(loss)
        held["g_u"] = network.reduce()
        network.apply(torch.tensor(0.01))
        network.accumulate(F.cross_entropy(network.forward(images, pass_), labels))
        held["g_l"] = network.reduce()
    del logits, loss
    static = reachable_bytes([network, average, held])
    network.discard()
    if engine == "deepspeed":
        network._engine.destroy()  # type: ignore[attr-defined]
    return kept, static


def job(name: str, stage: int) -> Job:
    raw = tiny()["mpl_scale"]
    raw["model"] = settings(name).model_dump()
    raw["optim"]["student"] = {"name": "rmsprop", "lr": 0.01}
    config = Config.model_validate_json(json.dumps(raw))
    ds_config = {"zero_optimization": zero(stage), "gradient_clipping": 0.0}
    labelled = BATCH * RANKS
    return Job("train", config, ds_config, METHODS["mpl"], config.method, config.optim, labelled, labelled, 1, "eager")


@pytest.mark.parametrize("case", [full(case) if case in REPEATED else case for case in CASES])
def test_kept_activations_and_static_bytes_are_the_planned_ones(case: tuple[str, str, int, int, str]) -> None:
    """Kept within 10%, static within 5%: padded shards, and small tensors that layers hold on to, are not planned."""
    name, engine, stage, width, recompute = case
    kept, static = pool(RANKS).run(measured, *case)[1]  # the rank that the planner plans for
    choice = Choice(RANKS, width, stage, RANKS, engine, recompute, False, BATCH, 1)  # type: ignore[arg-type]
    planned = job(name, stage)
    assert planned.trace("student", choice).kept_bytes(BATCH) == pytest.approx(kept, rel=0.10)
    assert sum(network_state(planned, choice, "student").values()) == pytest.approx(static, rel=0.05)


@pytest.mark.parametrize("shards", [full(1), full(2), 4])
def test_l2s_state_is_what_the_flat_engine_holds_on_the_meta_device(shards: int) -> None:
    """480 M parameters in bf16, as l2.json trains them: masters, RMSProp, two gradients, average. 5%; shapes only."""
    shared = ModelConfig(
        teacher=NetworkConfig(name="tf_efficientnet_l2"),
        student=NetworkConfig(name="tf_efficientnet_l2"),
        num_classes=1000,
        image_size=512,
    )
    model = build_model(shared.student, shared, field="m", seed=0, device="meta")
    one = build_mesh(device=torch.device("meta"))
    mesh: Mesh = dataclasses.replace(one, shard_size=shards)
    optim = OptimConfig(name="rmsprop", lr=0.1)
    ds_config = {"bf16": {"enabled": True}, "gradient_clipping": 0.0}
    network = build_network(model, engine="flat", optim=optim, ds_config=ds_config, mesh=mesh)
    average = MovingAverage(network, decay=0.9)
    raw = tiny()["mpl_scale"]
    raw["model"] = shared.model_dump()
    raw["optim"]["student"] = optim.model_dump()
    config = Config.model_validate_json(json.dumps(raw))
    stage = 2 if shards > 1 else 0
    planned = Job(
        "train",
        config,
        {**ds_config, "zero_optimization": zero(stage)},
        METHODS["mpl"],
        config.method,
        config.optim,
        8,
        8,
        1,
        "compiled",
    )
    choice = Choice(shards, 1, stage, shards, "flat", "block", False, 8 // shards, 1)
    expected = sum(network_state(planned, choice, "student").values())
    assert expected == pytest.approx(reachable_bytes([network, average], meta=True), rel=0.05)


@pytest.mark.full
def test_l2s_kept_activations_are_linear_in_the_images() -> None:
    """The trace's line, from one large prime batch, against a census of two images on the meta device; 1%."""
    from mpl_scale.planner import kept_bytes, to_compute_dtype
    from mpl_scale.planner.cache import traced
    from mpl_scale.planner.trace import TraceKey

    network = NetworkConfig(name="tf_efficientnet_l2", drop_path=0.2)
    shared = ModelConfig(teacher=network, student=network, num_classes=1000, image_size=512)
    model = build_model(network, shared, field="m", seed=0, device="meta")
    model = to_compute_dtype(apply_recompute(model, "bn_act"), torch.bfloat16)
    images = torch.empty(2, 3, 512, 512, dtype=torch.bfloat16, device="meta")
    parallel = ParallelConfig(recompute="bn_act")
    key = TraceKey.of(network, shared, parallel, kernels="eager", world=1, dtype=torch.bfloat16)
    assert traced(key).kept_bytes(2) == pytest.approx(kept_bytes(model, images), rel=0.01)
