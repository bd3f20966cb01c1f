"""Batch norm's loops: compiled equals eager equals torch in float64, in every layout, and only the input is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.models import Pass, build_model
from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.kernels import IDENTITY, Activation, activation_of, loops, rows, unrows
from mpl_scale.models.passes import Passes
from tests.support.tiers import full

SILU = Activation("silu")


def tensor(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Channels far from 0, each by its own distance: what cancels in float32 sums of squares."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x += 10 * torch.arange(shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    return x.to(dtype).contiguous(memory_format=layout if len(shape) == 4 else torch.contiguous_format)


def batch_norm(channels: int, kernels: str, act: nn.Module | None, dtype: torch.dtype) -> BatchNorm:
    source = nn.BatchNorm2d(channels, eps=1e-3).to(dtype)
    with torch.no_grad():
        source.weight.copy_(torch.linspace(0.5, 1.5, channels))
        source.bias.copy_(torch.linspace(-1, 1, channels))
    source.act = act
    return BatchNorm(source, passes=Passes(), group=None, kernels=kernels)  # type: ignore[arg-type]


def outcome(norm: BatchNorm, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient, parameter gradients, buffers; in float64."""
    x = x.clone().requires_grad_()
    y = norm(x)
    assert y.stride() == x.stride()
    assert y.dtype == x.dtype
    y.backward(dy)
    assert x.grad is not None
    results = [y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    return [value.detach().double() for value in results if value is not None]


def leaky_relu() -> nn.Module:
    return nn.LeakyReLU(0.2)


@pytest.mark.parametrize(
    ("shape", "layout", "act"),
    [
        ((6, 5, 4, 4), torch.channels_last, nn.SiLU),
        full((6, 5, 4, 4), torch.channels_last, leaky_relu),
        full((6, 5, 4, 4), torch.contiguous_format, nn.SiLU),
        ((6, 5, 4, 4), torch.contiguous_format, leaky_relu),
        full((3, 8, 7, 1), torch.channels_last, nn.SiLU),
        full((3, 8, 7, 1), torch.channels_last, leaky_relu),
        ((9, 4), torch.contiguous_format, nn.SiLU),
        full((9, 4), torch.contiguous_format, leaky_relu),
    ],
)
def test_compiled_loops_are_torchs_batch_norm(shape: tuple[int, ...], layout: torch.memory_format, act: object) -> None:
    """float32 against torch in float64. 2e-5: sums over some hundred terms of size 30, in float32."""
    x, dy = tensor(shape, layout, torch.float32), tensor(shape, torch.contiguous_format, torch.float32, seed=1)
    found = outcome(batch_norm(shape[1], "compiled", act(), torch.float32), x, dy)  # type: ignore[operator]
    plain = batch_norm(shape[1], "eager", act(), torch.float64)  # type: ignore[operator]
    expected = outcome(plain, x.double(), dy.double())
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        scale = theirs.abs().max()
        assert (ours - theirs).abs().max() <= 2e-5 * scale, index


def test_bf16_inputs_with_fp32_statistics() -> None:
    """One rounding to bf16 (2**-8) at the end; the statistics are those of the rounded input, exactly enough."""
    x, dy = (tensor((6, 5, 4, 4), torch.channels_last, torch.bfloat16, seed=seed) for seed in (0, 1))
    found = outcome(batch_norm(5, "compiled", nn.SiLU(), torch.float32), x, dy)
    expected = outcome(batch_norm(5, "eager", nn.SiLU(), torch.float64), x.double(), dy.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 2**-7 * theirs.abs().max()
    torch.testing.assert_close(found[4:], expected[4:], rtol=2e-5, atol=1e-6)  # running statistics


@pytest.mark.parametrize("activation", [IDENTITY, Activation("relu"), Activation("leaky_relu", 0.2), SILU])
def test_activations_and_their_derivatives(activation: Activation) -> None:
    z = torch.linspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
    modules = {"identity": nn.Identity(), "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2), "silu": nn.SiLU()}
    module = modules[activation.name]
    assert activation_of(module) == activation
    y = module(z)
    torch.testing.assert_close(activation.of(z), y)
    dy = torch.linspace(1, 2, 41, dtype=torch.float64)
    (dz,) = torch.autograd.grad(y, z, dy)
    torch.testing.assert_close(activation.gradient(z.detach(), dy), dz)
    assert activation_of(nn.GELU()) is None


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_rows_are_a_view_and_back(layout: torch.memory_format) -> None:
    x = tensor((3, 5, 4, 2), layout, torch.float32)
    view = rows(x)
    assert view.data_ptr() == x.data_ptr()
    assert view.shape[1] == 5
    back = unrows(view.clone(memory_format=torch.preserve_format), x)
    assert back.stride() == x.stride()
    assert torch.equal(back, x)
    expected = x.double().sum((0, 2, 3))
    torch.testing.assert_close(loops("eager").sums(view)[:5], expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def kept(kernels: str) -> int:
    """Bytes that autograd keeps over a batch norm with SiLU."""
    norm, seen = batch_norm(16, kernels, nn.SiLU(), torch.float32), {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        seen[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    x = torch.randn(8, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = norm(x)
    del y
    return sum(seen.values())


def test_compiled_loops_keep_the_input_alone() -> None:
    activations = 8 * 16 * 8 * 8 * 4
    assert activations <= kept("compiled") < 1.05 * activations  # and a few vectors over the channels
    assert kept("eager") >= 2 * activations


@pytest.mark.parametrize("name", ["wide_resnet28_2", full("test_efficientnet")])
def test_a_network_with_compiled_loops_is_the_eager_one(name: str) -> None:
    """float64, channels-last: output and every gradient."""
    section = NetworkConfig(name=name)
    shared = ModelConfig(teacher=section, student=section, num_classes=10, image_size=32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64).contiguous(
        memory_format=torch.channels_last
    )
    found = []
    for kernels in ("eager", "compiled"):
        model = build_model(section, shared, field="m", seed=1, kernels=kernels).double()
        with model.passes(Pass(seed=0, stream=0, step=torch.tensor(0), rows=torch.arange(4))):
            loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
