"""The same run as reference.py through the package: called on every rank of a pool."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from mpl_scale.checkpoint.gather import gather_parameters
from mpl_scale.config.schema import FeedbackConfig, MethodConfig, ModelConfig, NetworkConfig, OptimConfig, UDAConfig
from mpl_scale.engine import build_network
from mpl_scale.mesh import Mesh, build_mesh
from mpl_scale.models import build_model
from mpl_scale.models.frozen import freeze
from mpl_scale.models.layers import convert
from mpl_scale.models.passes import Passes
from mpl_scale.mpl import METHODS, Baseline, MovingAverage, Network, Schedules, State
from mpl_scale.types import Batch
from tests.support.reference import Settings, Trace, make_batches, make_net


def method_config(s: Settings) -> MethodConfig:
    return MethodConfig(
        feedback=FeedbackConfig(rule=s.rule, normalise=s.normalise, baseline_decay=s.baseline_decay),
        pseudo_labels="soft" if s.rule == "soft_exact" else "sampled",
        uda=UDAConfig(weight=s.uda_weight, temperature=s.temperature, threshold=s.threshold),
        label_smoothing=s.smoothing,
        ema_decay=s.ema_decay,
    )


def make_network(
    seed: int, s: Settings, dtype: torch.dtype, width: int, engine: str, ds_config: dict[str, Any], mesh: Mesh
) -> Network:
    net = make_net(seed, dtype, s, width)
    if s.model:
        net = as_a_run_builds_it(net, s, mesh).to(dtype)
    else:
        net.passes = Passes()
        convert(net, passes=net.passes, group=mesh.world_group)
        freeze(net, s.frozen, field="frozen")
    optim = OptimConfig(lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    return build_network(
        net,
        engine=engine,
        optim=optim,
        ds_config={**ds_config, "gradient_clipping": s.clip, "gradient_accumulation_steps": s.micro_batches},
        mesh=mesh,
    )


def as_a_run_builds_it(plain: nn.Module, s: Settings, mesh: Mesh) -> nn.Module:
    """The configured model with a plain timm model's weights."""
    network = NetworkConfig(name=s.model, kwargs=dict(s.kwargs), drop_path=s.drop_path)
    shared = ModelConfig(teacher=network, student=network, num_classes=s.classes, image_size=s.size)
    net = build_model(network, shared, field="model", seed=0, group=mesh.world_group)
    net.load_state_dict(plain.state_dict())
    return net


def make_state(s: Settings, teacher: Network, student: Network, mesh: Mesh, steps: int | None = None) -> State:
    constant = torch.full((steps or s.steps,), s.lr)
    return State(
        method=method_config(s),
        seed=s.seed,
        schedules=Schedules(constant, constant, torch.full_like(constant, s.uda_weight), torch.ones_like(constant)),
        step=torch.zeros((), dtype=torch.int64),
        teacher=teacher,
        student=student,
        student_average=MovingAverage(student, decay=s.ema_decay),
        baseline=Baseline(decay=s.baseline_decay, bias_correction=True, device=torch.device("cpu")),
        world_group=mesh.world_group,
        micro_batches=s.micro_batches,
        deferred_teacher=s.deferred,
        forward_mode=True,
        measure_drop=True,
    )


def rank_batch(batch: tuple[torch.Tensor, ...], mesh: Mesh) -> Batch:
    """This rank's rows of a global batch."""

    def rows(n: int) -> torch.Tensor:
        return torch.arange(n).chunk(mesh.data)[mesh.data_index]

    x_l, y_l, x_u, x_s = batch
    l_rows, u_rows = rows(len(x_l)), rows(len(x_u))
    return Batch(x_l[l_rows], y_l[l_rows], l_rows, x_u[u_rows], x_s[u_rows], u_rows)


def full_state(network: Network, shards: Any, buffers: dict[str, torch.Tensor], mesh: Mesh) -> dict[str, torch.Tensor]:
    weights = gather_parameters(network.layout, shards, group=mesh.world_group, owns=network.owns_shard)
    return {**weights, **{k: v.clone() for k, v in buffers.items()}}


def run_sharded(
    s: Settings, dtype: torch.dtype, engine: str, ds_config: dict[str, Any], shard_size: int | None = None
) -> Trace:
    """Every rank returns the whole (gathered) result."""
    mesh = build_mesh(device=torch.device("cpu"), shard_size=shard_size)
    teacher = make_network(1, s, dtype, 6, engine, ds_config, mesh)
    student = make_network(2, s, dtype, 5, engine, ds_config, mesh)
    state = make_state(s, teacher, student, mesh)
    trace = Trace()
    for batch in make_batches(s, dtype):
        metrics = METHODS["mpl"].step(state, rank_batch(batch, mesh))
        trace.cosines.append(metrics["cosine"].item())
    average = state.student_average
    assert average is not None
    trace.teacher = full_state(teacher, teacher.master, dict(teacher.module.named_buffers()), mesh)
    trace.student = full_state(student, student.master, dict(student.module.named_buffers()), mesh)
    trace.average = full_state(student, average.shards, average.buffers, mesh)
    trace.baseline = state.baseline.average.item()
    return trace


def differences(ours: Trace, reference: Trace) -> dict[str, float]:
    """Largest absolute difference by part."""
    result = {
        part: max((getattr(ours, part)[k].double() - v.double()).abs().max().item() for k, v in values.items())
        for part, values in ((f.name, getattr(reference, f.name)) for f in dataclasses.fields(Trace))
        if isinstance(values, dict)
    }
    result["cosine"] = max(abs(a - b) for a, b in zip(ours.cosines, reference.cosines, strict=True))
    result["baseline"] = abs(ours.baseline - reference.baseline)
    return result


def zero(stage: int) -> dict[str, Any]:
    """Small buckets and no persistent parameters, so that every bucket and gather path runs."""
    return {
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 200,
            "allgather_bucket_size": 200,
            "stage3_param_persistence_threshold": 0,
        }
    }
