"""Methods by registry: what one step does, and which networks it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpl_scale.config.names import Registry
from mpl_scale.config.schema import MethodConfig
from mpl_scale.mpl.state import State
from mpl_scale.mpl.views import Views, stored_views, three_views
from mpl_scale.types import Batch, StepMetrics

Step = Callable[[State, Batch], StepMetrics]
CONFIGURED = "method.teacher_loss"
"""In place of a training loss's name: what this setting says."""


@dataclass(frozen=True)
class Method:
    """A step and what it needs of the state and of the batches."""

    name: str
    step: Step
    teacher: bool
    student: bool
    unlabelled: bool
    teacher_views: Views = three_views
    loss: str | None = None

    def training_loss(self, settings: MethodConfig) -> str | None:
        """The training loss that its step uses, by name; None: none of LOSSES."""
        return settings.teacher_loss if self.loss == CONFIGURED else self.loss

    @property
    def teacher_sees_images(self) -> bool:
        """False where it sees stored distributions instead."""
        return self.teacher_views is not stored_views


METHODS: Registry[Method] = Registry("method")


def register_method(
    name: str,
    *,
    teacher: bool,
    student: bool,
    unlabelled: bool = True,
    teacher_views: Views = three_views,
    loss: str | None = None,
) -> Callable[[Step], Step]:
    """Make a step available as `mpl_scale.method.name`.

    Args:
        name: for the config.
        teacher: whether the state must hold a teacher.
        student: whether it must hold a student.
        unlabelled: whether batches carry unlabelled images.
        teacher_views: what the teacher sees of a batch, in its warm-up too.
        loss: the training loss whose buffers the state must hold, or CONFIGURED; None: it uses none.
    """

    def add(step: Step) -> Step:
        METHODS[name] = Method(name, step, teacher, student, unlabelled, teacher_views, loss)
        return step

    return add
