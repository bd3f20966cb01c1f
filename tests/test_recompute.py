"""Recomputation changes nothing but memory: outputs, gradients and batch norm's buffers are bitwise those without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.engine.recompute import apply_recompute, find_stages
from mpl_scale.models import Pass, build_model
from tests.support.ranks import pool
from tests.support.tiers import full

MODELS = [
    ("digits_cnn", {"dropout": 0.2}),
    ("wide_resnet28_2", {"dropout": 0.2}),
    ("tf_efficientnet_b0", {"dropout": 0.2, "drop_path": 0.2}),
    ("resnet18", {"drop_path": 0.2}),
]


def build(name: str, group: object = None, **settings: object) -> nn.Module:
    network = NetworkConfig(name=name, **settings)
    shared = ModelConfig(teacher=network, student=network, num_classes=10, image_size=32)
    return build_model(network, shared, field="model", seed=3, group=group)


def two_passes(model: nn.Module, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two forwards in flight, then both backwards: outputs, gradients, buffers."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 3, 32, 32, generator=g)[:, rows]
    outputs = []
    for step in range(2):
        with model.passes(Pass(seed=1, stream=step, step=torch.tensor(step), rows=rows)):
            outputs.append(model(x[step]))
    sum(y.square().mean() for y in outputs).backward()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {"y0": outputs[0].detach(), "y1": outputs[1].detach(), **gradients, **dict(model.named_buffers())}


def assert_bitwise(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("name", "settings", "policy"),
    [
        *((*MODELS[0], policy) for policy in ("bn_act", "block")),
        *((*MODELS[1], "bn_act"), full(*MODELS[1], "block")),
        *(full(*MODELS[2], "bn_act"), (*MODELS[2], "block")),
        *((*MODELS[3], policy) for policy in ("bn_act", "block")),
    ],
)
def test_recomputation_is_exact(name: str, settings: dict[str, float], policy: str) -> None:
    plain, recomputed = build(name, **settings), apply_recompute(build(name, **settings), policy)
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(recomputed)
    rows = torch.arange(8)
    expected = two_passes(plain, rows)
    assert_bitwise(two_passes(recomputed, rows), expected)
    assert expected["y0"].std() > 0
    with torch.no_grad():
        for parameter in recomputed.parameters():
            parameter.zero_()
    assert_bitwise(two_passes(copied, rows), expected)  # a deepcopy runs its own weights


@pytest.mark.parametrize(
    ("name", "settings", "offload"),
    [full(*MODELS[1], False), (*MODELS[1], True), (*MODELS[2], False), full(*MODELS[2], True)],
)
def test_fairscales_backend_is_exact(name: str, settings: dict[str, float], offload: bool) -> None:
    recomputed = apply_recompute(build(name, **settings), "block", backend="fairscale", offload=offload)
    copied, rows = copy.deepcopy(recomputed), torch.arange(8)
    expected = two_passes(build(name, **settings), rows)
    assert list(recomputed.state_dict()) == list(build(name, **settings).state_dict())
    assert_bitwise(two_passes(recomputed, rows), expected)
    with torch.no_grad():
        for parameter in recomputed.parameters():
            parameter.zero_()
    assert_bitwise(two_passes(copied, rows), expected)


def test_a_policy_for_each_stage() -> None:
    """EfficientNet-B0 has seven; the result is the plain one, the memory in between."""
    mixed = ["block", "none", "bn_act", "none", "block", "block", "none"]
    assert list(find_stages(build("tf_efficientnet_b0"))) == [f"blocks.{stage}" for stage in range(7)]
    rows = torch.arange(8)
    recomputed = apply_recompute(build("tf_efficientnet_b0", drop_path=0.2), mixed)
    assert_bitwise(two_passes(recomputed, rows), two_passes(build("tf_efficientnet_b0", drop_path=0.2), rows))
    kept = [kept_bytes(apply_recompute(build("tf_efficientnet_b0"), policy)) for policy in ("block", mixed, "none")]
    assert kept == sorted(set(kept))
    with pytest.raises(ValueError, match=r"EfficientNet has 7 stages \(blocks.0, .*one policy"):
        apply_recompute(build("tf_efficientnet_b0"), ["block", "none"])


def test_what_a_backend_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="fairscale recomputes whole blocks; use block"):
        apply_recompute(build("digits_cnn"), "bn_act", backend="fairscale")
    with pytest.raises(ValueError, match="recompute_offload = true needs recompute_backend = fairscale"):
        apply_recompute(build("digits_cnn"), "block", offload=True)


def kept_bytes(model: nn.Module) -> int:
    """Bytes that autograd keeps between forward and backward, parameters aside; each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(torch.randn(4, 3, 64, 64))
    del y
    return sum(kept.values())


def test_a_block_keeps_only_its_input() -> None:
    """Hooks see the tensors that checkpointing itself keeps, which are the blocks' inputs."""
    plain, block = (kept_bytes(apply_recompute(build("tf_efficientnet_b0"), p)) for p in ("none", "block"))
    assert block < plain / 5


def over_ranks(policy: str) -> bool:
    import torch.distributed as dist

    rows = torch.arange(8).chunk(dist.get_world_size())[dist.get_rank()]
    results = [
        two_passes(apply_recompute(build("wide_resnet28_2", dist.group.WORLD, dropout=0.2), p), rows)
        for p in ("none", policy)
    ]
    assert_bitwise(results[1], results[0])
    return True


@pytest.mark.parametrize("policy", ["bn_act", full("block")])
def test_recomputation_repeats_the_collectives_of_batch_norm(policy: str) -> None:
    assert pool(2).run(over_ranks, policy) == [True, True]


def test_a_model_without_blocks_is_refused() -> None:
    network = NetworkConfig(name="two_moons_mlp")
    shared = ModelConfig(teacher=network, student=network, num_classes=2, image_size=2)
    with pytest.raises(ValueError, match=r"recompute = block: Sequential has no blocks"):
        apply_recompute(nn.Sequential(nn.Conv2d(3, 4, 3)), "block")
    vectors = build_model(network, shared, field="model", seed=0)
    classes = [type(layer) for layer in vectors.modules()]
    assert [type(layer) for layer in apply_recompute(vectors, "block").modules()] == classes  # nothing to recompute
