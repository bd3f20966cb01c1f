"""Compiled functions meet many networks and phases in one process: one variant for all, and nothing falls back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from mpl_scale.config.schema import ModelConfig, NetworkConfig, OptimConfig
from mpl_scale.engine import build_network
from mpl_scale.mesh import build_mesh
from mpl_scale.models import Pass, build_model
from mpl_scale.models.kernels import loops
from mpl_scale.mpl import Network
from mpl_scale.optim import optimizers

OPTIMS = [
    OptimConfig(name="sgd", lr=0.05, weight_decay=1e-3),
    OptimConfig(name="rmsprop", lr=0.01, weight_decay=1e-3),
    OptimConfig(name="rmsprop", lr=0.02, weight_decay=0.0, rho=0.8),
    OptimConfig(name="adamw", lr=0.01, weight_decay=0.1),
]


@pytest.fixture
def counted() -> Iterator[None]:
    """The compiler starts anew; reaching its bound on variants is an error."""
    torch._dynamo.reset()
    loops.cache_clear()
    optimizers._loop.cache_clear()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    assert not counters["graph_break"]


def network(optim: OptimConfig, widths: tuple[int, ...], *, kernels: str, seed: int) -> Network:
    section = NetworkConfig(name="digits_cnn", kwargs={"widths": widths})
    shared = ModelConfig(teacher=section, student=section, num_classes=10, image_size=8)
    module = build_model(section, shared, field="m", seed=seed, kernels=kernels).double()  # type: ignore[arg-type]
    mesh = build_mesh(device=torch.device("cpu"))
    return build_network(module, engine="flat", optim=optim, ds_config={}, mesh=mesh, kernels=kernels)  # type: ignore[arg-type]


def trained(net: Network, batch: int) -> list[torch.Tensor]:
    """The shards and the optimiser's state after two updates, each at a rate of its own."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    for step, lr in enumerate((0.05, 0.1)):
        context = Pass(seed=0, stream=0, step=torch.tensor(step), rows=torch.arange(batch))
        net.accumulate(F.cross_entropy(net.forward(x, context), torch.arange(batch) % 10))
        net.reduce()
        net.apply(torch.tensor(lr))
    return [
        *net.master,
        *(value for state in net.optimizer_state.values() for value in state),
        *net.optimizer_counters.values(),
    ]


def test_networks_and_phases_share_their_compiled_functions(counted: None) -> None:
    """Four optimisers, networks of four sizes, batches of two: as many variants as functions were needed.

    float64: fused multiply-adds and another order of sums, 1e-16 each, through two updates.
    """
    sizes = [(12, 20), (24, 28, 20), (20, 10, 28), (12, 40)]
    found = []
    for phase, batch in enumerate((6, 9)):
        for index, optim in enumerate(OPTIMS):
            widths = sizes[(phase + index) % len(sizes)]
            own, plain = (
                trained(network(optim, widths, kernels=kernels, seed=index), batch) for kernels in ("compiled", "eager")
            )
            torch.testing.assert_close(own, plain, rtol=1e-10, atol=1e-12)
        found.append(counters["stats"]["unique_graphs"])
    updates = 7  # three optimisers with and without weight decay, one without alone
    normalisation = 4  # forward, of the first layer of a flat buffer (offset 0) and of the others; learn; backward
    assert found == [updates + normalisation] * 2
