"""Every registered model and a few of timm's: keys, dropout, drop-path, and agreement over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig, OptimConfig
from mpl_scale.engine.flat_engine import FlatNetwork
from mpl_scale.mesh import build_mesh
from mpl_scale.models import MODELS, Pass, build_model
from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.layers import convert
from mpl_scale.models.passes import Passes
from tests.support.ranks import pool

TIMM = ["resnet18", "tf_efficientnet_b0", "mobilenetv3_small_050"]
OTHERS = {"two_moons_mlp", "reduced_teacher", "efficientnet_b6_wide"}  # two of vectors, one of 1.3 GB
OWN = {name for name, builder in MODELS.items() if builder.__module__.startswith("mpl_scale.")}  # tests register too
IMAGES = sorted(OWN - OTHERS) + TIMM


def build(name: str, **settings: object) -> nn.Module:
    network = NetworkConfig(name=name, **settings)
    shared = ModelConfig(teacher=network, student=network, num_classes=10, image_size=32)
    return build_model(network, shared, field="mpl_scale.model.student", seed=3)


def one_pass(step: int, rows: torch.Tensor, **more: bool) -> Pass:
    return Pass(seed=1, stream=1, step=torch.tensor(step), rows=rows, **more)


@pytest.mark.parametrize("name", IMAGES)
def test_every_model_trains_and_keeps_its_keys(name: str) -> None:
    model = build(name, dropout=0.3)
    if name in TIMM:
        import timm

        assert set(model.state_dict()) == set(timm.create_model(name, num_classes=10).state_dict())
    with model.passes(one_pass(0, torch.arange(4))):
        logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    norms = [layer for layer in model.modules() if isinstance(layer, BatchNorm)]
    assert norms
    assert all(layer.momentum == pytest.approx(0.01) and layer.eps == 1e-3 for layer in norms)


@pytest.mark.parametrize("name", IMAGES)
def test_seeds_decide_the_weights(name: str) -> None:
    first, second = build(name).state_dict(), build(name).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_parameter_counts() -> None:
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(build("wide_resnet28_2")) == 1_472_170
    assert count(build("wide_resnet28_2", kwargs={"stem": 16})) == 1_467_610
    assert count(build("two_moons_mlp")) == 2 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10


def test_two_moons_mlp_starts_uniform() -> None:
    model = build("two_moons_mlp", init="uniform", init_range=0.1)
    values = torch.cat([p.flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.1
    assert values.abs().max() > 0.08
    assert model(torch.randn(5, 2)).shape == (5, 10)


@pytest.mark.parametrize(
    ("name", "settings"), [("digits_cnn", {"dropout": 0.5}), ("tf_efficientnet_b0", {"drop_path": 0.5})]
)
def test_dropout_is_a_function_of_step_and_global_row(name: str, settings: dict[str, float]) -> None:
    model, x = build(name, **settings), torch.randn(8, 3, 32, 32)
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.eval()  # batch statistics would couple the rows

    def run(step: int, rows: torch.Tensor, images: torch.Tensor, **more: bool) -> torch.Tensor:
        with model.passes(one_pass(step, rows, **more)), torch.no_grad():
            return model(images)

    rows = torch.arange(8)
    whole = run(0, rows, x)
    halves = torch.cat([run(0, rows[:4], x[:4]), run(0, rows[4:], x[4:])])
    torch.testing.assert_close(halves, whole)
    assert not torch.allclose(run(1, rows, x), whole)
    plain = model.eval()(x)
    model.train()
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.eval()
    torch.testing.assert_close(run(0, rows, x, dropout=False), plain)


def test_dropout_needs_a_pass() -> None:
    with pytest.raises(ValueError, match=r"outside `with model\.passes"):
        build("digits_cnn", dropout=0.5)(torch.randn(2, 3, 8, 8))


def test_dropout_drops_at_its_rate() -> None:
    model = build("digits_cnn", dropout=0.25)
    dropout = model.classifier.dropout
    with model.passes(one_pass(5, torch.arange(1000))):
        kept = (dropout(torch.ones(1000, 64)) > 0).double().mean()
    assert abs(kept - 0.75) < 5 * (0.25 * 0.75 / 64000) ** 0.5  # 5 standard deviations


def global_batch_norm(uneven: bool) -> dict[str, torch.Tensor]:
    mesh = build_mesh(device=torch.device("cpu"))
    layer = convert(reference_norm(), passes=Passes(), group=mesh.world_group)
    x, dy = norm_batch()
    cut = [5, 1, 1, 1] if uneven else [2, 2, 2, 2]
    mine = torch.arange(8).split(cut)[mesh.rank]
    part = x[mine].clone().requires_grad_()
    y = layer(part)
    y.backward(dy[mine])
    return {"y": y.detach(), "dx": part.grad, "dw": layer.weight.grad, "db": layer.bias.grad, **layer.state_dict()}


def reference_norm() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(3, momentum=0.1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
        layer.running_mean.copy_(torch.tensor([100.0, 0.0, -3.0]))
    return layer


def norm_batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 4, 5, generator=g, dtype=torch.float64) + torch.tensor([100.0, 0, -3]).view(1, 3, 1, 1)
    return x, torch.randn(8, 3, 4, 5, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("uneven", [False, True])
def test_batch_norm_over_ranks_is_torchs_on_the_whole_batch(uneven: bool) -> None:
    """Uneven: ranks with other numbers of rows, weighed by element count."""
    layer, (x, dy) = reference_norm(), norm_batch()
    x.requires_grad_()
    layer(x).backward(dy)
    parts = pool(4).run(global_batch_norm, uneven)
    torch.testing.assert_close(torch.cat([p["dx"] for p in parts]), x.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(p["dw"] for p in parts), layer.weight.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(p["db"] for p in parts), layer.bias.grad, rtol=1e-10, atol=1e-12)
    for part in parts:
        torch.testing.assert_close(part["running_mean"], layer.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part["running_var"], layer.running_var, rtol=1e-10, atol=1e-12)
        assert part["num_batches_tracked"] == 1


def bf16_steps() -> tuple[bool, bool, float]:
    """Weights are the rounded master, statistics stay fp32, and training follows fp32's."""
    mesh = build_mesh(device=torch.device("cpu"))
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build("digits_cnn")
        model = convert_over(model, mesh)
        network = FlatNetwork(model, optim=OptimConfig(lr=0.1), mesh=mesh, dtype=dtype)
        g = torch.Generator().manual_seed(mesh.rank)
        x, y = torch.randn(16, 3, 8, 8, generator=g), torch.randint(0, 10, (16,), generator=g)
        losses[dtype] = []
        for _ in range(20):
            loss = nn.functional.cross_entropy(network.forward(x), y)
            network.accumulate(loss)
            network.reduce()
            network.apply(torch.tensor(0.1))
            losses[dtype].append(loss.item())
    piece = network.layout[0]
    weight = dict(model.named_parameters())[piece.name].flatten()[piece.start : piece.start + piece.length]
    master = network.master[piece.shard][piece.offset : piece.offset + piece.length]
    rounded = torch.equal(weight, master.to(torch.bfloat16)) and not torch.equal(master, weight.float())
    fp32_statistics = all(b.dtype != torch.bfloat16 for b in model.buffers())
    return rounded, fp32_statistics, max(abs(a - b) for a, b in zip(*losses.values(), strict=True))


def convert_over(model: nn.Module, mesh: object) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.group = mesh.world_group
    return model


def test_bf16_keeps_an_fp32_master_and_fp32_statistics() -> None:
    for rounded, fp32_statistics, difference in pool(2).run(bf16_steps):
        assert rounded
        assert fp32_statistics
        assert difference < 0.1  # bf16 rounds to 2**-8; the loss falls from 2.4 to below 1 on the way
