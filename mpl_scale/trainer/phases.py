"""The phases of a run, and the state (networks under ZeRO, schedules, averages) each one trains.

A phase starts from whole weights by network name and ends with them: engines are built anew, because every phase has
optimisers of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from mpl_scale.checkpoint import gather_parameters
from mpl_scale.config import Batches, Config, RunConfig
from mpl_scale.config.schema import MethodConfig, NetworkConfig, OptimConfig, OptimsConfig, ParallelConfig
from mpl_scale.engine import build_network
from mpl_scale.engine.recompute import apply_recompute
from mpl_scale.mesh import Mesh
from mpl_scale.models import build_model
from mpl_scale.models.buffers import stateful_buffers
from mpl_scale.models.weights import load_weights
from mpl_scale.mpl import (
    FEEDBACK_RULES,
    LOSSES,
    METHODS,
    Baseline,
    Method,
    MovingAverage,
    Network,
    Schedules,
    State,
)
from mpl_scale.optim import schedule
from mpl_scale.resolve import Resolved, resolve
from mpl_scale.spatial import parallelize

Weights = Mapping[str, torch.Tensor]
"""A network's parameters and buffers by name, whole, fp32."""


@dataclass(frozen=True)
class Phase:
    """One phase. Batches are images over all ranks and micro-batches; `index` keys its randomness and data order."""

    name: str
    index: int
    method: Method
    settings: MethodConfig
    optim: OptimsConfig
    steps: int
    labelled: int
    unlabelled: int = 0
    micro_batches: int = 1
    start_student_from: str = "student"


def plan_phases(config: Config, batches: Batches, *, max_steps: int | None) -> list[Phase]:
    """Teacher warm-up, the method's own phase, finetuning; without those of no steps, or of a teacher nobody uses.

    Args:
        config: the validated section.
        batches: the batch arithmetic.
        max_steps: shortens every phase, schedules included; None: as configured.
    """
    method, optim, phases = config.method, config.optim, config.phases
    main = METHODS[method.name]
    at_once = method.model_copy(update={"student_wait_steps": 0})
    warmup = Phase(
        name="teacher_warmup",
        index=0,
        method=METHODS["teacher_warmup"],
        settings=at_once,
        optim=optim,
        steps=phases.teacher_warmup.steps if main.teacher else 0,
        labelled=batches.labelled,
    )
    train = Phase(
        name="train",
        index=1,
        method=main,
        settings=method,
        optim=optim,
        steps=phases.train.steps,
        labelled=batches.labelled,
    )
    finetune = Phase(
        name="finetune",
        index=2,
        method=METHODS["supervised"],
        settings=at_once.model_copy(update={"ema_decay": 0.0}),
        optim=optim.model_copy(update={"student": phases.finetune.optim}),
        steps=phases.finetune.steps,
        labelled=batches.finetune,
        start_student_from=phases.finetune.start_from,
    )
    return [
        replace(
            phase,
            steps=min(phase.steps, max_steps or phase.steps),
            unlabelled=batches.unlabelled if phase.method.unlabelled else 0,
            micro_batches=batches.micro_batches,
        )
        for phase in (warmup, train, finetune)
        if phase.steps
    ]


def build_state(
    phase: Phase,
    run: RunConfig,
    *,
    mesh: Mesh,
    weights: Mapping[str, Weights],
    resolved: Resolved | None = None,
    unlabelled_images: int = 0,
) -> State:
    """The networks of a phase under their engines, from the weights of the phase before where there are any.

    resolved: the run on this mesh; None: it is resolved here. unlabelled_images: in the data set.
    """
    config, settings, parallel = run.mpl, phase.settings, run.mpl.parallel
    found = resolved or resolve(run, world=mesh.world, device=mesh.device.type)

    def network(name: str, section: NetworkConfig, optim: OptimConfig, source: str) -> Network:
        module = build_model(
            section,
            config.model,
            field=f"mpl_scale.model.{name}",
            seed=initial_seed(config.seed, name),
            group=mesh.world_group,
            kernels=found.kernels,
        )
        if source in weights:
            module.load_state_dict(weights[source])
        elif section.weights:
            load_weights(module, section, config.model, field=f"mpl_scale.model.{name}")
        module = recomputed(split(module, config, mesh=mesh), parallel)
        return build_network(
            module.to(mesh.device),
            engine=found.engine,
            optim=optim,
            ds_config={**run.deepspeed, "gradient_accumulation_steps": phase.micro_batches},
            mesh=mesh,
            kernels=found.kernels,
        )

    teacher = student = average = None
    if phase.method.teacher:
        teacher = network("teacher", config.model.teacher, phase.optim.teacher, "teacher")
    if phase.method.student:
        student = network("student", config.model.student, phase.optim.student, phase.start_student_from)
        if settings.ema_decay:
            average = MovingAverage(student, decay=settings.ema_decay)
    feedback, loss = settings.feedback, phase.method.training_loss(settings)
    kept = LOSSES[loss]().buffers(classes=config.model.num_classes, images=unlabelled_images) if loss else {}
    return State(
        method=settings,
        seed=(config.seed + (phase.index << 24)) & 0xFFFFFFFF,
        schedules=_schedules(phase, mesh.device),
        step=torch.zeros((), dtype=torch.int64, device=mesh.device),
        teacher=teacher,
        student=student,
        student_average=average,
        baseline=Baseline(
            decay=feedback.baseline_decay, bias_correction=feedback.baseline_bias_correction, device=mesh.device
        ),
        world_group=mesh.world_group,
        micro_batches=phase.micro_batches,
        deferred_teacher=found.deferred_teacher,
        forward_mode=found.derivative == "jvp",
        teacher_views=METHODS[settings.name].teacher_views,
        loss_buffers={name: buffer.to(mesh.device) for name, buffer in kept.items()},
        data_ranks=mesh.data,
        measure_drop=config.logging.labelled_loss_drop and not FEEDBACK_RULES[feedback.rule].measures_drop,
    )


def recomputed(module: nn.Module, parallel: ParallelConfig) -> nn.Module:
    """The module, recomputing activations as `parallel` says. Raises ValueError where it cannot."""
    return apply_recompute(
        module, parallel.recompute, backend=parallel.recompute_backend, offload=parallel.recompute_offload
    )


def split(module: nn.Module, config: Config, *, mesh: Mesh) -> nn.Module:
    """The module for this rank's columns of every image, as `parallel` says; whole images where the mesh has no width.

    Raises ValueError, with the module's path, where one has no width partition.
    """
    parallel = config.parallel
    return parallelize(
        module, mesh=mesh, image_size=config.model.image_size, switch_at=parallel.switch_at, halo=parallel.halo
    )


def initial_seed(seed: int, network: str) -> int:
    """Seed of a network's initial weights: teacher and student differ, and so do runs."""
    return 2 * seed + (network == "student")


def _schedules(phase: Phase, device: torch.device) -> Schedules:
    steps, settings = phase.steps, phase.settings
    step = torch.arange(steps, dtype=torch.float32)
    ramp = (step / settings.uda.ramp_steps).clamp(max=1.0) if settings.uda.ramp_steps else torch.ones(steps)
    wait = settings.student_wait_steps
    return Schedules(
        teacher_lr=schedule(phase.optim.teacher, steps=steps).to(device),
        student_lr=schedule(phase.optim.student, steps=steps, wait=wait).to(device),
        uda_weight=(settings.uda.weight * ramp).to(device),
        feedback_gate=(step >= wait).to(device, torch.float32),
    )


def collect_weights(state: State, *, mesh: Mesh) -> dict[str, Weights]:
    """Whole weights of "teacher", "student" and the student's "ema", those the state has, on every rank."""

    def whole(network: Network, shards: object, buffers: Mapping[str, torch.Tensor]) -> Weights:
        parameters = gather_parameters(network.layout, shards, group=mesh.world_group, owns=network.owns_shard)  # type: ignore[arg-type]
        return {**parameters, **{name: buffer.detach().clone() for name, buffer in buffers.items()}}

    weights: dict[str, Weights] = {}
    for name, network in (("teacher", state.teacher), ("student", state.student)):
        if network is not None:
            weights[name] = whole(network, network.master, stateful_buffers(network.module))
    if state.student_average is not None and state.student is not None:
        weights["ema"] = whole(state.student, state.student_average.shards, state.student_average.buffers)
    return weights
