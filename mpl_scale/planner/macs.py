"""Multiply-accumulates of a network, counted by forward hooks, and the FLOPs of a training step.

torch's FlopCounterMode ignores groups in the backward of depthwise convolutions (18 times too high on EfficientNet-L2).
A hook on every convolution and linear layer sees the shapes that really ran, groups included, on any device: on "meta"
nothing is computed. Batch norm, activations and gates are not counted, as is the custom.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mpl_scale.config.readers import FED_BACK
from mpl_scale.models.layers import DropoutLinear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEARS = (nn.Linear, DropoutLinear)


def count_macs(model: nn.Module, image_size: int, *, channels: int = 3) -> int:
    """Multiply-accumulates of one forward pass on one image.

    Args:
        model: on the meta device (nothing is computed) or any other; left as it was.
        image_size: height and width, pixels; for a model of vectors, their length.
        channels: of an image; 0: the model takes vectors [B, image_size].
    """
    parameter = next(model.parameters())
    shape = (1, channels, image_size, image_size) if channels else (1, image_size)
    training = model.training
    with torch.no_grad(), counted(model) as macs:
        model.eval()(torch.empty(shape, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    return macs[0]


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """While it is entered, every forward adds its multiply-accumulates to the list's one number."""
    total = [0]

    def add(layer: Any, _: Any, output: torch.Tensor) -> None:
        weight = layer.weight  # [out, in / groups, *kernel] or [out, in]: one output element costs all but `out`
        total[0] += output.numel() * (weight.numel() // weight.shape[0])

    layers = [layer for layer in model.modules() if isinstance(layer, (*CONVOLUTIONS, *LINEARS))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


def step_flops(
    method: str,
    *,
    teacher_macs: int,
    student_macs: int,
    labelled: int,
    unlabelled: int,
    student_sees_labelled: bool = True,
    gradient_feedback: bool = True,
    recompute: bool = False,
    deferred: bool = False,
) -> int:
    """Floating-point operations of one step: 2 per multiply-accumulate, a backward counts as two forwards.

    Images that pass forward and backward (3 forwards' worth each), B labelled and U unlabelled:

    | method | teacher | student |
    |---|---|---|
    | mpl | B + 2 U | U (+ B if it sees them), and B again for a feedback rule that takes a gradient |
    | uda, fixmatch, flexmatch, freematch, softmatch | | B + 2 U |
    | teacher_warmup | B + 2 U | |
    | reduced_mpl | B + U distributions | as mpl |
    | pseudo_label, noisy_student | U, forward only | B + U |
    | supervised, mixup, cutmix | | B |

    With `recompute` every backward repeats its forward (4 instead of 3; an upper bound for bn_act, which keeps the
    convolutions): the work of the hardware. Without, the work that the method asks for, which is what MFU divides by.
    A `deferred` teacher has one more forward. So has, uncounted, a baseline of several micro-batches whose loss adapts.

    Args:
        method: a name in mpl_scale.mpl.METHODS.
        teacher_macs: of a forward on one image.
        student_macs: likewise.
        labelled: B.
        unlabelled: U.
        student_sees_labelled: mpl_scale.method.student_sees_labelled.
        gradient_feedback: whether the rule takes g_l (cosine, dot, flipped), else two labelled forwards or none: 0.
        recompute: count repeated forwards.
        deferred: count the deferred teacher's extra forward.

    Raises:
        ValueError: a method this table does not have.
    """
    both_views = labelled + 2 * unlabelled
    student_batch = unlabelled + (labelled if student_sees_labelled else 0)
    feedback = labelled if gradient_feedback else 0
    trained = {  # images forward and backward: teacher's, student's
        "mpl": (both_views, student_batch + feedback),
        "reduced_mpl": (labelled + unlabelled, student_batch + feedback),
        "uda": (0, both_views),
        **dict.fromkeys(("fixmatch", "flexmatch", "freematch", "softmatch"), (0, both_views)),
        "teacher_warmup": (both_views, 0),
        "pseudo_label": (0, labelled + unlabelled),
        "noisy_student": (0, labelled + unlabelled),
        "supervised": (0, labelled),
        "mixup": (0, labelled),
        "cutmix": (0, labelled),
    }
    if method not in trained:
        raise ValueError(f"method {method!r} has no row in step_flops; add one (known: {', '.join(trained)})")
    teacher_images, student_images = trained[method]
    forward_only = unlabelled if method in ("pseudo_label", "noisy_student") else 0
    if deferred and method in FED_BACK:
        forward_only = teacher_images
    times = 4 if recompute else 3
    teacher = teacher_macs * (times * teacher_images + forward_only)
    return 2 * (teacher + student_macs * times * student_images)
