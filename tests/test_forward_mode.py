"""Forward-mode derivatives: of every layer, split over ranks, compiled, in bf16, and of what has none."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from mpl_scale.config import load_config
from mpl_scale.mesh import build_mesh
from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.kernels import IDENTITY, loops
from mpl_scale.models.registry import register_model
from mpl_scale.mpl.feedback import Directional
from mpl_scale.spatial import input_columns, parallelize
from mpl_scale.trainer.preflight import check_models
from tests.support.configs import tiny, write
from tests.support.derivatives import assert_forwards_equals_backwards, forwards
from tests.support.ranks import pool
from tests.support.spatial_networks import LAYERS, build, layer_network
from tests.support.steps import CPU, Case, make_batches, make_state
from tests.support.tiers import full

SIZE = 40  # and four images: batch norm of fewer values in the last stages is no well-posed problem
NETWORKS = {
    "wide_resnet28_2": {},
    "resnet18": {},
    "tf_efficientnet_b0": {"dropout": 0.2, "drop_path": 0.2},
    "b6_wide_slim": {},
}


def pictures(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str) -> None:
    assert_forwards_equals_backwards(layer_network(name, None).double(), pictures())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_and_its_own_loops(name: str) -> None:
    """Batch norm by torch, and by the loops that are compiled, or run on several ranks."""
    module = build(name, None, **NETWORKS[name]).double().train()
    assert_forwards_equals_backwards(module, pictures())
    by_torch = forwards(module, pictures())
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer._normalise_alone = functools.partial(_by_loops, layer)  # type: ignore[method-assign]
    torch.testing.assert_close(forwards(module, pictures()), by_torch, rtol=1e-9, atol=1e-9)


def _by_loops(layer: BatchNorm, x: torch.Tensor) -> torch.Tensor:
    return layer._normalise(x, loops("eager", IDENTITY, x.dtype))


def split_derivative(name: str, layer: bool, width: int, switch_at: str) -> torch.Tensor:
    """On a rank: of a network split by width; every rank of a group has the whole logits of the group's images."""
    mesh = build_mesh(device=CPU, width=width)
    make = functools.partial(layer_network, name) if layer else functools.partial(build, name, **NETWORKS[name])
    module = parallelize(make(mesh.world_group).double().train(), mesh=mesh, image_size=SIZE, switch_at=switch_at)
    begin, end = input_columns(SIZE, width)[mesh.width_index]
    return forwards(module, pictures(mesh.data * 4).chunk(mesh.data)[mesh.data_index][..., begin:end].contiguous())


@pytest.mark.parametrize(
    ("name", "switch_at"),
    [
        ("wide_resnet28_2", "auto"),
        full("wide_resnet28_2", "never"),
        ("tf_efficientnet_b0", "never"),
        full("tf_efficientnet_b0", "auto"),
    ],
)
def test_a_network_split_by_width(name: str, switch_at: str) -> None:
    module = build(name, None, **NETWORKS[name]).double().train()
    for found in pool(2).run(split_derivative, name, False, 2, switch_at):
        torch.testing.assert_close(found, forwards(module, pictures()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["conv_5/2", "max_pool", "global_avg", "batch_norm_act", "squeeze_excite", "blur_pool"]
)
def test_a_layer_split_by_width(name: str) -> None:
    expected = forwards(layer_network(name, None).double().train(), pictures())
    for found in pool(2).run(split_derivative, name, True, 2, "never"):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_credits_in_bf16_point_where_those_in_fp32_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosine similarity of 0.99 or more; a central difference in bf16 is noise."""
    credits: dict[bool, torch.Tensor] = {}
    credit = Directional.__dict__["after_update"]

    def keep(self, state, batch, update):  # type: ignore[no-untyped-def]
        signal = credit(self, state, batch, update)
        credits[state.teacher._dtype == torch.bfloat16] = signal.credit
        return signal

    monkeypatch.setattr(Directional, "after_update", keep)
    for bf16 in (False, True):
        case = Case(rule="soft_exact", network="wide_resnet28_2", size=32, bf16=bf16)
        mesh = build_mesh(device=CPU)
        step, state = make_state(case, mesh)
        step(state, make_batches(case, mesh, 1)[0])
    similarity = torch.cosine_similarity(credits[False].flatten(), credits[True].flatten(), dim=0)
    assert similarity >= 0.99


class _OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return 2 * x

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return 2 * dy


class OneWay(nn.Module):
    """A user's network with a layer that knows no forward mode."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), Doubling())
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _OneWay.apply(x)


register_model("test_one_way")(lambda num_classes, **_: OneWay(num_classes))


def test_a_layer_without_forward_mode_is_named_and_may_take_a_difference(tmp_path: Path) -> None:
    raw = tiny()
    raw["mpl_scale"]["model"]["student"] = {"name": "test_one_way"}
    raw["mpl_scale"]["method"]["feedback"] = {"rule": "per_sample"}
    config = write(tmp_path, raw)
    with pytest.raises(
        ValueError, match=r"student.name = test_one_way: body\.2 \(Doubling\) has no forward-mode .*differ"
    ):
        check_models(load_config(config))
    check_models(load_config(config, overrides=["mpl_scale.method.feedback.derivative=difference"]))
    check_models(load_config(config, overrides=["mpl_scale.method.feedback.rule=cosine"]))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_auto_means(tmp_path: Path, stage: int) -> None:
    from mpl_scale.resolve import resolve

    rule = "mpl_scale.method.feedback.rule=per_sample"
    overrides = [f"zero_optimization.stage={stage}", rule]
    config = write(tmp_path, tiny())
    found = resolve(load_config(config, overrides=overrides), world=1, device="cpu")
    assert found.derivative == ("difference" if stage == 3 else "jvp")
    assert resolve(load_config(config, overrides=overrides[:1]), world=1, device="cpu").derivative == "none"
    if stage == 3:
        asked = load_config(config, overrides=[*overrides, "mpl_scale.method.feedback.derivative=jvp"])
        with pytest.raises(ValueError, match=r"derivative = jvp with zero_optimization\.stage = 3"):
            resolve(asked, world=1, device="cpu")
