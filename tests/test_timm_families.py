"""A small member of each timm family with attention, and others: training, masks, recomputation, plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpl_scale.config import load_config
from mpl_scale.config.schema import ModelConfig, NetworkConfig, OptimConfig
from mpl_scale.engine.flat_engine import FlatNetwork
from mpl_scale.engine.recompute import apply_recompute, find_stages
from mpl_scale.mesh import build_mesh
from mpl_scale.models import Pass, build_model
from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.buffers import stateful_buffers
from mpl_scale.models.layers import Dropout
from mpl_scale.optim import parameter_groups
from mpl_scale.trainer.preflight import check_models
from tests.support.configs import tiny, write
from tests.support.derivatives import assert_forwards_equals_backwards
from tests.support.masks import give_mask

CLASSES = 10


@dataclass(frozen=True)
class Family:
    """A model made small. drops: arguments that switch on the dropout inside its attention."""

    name: str
    size: int = 32
    kwargs: dict[str, Any] = field(default_factory=dict)
    drops: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


INSIDE = {"attn_drop_rate": 0.2, "proj_drop_rate": 0.2}
VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "depths": (2, 1), "num_heads": (2, 4), "embed_dim": 16}
MAXXVIT = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32), "stem_width": 16, "transformer_dim_head": 16}
IN_MAXXVIT = {"transformer_attn_drop": 0.2, "transformer_proj_drop": 0.2}
FAMILIES = [
    Family("vit_tiny_patch16_224", kwargs={**VIT, "patch_size": 8}, drops=INSIDE),
    Family("vit_relpos_small_patch16_224", kwargs={**VIT, "patch_size": 8}, drops=INSIDE),
    Family("deit_tiny_patch16_224", kwargs=VIT, drops=INSIDE),
    Family("deit_tiny_distilled_patch16_224", kwargs=VIT, drops=INSIDE),
    Family("beit_base_patch16_224", kwargs=VIT, drops=INSIDE),
    Family("eva02_tiny_patch14_224", 28, {**VIT, "img_size": 28}, INSIDE),
    Family("cait_xxs24_224", kwargs=VIT, drops=INSIDE),
    Family("xcit_nano_12_p16_224", kwargs=VIT, drops=INSIDE),
    Family("swin_tiny_patch4_window7_224", kwargs=SWIN, drops=INSIDE),
    Family("swinv2_tiny_window8_256", kwargs=SWIN, drops=INSIDE),
    Family("swinv2_cr_tiny_ns_224", kwargs={**SWIN, "window_size": (4, 4)}, drops=INSIDE),
    Family("coatnet_nano_rw_224", 64, {**MAXXVIT, "img_size": 64}, IN_MAXXVIT),
    Family("maxvit_nano_rw_256", 64, {**MAXXVIT, "img_size": 64}, IN_MAXXVIT),
    Family("maxvit_rmlp_pico_rw_256", 64, {**MAXXVIT, "img_size": 64}, IN_MAXXVIT),
    Family("mobilevit_xxs", 64),
    Family("pvt_v2_b0", kwargs={"depths": (1, 1, 1, 1)}, drops=INSIDE),
    Family("convnext_atto", kwargs={"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    Family("ghostnet_100"),  # calls F.dropout by default
]
NAMED = {family.name: family for family in FAMILIES}
EQUAL = ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "coatnet_nano_rw_224"]
STEPPED = pytest.mark.parametrize("family", [NAMED[name] for name in EQUAL], ids=str)
EVERY = pytest.mark.parametrize("family", FAMILIES, ids=str)


def build(family: Family, *, drops: bool = True, drop_path: float = 0.2) -> nn.Module:
    kwargs = {**family.kwargs, **(family.drops if drops else {})}
    network = NetworkConfig(name=family.name, kwargs=kwargs, drop_path=drop_path if family.drops else 0.0)
    shared = ModelConfig(teacher=network, student=network, num_classes=CLASSES, image_size=family.size)
    return build_model(network, shared, field="model", seed=3)


def images(family: Family, count: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, family.size, family.size, generator=generator, dtype=dtype)


def run(model: nn.Module, x: torch.Tensor, *, step: int = 0, rows: torch.Tensor | None = None, **more: bool) -> Any:
    rows = torch.arange(len(x)) if rows is None else rows
    with model.passes(Pass(seed=1, stream=1, step=torch.tensor(step), rows=rows, **more)):
        return model(x)


@EVERY
def test_a_family_trains_and_keeps_its_keys(family: Family) -> None:
    import timm

    model = build(family)
    plain = timm.create_model(family.name, num_classes=CLASSES, **family.kwargs)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} | set(stateful_buffers(model))
    logits = run(model, images(family, dtype=torch.float32))
    assert logits.shape == (4, CLASSES)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@EVERY
def test_masks_are_a_function_of_step_and_global_row_inside_attention_too(family: Family) -> None:
    model, x = build(family).double(), images(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)  # some blocks start as the identity
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.eval()  # batch statistics would couple the rows
    drops = any(isinstance(layer, Dropout) and layer.p > 0 for layer in model.modules())
    with torch.no_grad():
        whole, rows = run(model, x), torch.arange(4)
        parts = [run(model, x[cut], rows=rows[cut]) for cut in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-12)
        assert torch.allclose(run(model, x, step=1), whole) is not drops
        off = run(model, x, dropout=False)
        torch.testing.assert_close(off, model.eval()(x), rtol=1e-9, atol=1e-12)


@EVERY
def test_forward_mode_is_the_derivative(family: Family) -> None:
    assert_forwards_equals_backwards(build(family).double().train(), images(family, 3))


@EVERY
def test_recomputation_is_exact(family: Family) -> None:
    found = []
    for policy in ("none", "block"):
        model = apply_recompute(build(family).double(), policy)
        y = run(model, images(family))
        y.square().mean().backward()
        found.append(
            {"y": y.detach(), **{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())}
        )
        assert find_stages(model)
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@STEPPED
@pytest.mark.parametrize("drops", [False, True], ids=["fused", "dropout"])
def test_student_steps_equal_plain_pytorch(family: Family, drops: bool) -> None:
    """Three of SGD, timm's own module in float64. With dropout it runs unfused, and its dropout is given our masks."""
    import timm

    ours = build(family, drop_path=0.0, drops=drops).double()
    kwargs = {**family.kwargs, **(family.drops if drops else {}), "drop_path_rate": 0.0}
    plain = timm.create_model(family.name, num_classes=CLASSES, **kwargs).double()
    plain.load_state_dict(ours.state_dict())
    for layer in plain.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eps, layer.momentum = 1e-3, 0.01
        if drops and hasattr(layer, "fused_attn"):
            layer.fused_attn = False  # type: ignore[assignment]
    optim = OptimConfig(lr=0.125, momentum=0.9, weight_decay=0.01)  # exact in float32
    reference = torch.optim.SGD(parameter_groups(plain, optim), lr=0.125, momentum=0.9, nesterov=True)
    network = FlatNetwork(ours, optim=optim, mesh=build_mesh(device=torch.device("cpu")))
    masks = {layer.site: name for name, layer in ours.named_modules() if isinstance(layer, Dropout)}
    x, y = images(family), torch.arange(4)
    for step in range(3):
        now = Pass(seed=1, stream=1, step=torch.tensor(step), rows=torch.arange(4))
        network.accumulate(F.cross_entropy(network.forward(x, now), y))
        network.reduce()
        network.apply(torch.tensor(0.125))
        for site, name in masks.items():
            give_mask(plain.get_submodule(name), site, seed=1, stream=1, step=step, rows=now.rows)
        reference.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        reference.step()
    expected = plain.state_dict()
    for name, value in ours.state_dict().items():  # float64: some thousand roundings of 1e-16 a step
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.drops], ids=str)
def test_bf16_weights_train_too(family: Family) -> None:
    """A step with bf16 weights is near fp32's: the logits of a fresh network are within bf16's 8 bits of each other."""
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        network = FlatNetwork(
            build(family), optim=OptimConfig(lr=0.1), mesh=build_mesh(device=torch.device("cpu")), dtype=dtype
        )
        now = Pass(seed=1, stream=1, step=torch.tensor(0), rows=torch.arange(4))
        y = network.forward(images(family, dtype=torch.float32), now)
        network.accumulate(y.square().mean())
        network.reduce()
        network.apply(torch.tensor(0.1))
        logits.append(y.detach())
    assert (logits[0] - logits[1]).norm() < 0.1 * logits[0].norm()


def test_what_cannot_train_is_refused_by_name(tmp_path: Path) -> None:
    def check(**student: Any) -> None:
        raw = tiny()
        raw["mpl_scale"]["model"]["student"] = student
        raw["mpl_scale"]["model"]["image_size"] = 32
        check_models(load_config(write(tmp_path, raw)))

    with pytest.raises(ValueError, match=r"student.name = vit_tiny_patch16_224 cannot take images .* = 32: .*224"):
        check(name="vit_tiny_patch16_224")
    check(name="vit_tiny_patch16_224", kwargs={**VIT, "attn_drop_rate": 0.1})
    with pytest.raises(ValueError, match=r"student.name = vit_tiny.* cannot be trained here: it draws .*aten::randn"):
        check(name="vit_tiny_patch16_224", kwargs={**VIT, "patch_drop_rate": 0.5})
    with pytest.raises(ValueError, match=r"student.dropout = 0.1: VisionTransformerDistilled has no single classifier"):
        check(name="deit_tiny_distilled_patch16_224", kwargs=VIT, dropout=0.1)
