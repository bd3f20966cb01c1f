"""Multiply-accumulates and bytes kept for backward, by shapes: against published figures and autograd's own count."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from mpl_scale.config.schema import FeedbackConfig, MethodConfig, ModelConfig, NetworkConfig
from mpl_scale.engine.recompute import apply_recompute
from mpl_scale.models import MODELS, build_model
from mpl_scale.planner import StepImages, count_macs, kept_bytes, step_flops, to_compute_dtype


def build(name: str, size: int, *, classes: int = 1000, drop_path: float = 0.0) -> nn.Module:
    network = NetworkConfig(name=name, drop_path=drop_path)
    shared = ModelConfig(teacher=network, student=network, num_classes=classes, image_size=size)
    return build_model(network, shared, field="model", seed=0, device="meta")


# DESIGN 8; ResNet-50: 4.09 GMAC is torchvision's figure.
FIGURES = [("tf_efficientnet_l2", 512, 194.9), ("tf_efficientnet_b7", 600, 37.75), ("resnet50", 224, 4.09)]
FIGURES += [("efficientnet_b6_wide", 512, 132.0)] if "efficientnet_b6_wide" in MODELS else []


@pytest.mark.parametrize(("name", "size", "giga"), FIGURES)
def test_macs_are_the_published_ones(name: str, size: int, giga: float) -> None:
    """To the digits printed."""
    assert count_macs(build(name, size), size) / 1e9 == pytest.approx(giga, abs=0.06 if giga > 100 else 0.006)


def test_macs_of_groups_strides_and_linear_layers_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Flatten(),
        nn.Linear(128, 7),
    )
    assert count_macs(model, 8) == 16 * 8 * 27 + 16 * 8 * 25 + 128 * 7
    assert not any(layer._forward_hooks for layer in model)


def vit_macs(size: int, patch: int, dim: int, depth: int, classes: int) -> int:
    """A block of N tokens: 3 N d^2 for q, k, v, N d^2 behind them, 8 N d^2 in the MLP, 2 N^2 d in attention."""
    patches = (size // patch) ** 2
    tokens = patches + 1
    block = 12 * tokens * dim**2 + 2 * tokens**2 * dim
    return patches * 3 * patch**2 * dim + depth * block + dim * classes


def swin_macs(size: int, window: int, dim: int, depths: tuple[int, ...], classes: int) -> int:
    """As `vit_macs`, but tokens see the window^2 of their own; 4 neighbours of d are merged to one of 2 d."""
    tokens = (size // 4) ** 2
    total = tokens * 3 * 4**2 * dim
    for stage, depth in enumerate(depths):
        if stage:
            tokens, dim = tokens // 4, 2 * dim
            total += tokens * 2 * dim * dim
        total += depth * (12 * tokens * dim**2 + 2 * tokens * window**2 * dim)
    return total + dim * classes


def test_macs_of_attention_by_hand() -> None:
    """ViT-B/16 and Swin-T at 224: 17.6 and 4.5 GMACs in their papers and timm's tables."""
    vit, swin = vit_macs(224, 16, 768, 12, 1000), swin_macs(224, 7, 96, (2, 2, 6, 2), 1000)
    assert (vit, swin) == (17_563_828_224, 4_490_566_656)
    assert count_macs(build("vit_base_patch16_224", 224), 224) == vit
    assert count_macs(build("swin_tiny_patch4_window7_224", 224), 224) == swin
    tiny = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)  # a CPU's fused kernel has no formula
    assert count_macs(tiny, 32) == vit_macs(32, 16, 192, 1, 1000)


def test_flops_of_a_step_are_its_passes() -> None:
    """B = 2, U = 6; teacher 10, student 1 MAC an image; 2 FLOPs a MAC, three forwards' worth forward and backward."""

    def flops(method: str, *, recompute: bool = False, deferred: bool = False, **images: bool) -> int:
        return step_flops(
            StepImages(method, 2, 6, **images), teacher_macs=10, student_macs=1, recompute=recompute, deferred=deferred
        )

    teacher, update, feedback = 14 * 10, 8, 2
    assert flops("mpl") == 2 * 3 * (teacher + update + feedback)
    assert flops("mpl", student_sees_labelled=False) == 2 * 3 * (teacher + 6 + feedback)
    assert flops("mpl", gradient_feedback=False) == 2 * 3 * (teacher + update)
    assert flops("mpl", recompute=True) == 2 * 4 * (teacher + update + feedback)
    assert flops("mpl", deferred=True) == 2 * (3 * (teacher + update + feedback) + teacher)
    assert flops("supervised") == 2 * 3 * 2
    assert flops("uda") == flops("fixmatch") == 2 * 3 * 14
    assert flops("pseudo_label") == 2 * (6 * 10 + 3 * 8)
    with pytest.raises(ValueError, match="no row"):
        flops("other")


@pytest.mark.parametrize(
    ("rule", "takes"), [("cosine", True), ("soft_exact", True), ("none", False), ("loss_difference", False)]
)
def test_which_rules_take_a_gradient(rule: str, takes: bool) -> None:
    settings = MethodConfig(feedback=FeedbackConfig(rule=rule), student_sees_labelled=False)
    images = StepImages.of(settings, method="mpl", labelled=2, unlabelled=6)
    assert images == StepImages("mpl", 2, 6, student_sees_labelled=False, gradient_feedback=takes)


def hooked_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """What autograd's own hooks see, each storage once."""
    before = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), images)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in before:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(images).sum()
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "resnet18", "wide_resnet28_2"])
def test_without_checkpointing_the_census_is_what_autograd_keeps(name: str) -> None:
    """On real memory; 1%: the census also sees the few small tensors that layers, not autograd, hold on to."""
    network = NetworkConfig(name=name)
    shared = ModelConfig(teacher=network, student=network, num_classes=10, image_size=64)
    model = build_model(network, shared, field="model", seed=0)
    images = torch.randn(4, 3, 64, 64)
    assert kept_bytes(model, images) == pytest.approx(hooked_bytes(model, images), rel=0.01)


def test_a_selective_checkpoints_cache_is_counted() -> None:
    """At least every dense convolution's output within blocks, which saved-tensor hooks do not see."""
    model = apply_recompute(build("tf_efficientnet_b0", 64), "bn_act")
    images = torch.empty(4, 3, 64, 64, device="meta")
    outputs = [0]

    def add(_: nn.Module, __: object, y: torch.Tensor) -> None:
        outputs[0] += y.numel() * y.element_size()

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    model(images)
    for hook in hooks:
        hook.remove()
    assert hooked_bytes(model, images) < outputs[0] <= kept_bytes(model, images)


def test_meta_and_real_memory_agree() -> None:
    """bf16 as the engines run it: buffers fp32."""
    found = []
    for device in ("meta", "cpu"):
        network = NetworkConfig(name="tf_efficientnet_b0")
        shared = ModelConfig(teacher=network, student=network, num_classes=10, image_size=64)
        model = apply_recompute(build_model(network, shared, field="m", seed=0, device=device), "bn_act")
        images = torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16, device=device)
        found.append(kept_bytes(to_compute_dtype(model, torch.bfloat16), images))
    assert found[0] == pytest.approx(found[1], rel=0.01)  # the CPU's kernels may pad or copy a small tensor


@pytest.mark.full
def test_l2_keeps_a_third_without_activations_and_a_twentieth_per_block() -> None:
    """EfficientNet-L2 at 512 pixels, bf16, against timm's own network: one rank, plain kernels."""
    images = torch.empty(2, 3, 512, 512, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        plain = timm.create_model("tf_efficientnet_l2", num_classes=1000, drop_path_rate=0.2)
    eager = kept_bytes(plain.train().to(torch.bfloat16), images)

    def kept(policy: str) -> int:
        model = apply_recompute(build("tf_efficientnet_l2", 512, drop_path=0.2), policy)  # type: ignore[arg-type]
        return kept_bytes(to_compute_dtype(model, torch.bfloat16), images)

    assert kept("bn_act") <= eager / 3
    assert kept("block") <= eager / 20
