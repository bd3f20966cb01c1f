"""Whole steps of every kind on any device: a state, and batches of pixels for it, from one description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mpl_scale.config.schema import DataConfig, FeedbackConfig, MethodConfig, ModelConfig, NetworkConfig, OptimConfig
from mpl_scale.data.normalise import Normalise
from mpl_scale.engine import build_network
from mpl_scale.engine.recompute import apply_recompute
from mpl_scale.mesh import Mesh
from mpl_scale.models import build_model
from mpl_scale.mpl import (
    FEEDBACK_RULES,
    LOSSES,
    METHODS,
    Baseline,
    MovingAverage,
    Network,
    PseudoLabels,
    Schedules,
    State,
)
from mpl_scale.mpl.methods import Step
from mpl_scale.mpl.skipping import SkipNonfinite
from mpl_scale.spatial import input_columns, parallelize
from mpl_scale.types import Batch

CLASSES, STEPS, IMAGES = 7, 20, 40
CPU = torch.device("cpu")
on_each_device = pytest.mark.parametrize(
    "device",
    [
        CPU,
        pytest.param(
            torch.device("cuda", 0),
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; cpu is its twin"),
            ],
        ),
    ],
    ids=lambda device: device.type,
)


@dataclass(frozen=True)
class Case:
    """A step. Dropout, clipping, the moving average and changing rates are always on; drop-path in EfficientNets."""

    method: str = "mpl"
    rule: str = "cosine"
    loss: str = "uda"
    optimizer: str = "sgd"
    recompute: str = "none"
    network: str = "digits_cnn"
    size: int = 8
    deferred: bool = False
    micro_batches: int = 1
    skipping: bool = False
    bf16: bool = False

    def __str__(self) -> str:
        changed = [getattr(self, name) for name in ("method", "rule", "loss", "optimizer", "recompute", "network")]
        flags = [name for name in ("deferred", "skipping", "bf16") if getattr(self, name)]
        return "-".join([*changed, *flags, *([f"x{self.micro_batches}"] if self.micro_batches > 1 else [])])


EVERY_STEP = [
    *(Case(rule=name) for name, rule in FEEDBACK_RULES.items() if rule.__module__.startswith("mpl_scale.")),
    *(Case(method=method) for method in METHODS if method != "mpl"),
    *(Case(loss=name) for name, loss in LOSSES.items() if loss.adapts),
]
"""Each registered feedback rule with mpl, every other registered method, and mpl over each loss that adapts."""


def make_state(case: Case, mesh: Mesh) -> tuple[Step, State]:
    """The step and what it trains, on the mesh's device."""
    labels = "soft" if FEEDBACK_RULES[case.rule].soft_labels else "sampled"
    named = "mpl" if case.method == "teacher_warmup" else case.method  # a phase of its own, of any method
    feedback = FeedbackConfig(rule=case.rule, baseline_decay=0.9)
    followed = {"teacher_loss": case.loss, "pseudo_label_threshold": 0.2}
    method = MethodConfig(name=named, pseudo_labels=labels, feedback=feedback, ema_decay=0.9, **followed)
    kind = METHODS[case.method]
    teacher = _network(case, "teacher", mesh) if kind.teacher else None
    student = _network(case, "student", mesh) if kind.student else None
    rates = torch.linspace(0.01, 0.1, STEPS).to(mesh.device)
    loss = kind.training_loss(method)
    kept = LOSSES[loss]().buffers(classes=CLASSES, images=IMAGES) if loss else {}
    state = State(
        method=method,
        seed=5,
        schedules=Schedules(rates, 2 * rates, 10 * rates, torch.ones_like(rates)),
        step=torch.zeros((), dtype=torch.int64, device=mesh.device),
        teacher=teacher,
        student=student,
        student_average=MovingAverage(student, decay=0.9) if student is not None else None,
        baseline=Baseline(decay=0.9, bias_correction=True, device=mesh.device),
        world_group=mesh.world_group,
        micro_batches=case.micro_batches,
        deferred_teacher=case.deferred,
        forward_mode=True,
        teacher_views=kind.teacher_views,
        loss_buffers={name: buffer.to(mesh.device) for name, buffer in kept.items()},
        data_ranks=mesh.data,
        noted=PseudoLabels(16 // mesh.data, device=mesh.device) if kind.unlabelled else None,
    )
    return SkipNonfinite(kind.step, state) if case.skipping else kind.step, state


def _network(case: Case, name: str, mesh: Mesh) -> Network:
    reduced = case.method == "reduced_mpl" and name == "teacher"
    drop_path = 0.2 if case.network.endswith("efficientnet") else 0.0
    section = NetworkConfig(name="reduced_teacher" if reduced else case.network, dropout=0.2, drop_path=drop_path)
    shared = ModelConfig(teacher=section, student=section, num_classes=CLASSES, image_size=case.size)
    device = "meta" if mesh.device.type == "meta" else "cpu"
    seed = 1 + (name == "student")
    module = build_model(section, shared, field=name, seed=seed, group=mesh.world_group, device=device)
    module = parallelize(module, mesh=mesh, image_size=case.size, switch_at="never")
    return build_network(
        apply_recompute(module, case.recompute).to(mesh.device),
        engine="flat",
        optim=OptimConfig(name=case.optimizer, lr=0.1, weight_decay=1e-4),
        ds_config={
            "gradient_clipping": 0.5,
            "gradient_accumulation_steps": case.micro_batches,
            "bf16": {"enabled": case.bf16},
        },
        mesh=mesh,
    )


def make_batches(case: Case, mesh: Mesh, count: int) -> list[Batch]:
    """This rank's rows and columns of global batches of 8 labelled and 16 unlabelled images, uint8."""
    generator = torch.Generator().manual_seed(0)
    begin, end = (input_columns(case.size, mesh.width) or [(0, case.size)])[mesh.width_index]
    rows = {n: torch.arange(n).chunk(mesh.data)[mesh.data_index] for n in (8, 16)}
    normalise = Normalise(DataConfig(), device=mesh.device, dtype=torch.float32)

    def pixels(n: int) -> torch.Tensor:
        images = torch.randint(256, (n, 3, case.size, case.size), generator=generator, dtype=torch.uint8)
        return images[rows[n], :, :, begin:end].contiguous().to(mesh.device)

    def one() -> Batch:
        labels = torch.randint(0, CLASSES, (8,), generator=generator)[rows[8]]
        stored: dict[str, Any] = {}
        if case.method == "reduced_mpl":
            drawn = {n: torch.rand(n, CLASSES, generator=generator).softmax(1)[rows[n]] for n in rows}
            stored = {"labelled_distributions": drawn[8], "unlabelled_distributions": drawn[16]}
        ids = torch.randint(0, IMAGES, (16,), generator=generator)[rows[16]]
        return Batch(
            labelled=pixels(8),
            labels=labels.to(mesh.device),
            labelled_rows=rows[8].to(mesh.device),
            weak=pixels(16),
            strong=pixels(16),
            unlabelled_rows=rows[16].to(mesh.device),
            normalise=normalise,
            unlabelled_ids=ids.to(mesh.device),
            **{name: values.to(mesh.device) for name, values in stored.items()},
        )

    return [one() for _ in range(count)]


def everything(state: State) -> list[torch.Tensor]:
    """Copies of what a step reads and changes."""
    tensors = [state.step, state.baseline.average, state.baseline.steps, *state.loss_buffers.values()]
    if state.student_average is not None:
        tensors += [*state.student_average.shards, *state.student_average.buffers.values()]
    for network in (state.teacher, state.student):
        if network is not None:
            tensors += [*network.module.state_dict().values(), *network.master]
            tensors += [shard for shards in network.optimizer_state.values() for shard in shards]
            tensors += network.optimizer_counters.values()
    return [tensor.detach().clone() for tensor in tensors]
