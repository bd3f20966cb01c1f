"""Rates by layer and frozen parts equal timm's in plain PyTorch: every engine, 1 and 2 ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import Lamb, param_groups_layer_decay
from timm.utils import freeze as timms_freeze
from torch import nn

from mpl_scale.checkpoint.gather import gather_parameters
from mpl_scale.config import load_config
from mpl_scale.config.schema import ModelConfig, NetworkConfig, OptimConfig
from mpl_scale.engine import build_network
from mpl_scale.mesh import build_mesh
from mpl_scale.models import Pass, build_model
from mpl_scale.optim import parameter_groups
from mpl_scale.trainer.preflight import check_models, network_notes
from tests.support.configs import tiny, write
from tests.support.ranks import pool
from tests.support.sharded import zero

VIT = NetworkConfig(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 12, "num_heads": 3},
)
RESNET = NetworkConfig(name="test_resnet", frozen=["stem", "layer1", "layer2.*.bn1", "layer3.0.conv2"])
LRS = (0.03125, 0.0625, 0.015625)  # exact in float32, as layer_decay's powers are
ADAMW = OptimConfig(name="adamw", lr=LRS[0], betas=(0.8, 0.95), adam_eps=1e-3, weight_decay=0.1, layer_decay=0.5)
LAMB = ADAMW.model_copy(update={"name": "lamb"})
SGD = OptimConfig(name="sgd", lr=LRS[0], weight_decay=0.1)


def build(section: NetworkConfig) -> nn.Module:
    shared = ModelConfig(teacher=section, student=section, num_classes=5, image_size=16)
    model = build_model(section, shared, field="model", seed=1)
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():  # averages that are not those of a new layer
        if name.endswith("running_mean"):
            buffer.normal_(generator=generator)
    return model


def batches(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in LRS]
    return [(x, torch.arange(8) % 5) for x in images]


def plain_optimizer(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """torch's or timm's over timm's groups."""
    groups: Any = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=optim.layer_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    if optim.name == "lamb":
        return Lamb(groups, betas=(0.8, 0.95), eps=1e-3, max_grad_norm=None)
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-3)


@functools.cache
def plain(name: str, optim_name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """timm's own model, and its own `freeze`."""
    section, optim = CASES[name, optim_name]
    model = timm.create_model(section.name, num_classes=5, **section.kwargs).to(dtype)
    model.load_state_dict(build(section).state_dict())
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps, layer.momentum = 1e-3, 0.01
    if section.frozen:
        timms_freeze(model, ["conv1", "bn1", "layer1", "layer2.0.bn1", "layer3.0.conv2"])
    optimizer = plain_optimizer(optim, model)
    for (x, y), lr in zip(batches(dtype), LRS, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {name: value for name, value in model.state_dict().items() if not name.endswith("tracked")}


CASES = {("vit", "adamw"): (VIT, ADAMW), ("vit", "lamb"): (VIT, LAMB), ("resnet", "sgd"): (RESNET, SGD)}


def train(
    name: str, optim_name: str, dtype: torch.dtype, engine: str, ds_config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """On each rank: the whole weights and buffers after some steps on its rows."""
    section, optim = CASES[name, optim_name]
    mesh = build_mesh(device=torch.device("cpu"))
    shared = ModelConfig(teacher=section, student=section, num_classes=5, image_size=16)
    model = build_model(section, shared, field="model", seed=1, group=mesh.world_group).to(dtype)
    model.load_state_dict(build(section).state_dict())
    network = build_network(model, engine=engine, optim=optim, ds_config=ds_config, mesh=mesh)  # type: ignore[arg-type]
    for step, ((x, y), lr) in enumerate(zip(batches(dtype), LRS, strict=True)):
        rows = torch.arange(len(x)).chunk(mesh.data)[mesh.data_index]
        now = Pass(seed=0, stream=0, step=torch.tensor(step), rows=rows)
        network.accumulate(F.cross_entropy(network.forward(x[rows], now), y[rows]))
        network.reduce()
        network.apply(torch.tensor(lr))
    weights = gather_parameters(network.layout, network.master, group=mesh.world_group, owns=network.owns_shard)
    return {**weights, **dict(model.named_buffers())}


def assert_plain(results: list[dict[str, torch.Tensor]], name: str, optim_name: str, dtype: torch.dtype) -> None:
    expected = plain(name, optim_name, dtype)
    start = build(CASES[name, optim_name][0]).state_dict()
    assert any(not torch.equal(value, start[name].to(dtype)) for name, value in expected.items())
    # float64: some thousand roundings of 1e-16, which averages of squares near 0 enlarge; float32: of 6e-8
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (2e-4, 2e-5)
    for result in results:
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("name", "optim"), CASES)
def test_flat_engine(name: str, optim: str, world: int) -> None:
    args = (name, optim, torch.float64, "flat", {})
    assert_plain([train(*args)] if world == 1 else pool(world).run(train, *args), name, optim, torch.float64)


@pytest.mark.parametrize(
    ("name", "optim", "stage"),
    [("vit", "adamw", stage) for stage in range(4)] + [("vit", "lamb", 3), ("resnet", "sgd", 2)],
)
def test_deepspeed_engine(name: str, optim: str, stage: int) -> None:
    args = (name, optim, torch.float32, "deepspeed", zero(stage))
    assert_plain(pool(2).run(train, *args), name, optim, torch.float32)


def test_rates_matter_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance above tells rates by layer from one rate."""
    plain("vit", "adamw", torch.float64)
    monkeypatch.setitem(CASES, ("vit", "adamw"), (VIT, ADAMW.model_copy(update={"layer_decay": 1.0})))
    with pytest.raises(AssertionError, match="not close"):
        assert_plain([train("vit", "adamw", torch.float64, "flat", {})], "vit", "adamw", torch.float64)


def test_frozen_weights_are_as_they_were() -> None:
    """Bit for bit, their batch norms' averages too, and what is not frozen is trained."""
    start, found = build(RESNET).state_dict(), train("resnet", "sgd", torch.float32, "flat", {})
    same = {name.rpartition(".")[0] for name, value in found.items() if torch.equal(value, start[name])}
    stem = {"bn1", *(name for name in same if name.startswith("conv1."))}
    first = {f"layer1.0.{name}" for name in ("conv1", "bn1", "conv2", "bn2")}
    assert same == stem | first | {"layer2.0.bn1", "layer3.0.conv2"}


def test_muons_matrices_are_those_of_hidden_layers() -> None:
    groups = parameter_groups(build(VIT), ADAMW.model_copy(update={"name": "muon"}))
    hidden = {name for group in groups if group["matrices"] for name in group["names"]}
    inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert hidden == {f"blocks.{block}.{layer}.weight" for block in range(3) for layer in inner}
    assert len({group["lr_scale"] for group in groups if group["matrices"]}) == 3


@pytest.mark.parametrize(
    ("frozen", "problem"),
    [
        (["blocks.7"], r"mpl_scale\.model\.student\.frozen: 'blocks\.7' is no part of VisionTransformer; did you mean"),
        (["patch_embd"], r"'patch_embd' is no part .* did you mean patch_embed"),
        (["x"], r"'x' is no part .* known: blocks, cls_token, head, norm, patch_embed, pos_embed, stem"),
        (["*"], r"frozen = \['\*'\] leaves no parameter to train; leave the classifier out"),
    ],
)
def test_a_frozen_part_that_is_none(tmp_path: Path, frozen: list[str], problem: str) -> None:
    raw = tiny()
    raw["mpl_scale"]["model"]["student"] = {**VIT.model_dump(), "frozen": frozen, "kwargs": VIT.kwargs}
    raw["mpl_scale"]["model"]["image_size"] = 16
    with pytest.raises(ValueError, match=problem):
        check_models(load_config(write(tmp_path, raw)))


def test_what_is_frozen_as_it_was_initialised_is_named(tmp_path: Path) -> None:
    raw = tiny()
    raw["mpl_scale"]["model"]["student"]["frozen"] = ["features"]
    raw["mpl_scale"]["optim"]["student"]["name"] = "muon"
    frozen, muon = network_notes(load_config(write(tmp_path, raw)))
    assert frozen.startswith("mpl_scale.model.student.frozen = ['features']: without mpl_scale.model.student.weights")
    assert muon.startswith("mpl_scale.optim.student.name = muon: the student has no matrices of hidden layers to train")
    raw["mpl_scale"]["model"]["student"]["frozen"] = ["features.0"]
    assert len(network_notes(load_config(write(tmp_path, raw)))) == 1  # features.1 has a matrix


@pytest.mark.parametrize("where", ["optim.teacher", "optim.student", "phases.finetune.optim"])
def test_layers_that_have_no_number(tmp_path: Path, where: str) -> None:
    raw = tiny()
    section = raw["mpl_scale"]
    section["phases"]["finetune"] = {"steps": 2}
    for part in where.split("."):
        section = section.setdefault(part, {})
    section["layer_decay"] = 0.5
    with pytest.raises(ValueError, match=rf"mpl_scale\.{where}\.layer_decay = 0\.5: .* no group_matcher"):
        check_models(load_config(write(tmp_path, raw)))
