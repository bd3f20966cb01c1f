"""Derivatives of networks along a direction in their weights, forwards and backwards."""

from __future__ import annotations

import zlib

import torch
from torch import nn

from mpl_scale.models import Pass
from mpl_scale.mpl.forward_mode import derivative_of, following


def make_pass(count: int) -> Pass:
    return Pass(seed=1, stream=1, step=torch.tensor(0), rows=torch.arange(count), update_statistics=False)


def directions(module: nn.Module) -> dict[str, torch.Tensor]:
    """Of each parameter, by its name alone: the same on every rank and for every layout."""
    found = {}
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        found[name] = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return found


def forwards(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The derivative of the logits [B, K], by dual numbers."""
    with module.passes(make_pass(len(x))), following(module, directions(module)):
        return derivative_of(module(x))


def assert_forwards_equals_backwards(module: nn.Module, x: torch.Tensor) -> None:
    """<v, J d> by forward mode is <J^T v, d> by a backward pass, for three v."""
    derivative, along = forwards(module, x), directions(module)
    assert derivative.abs().max() > 1e-6
    for seed in range(3):
        v = torch.randn(derivative.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with module.passes(make_pass(len(x))):
            product = (v * module(x)).sum()
        gradients = torch.autograd.grad(product, list(module.parameters()), allow_unused=True)
        pairs = zip(gradients, along.values(), strict=True)
        expected = sum((gradient * d).sum() for gradient, d in pairs if gradient is not None)
        torch.testing.assert_close((v * derivative).sum(), expected, rtol=1e-8, atol=1e-9)  # float64, some layers deep
