"""Runs whose ranks share images along the width follow the run of whole images: losses, weights, results, resume."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_scale.augment import StrongView
from mpl_scale.config import load_config
from mpl_scale.config.schema import DataConfig, ModelConfig, NetworkConfig, OptimConfig, StrongConfig, WeakConfig
from mpl_scale.data import load_images
from mpl_scale.engine import build_network
from mpl_scale.mesh import Mesh, build_mesh
from mpl_scale.models import build_model
from mpl_scale.mpl import METHODS, Network
from mpl_scale.spatial import input_columns, parallelize
from mpl_scale.trainer.prepare import Options, train
from tests.support.batches import splits_of, take, train_loader
from tests.support.configs import tiny, write
from tests.support.ranks import pool
from tests.support.reference import Settings
from tests.support.runs import final_state, lines
from tests.support.runs import run as run_stopped
from tests.support.sharded import full_state, make_state
from tests.support.tiers import full

STEPS = 5
SIZE = 8
SETTINGS = Settings(steps=STEPS, classes=10, lr=0.0625)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = str(tmp_path_factory.mktemp("data") / "digits")
    config = DataConfig(root=root, weak=WeakConfig(pad=1), strong=StrongConfig(ops=["rotate", "equalize"], cutout=2))
    load_images(config)
    return config


def digits_network(name: str, seed: int, mesh: Mesh, options: dict[str, Any]) -> Network:
    section = NetworkConfig(name=name, dropout=0.2)
    shared = ModelConfig(teacher=section, student=section, num_classes=10, image_size=SIZE, bn_decay=0.9)
    model = build_model(section, shared, field="model", seed=seed, group=mesh.world_group).double()
    if mesh.width > 1:
        model = parallelize(model, mesh=mesh, image_size=SIZE, **options)
    optim = OptimConfig(lr=SETTINGS.lr, weight_decay=1e-3)
    return build_network(model, engine="flat", optim=optim, ds_config={}, mesh=mesh)


Trace = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def run_digits(config: DataConfig, name: str, width: int, options: dict[str, Any]) -> Trace:
    """Five MPL steps in float64 on real images: every metric of every step, and the weights and buffers at the end."""
    mesh = build_mesh(device=torch.device("cpu"), width=width)
    changes = {
        "image_size": SIZE,
        "labelled": 6,
        "unlabelled": 10,
        "strong_view": StrongView(config.strong, seed=0, stream=1),
        "columns": input_columns(SIZE, width) if width > 1 else None,
        "dtype": torch.float64,
    }
    teacher, student = (digits_network(name, seed, mesh, options) for seed in (1, 2))
    state = make_state(SETTINGS, teacher, student, mesh)
    metrics = []
    for batch in take(train_loader(config, splits_of(config), mesh, **changes), STEPS):
        values = METHODS["mpl"].step(state, batch)
        metrics.append({key: state.mean_over_ranks(value.double()).item() for key, value in values.items()})
    weights = {
        f"{kind}.{key}": value
        for kind, network in (("teacher", teacher), ("student", student))
        for key, value in full_state(network, network.master, dict(network.module.named_buffers()), mesh).items()
    }
    return metrics, weights


@functools.cache
def whole_images(root: str, name: str) -> Trace:
    config = DataConfig(root=root, weak=WeakConfig(pad=1), strong=StrongConfig(ops=["rotate", "equalize"], cutout=2))
    return run_digits(config, name, 1, {})


@pytest.mark.parametrize(
    ("name", "world", "width", "options"),
    [
        ("digits_cnn", 2, 2, {}),
        ("digits_cnn", 4, 2, {}),
        ("digits_cnn", 4, 4, {}),
        ("digits_cnn", 4, 4, {"switch_at": "never"}),
        ("digits_cnn", 2, 2, {"halo": "block_input"}),
        ("wide_resnet28_2", 2, 2, {}),
        full("wide_resnet28_2", 4, 2, {"switch_at": "never"}),
    ],
    ids=str,
)
def test_split_steps_follow_whole_ones(
    digits: DataConfig, name: str, world: int, width: int, options: dict[str, Any]
) -> None:
    """float64: roundings of 1e-16 that five steps of a small net enlarge far less than 1e8 times."""
    assert digits.root is not None
    expected_metrics, expected = whole_images(digits.root, name)
    assert any(abs(values["cosine"]) > 1e-3 for values in expected_metrics)
    for metrics, weights in pool(world).run(run_digits, digits, name, width, options):
        for step, (ours, whole) in enumerate(zip(metrics, expected_metrics, strict=True)):
            for key, value in whole.items():
                tolerance = 1e-6 if key.endswith("accuracy") else 1e-8  # accuracies are float32
                assert ours[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (step, key)
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            assert (weights[key].double() - value.double()).abs().max() <= 1e-8, key


def make_config(tmp_path: Path, engine: str, stage: int) -> str:
    zero = {"stage": stage, "reduce_bucket_size": 200, "stage3_param_persistence_threshold": 0}
    raw = tiny(zero_optimization=zero)
    # One layout for all: another one's rounding may move a ReLU across 0, and a step's cosine by 1e-3.
    raw["mpl_scale"]["parallel"] = {"engine": engine, "channels_last": "off"}
    raw["mpl_scale"]["logging"]["every"] = 1
    return write(tmp_path, raw)


def run(config: str, output: str, width: int) -> Any:
    overrides = (f"mpl_scale.parallel.width={width}",)
    return train(load_config(config, overrides=overrides), Options(Path(output)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the metrics of a run without a width."""
    folder = tmp_path_factory.mktemp("whole")
    summary = run(make_config(folder, "flat", 2), str(folder / "out"), 1)
    return summary, lines(folder / "out")


@pytest.mark.parametrize(
    ("world", "engine", "stage"),
    [
        full(2, "flat", 2),
        (2, "deepspeed", 3),
        full(4, "flat", 2),
        full(2, "deepspeed", 2),
        full(4, "deepspeed", 2),
        full(4, "deepspeed", 3),
    ],
)
def test_split_runs_report_what_whole_ones_do(
    tmp_path: Path, whole: tuple[dict[str, Any], list[dict[str, Any]]], world: int, engine: str, stage: int
) -> None:
    """Width 2, three phases with evaluation, through the trainer. float32: sums in another order, over 16 steps."""
    summary_of_whole, lines_of_whole = whole
    config = make_config(tmp_path, engine, stage)
    ranks = pool(world).run(run, config, str(tmp_path / "split"), 2)
    for summary in ranks:
        assert (summary["engine"], summary["zero_stage"]) == (engine, stage)
        assert summary["results"].keys() == summary_of_whole["results"].keys()
        for name, result in summary["results"].items():
            assert result["images"] == 599
            assert result["loss"] == pytest.approx(summary_of_whole["results"][name]["loss"], rel=1e-4), name
    for ours, expected in zip(lines(tmp_path / "split"), lines_of_whole, strict=True):
        losses = {key: value for key, value in expected.items() if key.endswith("loss")}
        assert {key: ours[key] for key in losses} == pytest.approx(losses, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("engine", "stage"), [("flat", 2), full("deepspeed", 3)])
def test_resume_of_a_split_run_is_bitwise(tmp_path: Path, engine: str, stage: int) -> None:
    config, overrides = make_config(tmp_path, engine, stage), ("mpl_scale.parallel.width=2",)
    whole = pool(2).run(run_stopped, config, str(tmp_path / "whole"), None, overrides)[0]
    for steps in (5, 9):  # in the main phase and in the finetuning
        assert pool(2).run(run_stopped, config, str(tmp_path / "stopped"), steps, overrides) == [None, None]
    resumed = pool(2).run(run_stopped, config, str(tmp_path / "stopped"), None, overrides)[0]
    assert resumed["results"] == whole["results"]
    found, expected = final_state(tmp_path / "stopped"), final_state(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_split_run_goes_on_with_whole_images_and_back(
    tmp_path: Path, whole: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    """Checkpoints know no width: 6 steps split, 5 whole, the rest split, against a whole run (float32 roundings)."""
    config, summary_of_whole, resumed = make_config(tmp_path, "flat", 2), whole[0], None
    for steps, width in ((6, 2), (5, 1), (None, 2)):
        overrides = (f"mpl_scale.parallel.width={width}",)
        resumed = pool(2).run(run_stopped, config, str(tmp_path / "mixed"), steps, overrides)[0]
    assert resumed is not None
    assert resumed["steps"] == summary_of_whole["steps"]
    for name, result in summary_of_whole["results"].items():
        assert resumed["results"][name]["loss"] == pytest.approx(result["loss"], rel=1e-4), name
