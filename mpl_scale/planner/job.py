"""What is planned: a phase of a run (Job), on devices (Machine), cut in one of the ways there are (Choice)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mpl_scale.config.readers import EXACT_RULES, FED_BACK
from mpl_scale.config.schema import Config, MethodConfig, OptimsConfig
from mpl_scale.data.vectors import LENGTHS
from mpl_scale.models.kernels import Mode
from mpl_scale.mpl import LOSSES, METHODS, Method
from mpl_scale.mpl.training_losses import TrainingLoss
from mpl_scale.planner.cache import traced
from mpl_scale.planner.hardware import Device, Reached
from mpl_scale.planner.macs import LOSS_RULES
from mpl_scale.planner.trace import NetworkTrace, TraceKey

Engine = Literal["flat", "deepspeed"]


@dataclass(frozen=True)
class Machine:
    """Devices, all alike, and what programs reach of them."""

    device: Device
    reached: Reached


@dataclass(frozen=True)
class Choice:
    """One way to cut a step. labelled: images of a data rank's micro-batch; parts: micro-batches of a step."""

    world: int
    width: int
    stage: int
    shard_size: int
    engine: Engine
    recompute: str | tuple[str, ...]
    deferred: bool
    labelled: int
    parts: int

    @property
    def data(self) -> int:
        """Number of data ranks."""
        return self.world // self.width

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the state."""
        return self.shard_size if self.stage else 1

    def settings(self) -> dict[str, Any]:
        """The fields of a ds_config that make a run cut its steps this way, by path."""
        return {
            "train_micro_batch_size_per_gpu": self.labelled,
            "gradient_accumulation_steps": self.parts,
            "zero_optimization.stage": self.stage,
            "mpl_scale.parallel.engine": self.engine,
            "mpl_scale.parallel.width": self.width,
            "mpl_scale.parallel.shard_size": self.shard_size if self.stage else None,
            "mpl_scale.parallel.recompute": self.recompute if isinstance(self.recompute, str) else list(self.recompute),
            "mpl_scale.parallel.teacher": "deferred" if self.deferred else "live",
        }

    def __str__(self) -> str:
        recompute = self.recompute if isinstance(self.recompute, str) else "-".join(self.recompute)
        zero = f"ZeRO-{self.stage}" + (f" over {self.shards}" if self.stage else "") + f" ({self.engine})"
        teacher = "deferred teacher" if self.deferred else "live teacher"
        batch = f"{self.labelled} labelled a micro-batch x {self.parts}"
        return f"data {self.data} x width {self.width}, {zero}, recompute {recompute}, {teacher}, {batch}"


@dataclass(frozen=True)
class Job:
    """One phase: its method and its batch over all ranks, and the configuration it stands in."""

    name: str
    config: Config
    deepspeed: Mapping[str, Any]
    method: Method
    settings: MethodConfig
    optim: OptimsConfig
    labelled: int
    unlabelled: int
    steps: int
    kernels: Mode

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, gradients and activations."""
        return torch.bfloat16 if self.deepspeed.get("bf16", {}).get("enabled", False) else torch.float32

    @property
    def ratio(self) -> float:
        """Unlabelled images per labelled one."""
        return self.unlabelled / self.labelled

    def images(self, choice: Choice) -> tuple[int, int]:
        """(labelled, unlabelled) of a data rank's micro-batch."""
        share = choice.data * choice.parts
        return self.labelled // share, self.unlabelled // share

    def trace(self, network: Literal["teacher", "student"], choice: Choice) -> NetworkTrace:
        """The network as that choice cuts it. ValueError where it cannot."""
        recompute = choice.recompute if isinstance(choice.recompute, str) else list(choice.recompute)
        parallel = self.config.parallel.model_copy(update={"width": choice.width, "recompute": recompute})
        section, kernels = getattr(self.config.model, network), self.kernels
        key = TraceKey.of(
            section,
            self.config.model,
            parallel,
            kernels=kernels,
            world=choice.world,
            dtype=self.dtype,
            vectors=self._vectors(network),
        )
        return traced(key)

    def _vectors(self, network: Literal["teacher", "student"]) -> int:
        """The length of what the network sees where that is no image, else 0."""
        if network == "teacher" and not self.teacher_sees_images:
            return self.config.model.num_classes
        return LENGTHS.get(self.config.data.source, 0)

    @property
    def teacher_sees_images(self) -> bool:
        """Whether it does in the run's method, and so in its warm-up."""
        return METHODS[self.settings.name].teacher_sees_images

    @property
    def training_loss(self) -> TrainingLoss | None:
        """The one that its step uses; None: none of LOSSES."""
        name = self.method.training_loss(self.settings)
        return None if name is None else LOSSES[name]()

    def networks(self) -> list[Literal["teacher", "student"]]:
        """The networks that the method trains."""
        found: list[Literal["teacher", "student"]] = []
        if self.method.teacher:
            found.append("teacher")
        if self.method.student:
            found.append("student")
        return found

    def passes(self, choice: Choice) -> list[NetworkPass]:
        """The passes of one micro-batch, in the order of the step (mpl/step.py and mpl/baselines.py)."""
        labelled, unlabelled = self.images(choice)
        views, name = labelled + 2 * unlabelled, self.method.name
        if not self.teacher_sees_images:  # one stored distribution of each image
            views = labelled + unlabelled
        if name in FED_BACK:
            seen = unlabelled + (labelled if self.settings.student_sees_labelled else 0)
            teacher = NetworkPass("teacher_update", "teacher", views, forward=int(choice.deferred), backward=1)
            return [
                NetworkPass("teacher_forward", "teacher", views, forward=1, graph=not choice.deferred),
                NetworkPass("student_update", "student", seen, forward=1, backward=1, graph=True),
                *_feedback(self.settings, labelled, seen),
                teacher,
            ]
        if name in ("pseudo_label", "noisy_student"):
            return [
                NetworkPass("teacher_forward", "teacher", unlabelled, forward=1),
                NetworkPass("student_update", "student", labelled + unlabelled, forward=1, backward=1, graph=True),
            ]
        images = views if self.method.unlabelled else labelled
        loss = self.training_loss
        forward = 2 if loss is not None and loss.adapts and choice.parts > 1 else 1
        return [NetworkPass(f"{n}_update", n, images, forward, backward=1, graph=True) for n in self.networks()]


@dataclass(frozen=True)
class NetworkPass:
    """Forward and backward passes of a network over a number of images. graph: whether activations are kept."""

    phase: str
    network: Literal["teacher", "student"]
    images: int
    forward: int = 0
    backward: int = 0
    graph: bool = False


def _feedback(settings: MethodConfig, labelled: int, seen: int) -> list[NetworkPass]:
    rule = settings.feedback.rule
    if rule == "none":
        return []
    if rule in LOSS_RULES:  # kekmodel has the old loss from the update pass
        return [NetworkPass("feedback", "student", labelled, forward=1 + (rule == "loss_difference"))]
    found = [NetworkPass("feedback", "student", labelled, forward=1, backward=1, graph=True)]
    if rule in EXACT_RULES:  # the student's pass again: twice, or once with its derivative, a product by two products
        passes = 2 if settings.feedback.derivative == "difference" else 3
        found.append(NetworkPass("feedback", "student", seen, forward=passes))
    return found
