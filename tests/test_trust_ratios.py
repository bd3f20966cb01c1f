"""LARS, LAMB and Muon over shards equal themselves on whole parameters: every engine and ZeRO stage, 1 and 2 ranks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lamb
from torch import nn

from mpl_scale.checkpoint.gather import gather_parameters
from mpl_scale.config.schema import OptimConfig
from mpl_scale.engine import build_network
from mpl_scale.mesh import build_mesh
from mpl_scale.models.passes import Passes
from mpl_scale.optim import build_optimizer, parameter_groups
from mpl_scale.types import Slice
from tests.support.deepspeed_cases import Net
from tests.support.ranks import pool

LRS = (0.5, 1.0, 0.25, 2.0)
# A large trust coefficient and decay, so that a wrong norm moves the weights by far more than the tolerance.
LARS_OPTIM = OptimConfig(name="lars", lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.3, trust=0.05)
LAMB_OPTIM = OptimConfig(name="lamb", lr=0.1, betas=(0.8, 0.95), adam_eps=1e-6, weight_decay=0.3)
MUON_OPTIM = OptimConfig(name="muon", lr=0.05, momentum=0.8, betas=(0.8, 0.95), adam_eps=1e-3, weight_decay=0.3)
OPTIMS = {optim.name: optim for optim in (LARS_OPTIM, LAMB_OPTIM, MUON_OPTIM)}


def make_net() -> nn.Module:
    net = Net(width=5, seed=1)
    nn.init.zeros_(net.head.weight)  # no norm: trust 1
    return net


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)) for _ in LRS]


@functools.cache
def plain(name: str) -> dict[str, torch.Tensor]:
    net = make_net()
    {"lars": plain_lars, "lamb": plain_lamb, "muon": plain_muon}[name](net)
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def plain_lamb(net: nn.Module) -> None:
    """timm's, one process."""
    optimizer = Lamb(parameter_groups(net, LAMB_OPTIM), betas=(0.8, 0.95), eps=1e-6, max_grad_norm=None)
    for (x, y), lr in zip(batches(), LRS, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * LAMB_OPTIM.lr
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def plain_muon(net: nn.Module) -> None:
    """torch's, on flattened matrices, and its AdamW on the first layer and the vectors."""
    matrices = {p: nn.Parameter(p.detach().flatten(1)) for p in (net.conv.weight, net.head.weight)}  # the same storage
    settings = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon(list(matrices.values()), **settings)  # type: ignore[arg-type]
    vectors = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": [net.stem.weight], "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-3)
    for (x, y), lr in zip(batches(), LRS, strict=True):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for parameter, matrix in matrices.items():
            matrix.grad = parameter.grad.flatten(1)
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = lr * MUON_OPTIM.lr
            optimizer.step()


def plain_lars(net: nn.Module) -> None:
    """You et al.'s rule with Nesterov momentum, one parameter after the other."""
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for (x, y), lr in zip(batches(), LRS, strict=True):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for name, p in net.named_parameters():
            g, decay, trust = p.grad, 0.0, 1.0
            assert g is not None
            if p.ndim > 1:
                decay = LARS_OPTIM.weight_decay
                if p.norm() > 0 and g.norm() > 0:
                    trust = LARS_OPTIM.trust * p.norm() / (g.norm() + decay * p.norm())
            with torch.no_grad():
                scaled = trust * (g + decay * p)
                velocity[name] = 0.9 * velocity[name] + scaled
                p -= lr * (scaled + 0.9 * velocity[name])


def train(name: str, engine: str, ds_config: dict[str, Any], shard_size: int | None) -> dict[str, torch.Tensor]:
    mesh = build_mesh(device=torch.device("cpu"), shard_size=shard_size)
    net = make_net()
    net.passes = Passes()  # type: ignore[assignment]
    optim = OPTIMS[name]
    network = build_network(
        net, engine=engine, optim=optim, ds_config={**ds_config, "gradient_clipping": 0.0}, mesh=mesh
    )
    for (x, y), lr in zip(batches(), LRS, strict=True):
        rows = torch.arange(len(x)).chunk(mesh.data)[mesh.data_index]
        network.accumulate(F.cross_entropy(network.forward(x[rows]), y[rows]))
        network.reduce()
        network.apply(torch.tensor(lr * optim.lr))
    return gather_parameters(network.layout, network.master, group=mesh.world_group, owns=network.owns_shard)


def assert_plain(name: str, results: list[dict[str, torch.Tensor]]) -> None:
    for result in results:
        assert set(result) == set(plain(name))
        for parameter, value in plain(name).items():
            # float32: 4 steps whose norms and gradients are summed in another order; Muon rounds them to bf16, so that
            # an entry of its direction may be another by 2^-8, times the rate
            rtol, atol = (0, 2e-3) if name == "muon" else (2e-5, 2e-6)
            torch.testing.assert_close(result[parameter].view_as(value), value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("shard_size", [None, 1])
def test_flat_engine(world: int, shard_size: int | None, name: str) -> None:
    args = (name, "flat", {}, shard_size)
    assert_plain(name, [train(*args)] if world == 1 else pool(world).run(train, *args))


@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_engine(stage: int, name: str) -> None:
    zero = {"stage": stage, "reduce_bucket_size": 200, "stage3_param_persistence_threshold": 0}
    assert_plain(name, pool(2).run(train, name, "deepspeed", {"zero_optimization": zero}, None))


def test_norms_matter_here() -> None:
    """The tolerance above tells shards' own norms from the parameters': these differ by more."""
    weight = plain("lars")["conv.weight"]
    halves = [half.norm() for half in weight.flatten().chunk(2)]
    assert all(abs(half / weight.norm() - 1) > 0.1 for half in halves)


@pytest.mark.parametrize("name", OPTIMS)
def test_an_unbound_step_only_allocates(name: str) -> None:
    net = make_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = build_optimizer(parameter_groups(net, OPTIMS[name]), OPTIMS[name])
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    layout = [Slice(n, tuple(p.shape), 0, p.numel(), i, 0) for i, (n, p) in enumerate(net.named_parameters())]
    optimizer.bind(list(net.parameters()), layout, group=None)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters() if p.grad.abs().sum() > 0)
