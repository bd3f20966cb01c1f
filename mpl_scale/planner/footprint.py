"""What a network costs at its full size, by shapes alone, and how many images' activations a step keeps at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpl_scale.config.schema import ModelConfig, NetworkConfig, ParallelConfig
from mpl_scale.engine.recompute import apply_recompute
from mpl_scale.models import build_model
from mpl_scale.mpl import Method
from mpl_scale.planner.activations import kept_bytes, to_compute_dtype
from mpl_scale.planner.macs import count_macs

_IMAGES = 2  # batch norm wants more than one


@dataclass(frozen=True)
class NetworkCost:
    """One network, whole.

    Attributes:
        parameters: elements.
        buffers: elements of batch norm's averages.
        macs: multiply-accumulates of a forward pass on one image.
        kept_per_image: bytes that a forward pass in training mode leaves for its backward pass, recomputation applied.
    """

    parameters: int
    buffers: int
    macs: int
    kept_per_image: float


def network_cost(
    network: NetworkConfig, shared: ModelConfig, *, field: str, parallel: ParallelConfig, dtype: torch.dtype
) -> NetworkCost:
    """Build a network on the meta device and count.

    Batch norm runs as torch operators: compiled kernels keep less (parallel.kernels).

    Args:
        network: the network's section.
        shared: what teacher and student share.
        field: path of the section, for errors.
        parallel: `recompute` is read.
        dtype: what weights and activations are in.
    """
    model, size = build_model(network, shared, field=field, seed=0, device="meta"), shared.image_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    macs = count_macs(model, size)
    model = to_compute_dtype(apply_recompute(model, parallel.recompute), dtype)
    images = torch.empty(_IMAGES, 3, size, size, dtype=dtype, device="meta")
    return NetworkCost(parameters, buffers, macs, kept_bytes(model, images) / _IMAGES)


def kept_activations(
    method: Method,
    *,
    teacher: float,
    student: float,
    labelled: int,
    unlabelled: int,
    student_sees_labelled: bool = True,
    deferred: bool = False,
) -> float:
    """Bytes of activations that one rank keeps at once, at the step's worst moment, for whole images.

    With B labelled and U unlabelled images to a micro-batch:

    | method | kept |
    |---|---|
    | mpl | teacher B + 2 U, and beside it the student's U (+ B if it sees them); deferred: the larger of the two |
    | uda, teacher_warmup | B + 2 U of the one network |
    | pseudo_label | student B + U |
    | methods without unlabelled images | student B |
    | others | B + 2 U of every network they train: an upper bound |

    Args:
        method: of mpl_scale.mpl.METHODS.
        teacher: bytes kept per image.
        student: likewise.
        labelled: B, of one data rank and micro-batch.
        unlabelled: U, likewise.
        student_sees_labelled: mpl_scale.method.student_sees_labelled.
        deferred: whether the teacher's graph is built after the student's step.
    """
    views = labelled + 2 * unlabelled
    if method.name == "mpl":
        of_teacher = teacher * views
        of_student = student * max(unlabelled + (labelled if student_sees_labelled else 0), labelled)
        return max(of_teacher, of_student) if deferred else of_teacher + of_student
    if method.name == "pseudo_label":
        return student * (labelled + unlabelled)
    if not method.unlabelled:
        return student * labelled
    return views * ((teacher if method.teacher else 0.0) + (student if method.student else 0.0))
