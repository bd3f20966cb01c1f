"""Multiply-accumulates of a network, and the FLOPs of a training step.

A forward pass runs under torch's FlopCounterMode: convolutions by their groups, every matrix product, attention's too.
On "meta" nothing is computed. Batch norm, softmax, activations and gates are not counted, as is the custom. A backward
pass is not run, because there the counter ignores the groups of depthwise convolutions (18 times too high on
EfficientNet-L2): it counts as two forwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpl_scale.config.readers import FED_BACK
from mpl_scale.config.schema import MethodConfig

LOSS_RULES = ("loss_difference", "kekmodel")
"""Feedback rules that take labelled losses of the student, and no gradient."""


def count_macs(model: nn.Module, image_size: int, *, channels: int = 3) -> int:
    """Multiply-accumulates of one forward pass on one image.

    Args:
        model: on the meta device (nothing is computed) or any other; left as it was.
        image_size: height and width, pixels; for a model of vectors, their length.
        channels: of an image; 0: the model takes vectors [B, image_size].
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton: 0.7 s

    parameter = next(model.parameters())
    shape = (1, channels, image_size, image_size) if channels else (1, image_size)
    training = model.training
    # attention as matrix products: the counter has no formula for the CPU's fused kernel
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(shape, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class StepImages:
    """Which images a step sends through its networks.

    Attributes:
        method: a name in mpl_scale.mpl.METHODS.
        labelled: B, over all ranks or on one.
        unlabelled: U, likewise.
        student_sees_labelled: mpl_scale.method.student_sees_labelled.
        gradient_feedback: whether the feedback rule takes g_l by a backward pass (cosine, soft_exact, ...).
    """

    method: str
    labelled: int
    unlabelled: int
    student_sees_labelled: bool = True
    gradient_feedback: bool = True

    @staticmethod
    def of(settings: MethodConfig, *, method: str, labelled: int, unlabelled: int) -> StepImages:
        """The images of a phase's method under a run's settings."""
        takes_gradient = settings.feedback.rule not in ("none", *LOSS_RULES)
        return StepImages(method, labelled, unlabelled, settings.student_sees_labelled, takes_gradient)


def step_flops(
    images: StepImages, *, teacher_macs: int, student_macs: int, recompute: bool = False, deferred: bool = False
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
        images: what passes.
        teacher_macs: of a forward on one image.
        student_macs: likewise.
        recompute: count repeated forwards.
        deferred: count the deferred teacher's extra forward.

    Raises:
        ValueError: a method this table does not have.
    """
    method, labelled, unlabelled = images.method, images.labelled, images.unlabelled
    both_views = labelled + 2 * unlabelled
    student_batch = unlabelled + (labelled if images.student_sees_labelled else 0)
    feedback = labelled if images.gradient_feedback else 0
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
