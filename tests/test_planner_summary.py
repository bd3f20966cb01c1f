"""A summary has what was planned beside what the run took, if asked: bytes of a rank, and the time of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpl_scale.config import load_config
from mpl_scale.models import MODELS
from mpl_scale.models.registry import register_model
from mpl_scale.monitor import cost_lines
from mpl_scale.resolve import resolve
from mpl_scale.trainer.planning import configured_plan, main_job, make_jobs, make_machine
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.ranks import pool
from tests.support.tiers import full


def make_config(folder: Path, *, network: str = "wide_resnet28_2", **top_level: Any) -> str:
    raw = tiny(train_batch_size=8, **top_level)
    section = raw["mpl_scale"]
    section["model"] |= {"teacher": {"name": network}, "student": {"name": network}}
    section["phases"] = {"train": {"steps": 3}}
    section["logging"]["cost"] = "on"
    section["data"]["test_fraction"] = 0.02  # nothing here looks at it
    return write(folder, raw)


def run(config: str, output: str, overrides: tuple[str, ...] = (), calibration: str | None = None) -> Any:
    options = Options(Path(output), resume="never", calibration=calibration)
    return train(load_config(config, overrides=overrides), options)


def engine(name: str, stage: int) -> tuple[str, ...]:
    buckets = ("zero_optimization.reduce_bucket_size=20000", "zero_optimization.stage3_param_persistence_threshold=0")
    return (f"mpl_scale.parallel.engine={name}", f"zero_optimization.stage={stage}", *buckets)


CASES = {
    "split": (*engine("flat", 1), "mpl_scale.parallel.width=2", "mpl_scale.parallel.switch_at=never"),
    "micro-batches": (*engine("flat", 2), "train_micro_batch_size_per_gpu=2", "mpl_scale.parallel.recompute=block"),
    "stage 3": engine("deepspeed", 3),
}


@pytest.mark.parametrize("name", [name if name == "micro-batches" else full(name) for name in sorted(CASES)])
def test_a_runs_summary_has_its_plan_beside_its_census(tmp_path: Path, name: str) -> None:
    """Issue 8's bounds: 5% of state, 10% of kept activations; both networks, through the trainer's own step."""
    cost = pool(2).run(run, make_config(tmp_path), str(tmp_path / "out"), CASES[name])[0]["cost"]
    found = cost["bytes"]
    assert found["static"]["planned"] == pytest.approx(found["static"]["measured"], rel=0.05)
    assert found["activations"]["planned"] == pytest.approx(found["activations"]["measured"], rel=0.10)
    assert cost["note"] is None
    assert cost["step_ms"]["measured"] > 0
    assert cost["step_ms"]["planned"] is None  # rates of this machine are assumed until they are measured
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["cost"] == cost


def test_on_a_cpu_nothing_is_measured_unless_asked(tmp_path: Path) -> None:
    config, output = make_config(tmp_path, network="digits_cnn"), tmp_path / "out"
    asked = ("mpl_scale.logging.cost=auto",)
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"device": {"peak": 1e9}, "reached": {}}))
    summary = pool(1).run(run, config, str(output), asked, str(rates))[0]
    assert summary["cost"] is None
    assert cost_lines(summary) == []
    assert summary["resolved"]["cost"] == {"value": "not measured", "why": "auto: on a CPU counting takes time"}
    assert resolve(load_config(config, overrides=asked), world=1, device="cuda").cost


def test_with_measured_rates_the_time_of_a_step_is_planned(tmp_path: Path) -> None:
    """The planner's own figure for these rates; three decimals are kept."""
    config, rates = make_config(tmp_path, network="digits_cnn"), tmp_path / "rates.json"
    rates.write_text(json.dumps({"device": {"peak": 1e9}, "reached": {}}))
    cost = pool(1).run(run, config, str(tmp_path / "out"), calibration=str(rates))[0]["cost"]
    loaded = load_config(config)
    resolved = resolve(loaded, world=1, device="cpu")
    machine = make_machine("cpu", calibration=str(rates), per_node=1)
    job = main_job(make_jobs(loaded, resolved.batches, kernels=resolved.kernels))
    expected = configured_plan(job, resolved, world=1, machine=machine).duration.total
    assert cost["step_ms"]["planned"] == pytest.approx(1e3 * expected, abs=1e-3)


def test_a_file_that_is_no_calibration_is_refused_before_training(tmp_path: Path) -> None:
    config = make_config(tmp_path, network="digits_cnn")
    with pytest.raises(AssertionError, match=r"--calibration .*run\.json: no calibration"):
        pool(1).run(run, config, str(tmp_path / "out"), calibration=config)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


class Curious(nn.Module):
    """Reads its input on the host while it learns: on the meta device there is nothing to read."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(3 * 8 * 8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training or images.detach().abs().max().item() < 100
        return self.classifier(images.flatten(1))


def run_curious(config: str, output: str) -> Any:
    if "curious" not in MODELS:
        register_model("curious")(lambda *, num_classes: Curious(num_classes))
    try:
        return run(config, output)
    finally:
        del MODELS["curious"]


def test_a_network_that_cannot_be_traced_is_trained_and_the_summary_says_so(tmp_path: Path) -> None:
    config = make_config(tmp_path, network="digits_cnn")
    raw = json.loads(Path(config).read_text())
    raw["mpl_scale"]["model"]["student"]["name"] = "curious"
    summary = pool(1).run(run_curious, write(tmp_path, raw), str(tmp_path / "out"))[0]
    assert summary["steps"] == 3
    assert summary["cost"]["note"].startswith("the network could not be traced: ")
    assert summary["cost"]["bytes"]["static"]["planned"] is None
    assert summary["cost"]["bytes"]["static"]["measured"] > 0
    assert cost_lines(summary)[-1].strip() == summary["cost"]["note"]


def test_the_table_of_a_summary() -> None:
    sizes = {"planned": 1_500_000, "measured": None}
    cost = {
        "phase": "train",
        "bytes": {"static": sizes},
        "step_ms": {"planned": None, "measured": 12.3456},
        "note": None,
    }
    assert [line.split() for line in cost_lines({"cost": cost})] == [
        ["a", "rank", "in", "phase", "train", "planned", "measured"],
        ["static,", "MB", "1.500", "-"],
        ["a", "step,", "ms", "-", "12.346"],
    ]
    assert cost_lines({}) == []
