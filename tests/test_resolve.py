"""Every `auto` has one value: the run, the planner, `mpl-scale check` and the benchmarks read the same one."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mpl_scale.resolve
from benchmarks.workload import make_workload
from mpl_scale.cli.check import report
from mpl_scale.config import RunConfig, load_config
from mpl_scale.planner.duration import _replayed
from mpl_scale.planner.search import search
from mpl_scale.resolve import resolve
from mpl_scale.trainer.planning import configured_plan, main_job, make_jobs, make_machine
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import DIGITS, tiny, write
from tests.support.ranks import pool
from tests.support.tiers import full

ROOT = DIGITS.parents[1]
ENGINES = [
    *((engine, stage) for engine in ("auto", "deepspeed") for stage in range(4)),
    *(("flat", n) for n in range(3)),
]
AUTOS = {"engine", "kernels", "channels_last", "teacher", "graph", "tf32", "deterministic", "shard_size"}
READERS = {
    "mpl_scale/resolve.py": AUTOS,
    "mpl_scale/config/checks.py": {"engine", "graph", "shard_size", "tf32"},  # refuses combinations
    "mpl_scale/planner/search.py": {"engine", "shard_size"},  # a plan's alternatives, by choose_engine
    "mpl_scale/planner/duration.py": {"graph"},  # the same, by why_not_captured
    "mpl_scale/trainer/run.py": {"graph"},  # whether a capture that fails ends the run
}
"""Files that may read these fields of `parallel`, and why those besides resolve.py do."""


def loaded(folder: Path, engine: str = "auto", stage: int = 0, **parallel: object) -> RunConfig:
    raw = tiny(zero_optimization={"stage": stage})
    raw["mpl_scale"]["parallel"] = {"engine": engine, **parallel}
    return load_config(write(folder, raw))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_planner_check_and_search_have_the_runs_values(tmp_path: Path, engine: str, stage: int, device: str) -> None:
    world = 2
    run = loaded(tmp_path, engine, stage, recompute="block", recompute_backend="fairscale" if stage == 1 else "native")
    resolved = resolve(run, world=world, device=device)
    machine = make_machine("cpu" if device == "cpu" else "h200", per_node=world)
    job = main_job(make_jobs(run, resolved.batches, kernels=resolved.kernels))
    choice = configured_plan(job, resolved, world=world, machine=machine).choice
    assert (choice.engine, choice.stage, choice.shard_size) == (resolved.engine, stage, resolved.shard_size)
    assert (choice.deferred, choice.parts) == (resolved.deferred_teacher, resolved.micro_batches)
    assert job.kernels == resolved.kernels
    assert _replayed(job, choice, machine) == resolved.replayed
    alternatives = [plan.choice for plan in search(job, world, machine).plans]
    assert {choice.engine for choice in alternatives if choice.stage == stage} <= {resolved.engine}
    said = report(run, world=world, cuda=device == "cuda")
    assert [line for line in said if line in resolved.table()] == resolved.table()


@pytest.mark.parametrize(
    ("device", "engine", "stage", "found"),
    [
        ("cuda", "auto", 0, ("flat", 1)),
        ("cuda", "auto", 2, ("flat", 4)),
        ("cuda", "auto", 3, ("deepspeed", 4)),
        ("cpu", "auto", 0, ("deepspeed", 4)),
        ("cpu", "flat", 0, ("flat", 1)),
        ("cpu", "flat", 1, ("flat", 4)),
    ],
)
def test_engine_and_shards(tmp_path: Path, device: str, engine: str, stage: int, found: tuple[str, int]) -> None:
    resolved = resolve(loaded(tmp_path, engine, stage), world=4, device=device)
    assert (resolved.engine, resolved.shard_size) == found


def test_a_shard_size_that_stage_0_ignores_is_named(tmp_path: Path) -> None:
    resolved = resolve(loaded(tmp_path, "flat", 0, shard_size=2), world=4, device="cpu")
    assert any("shard_size = 2 has no effect" in line for line in resolved.notes())


def run_here(config: str, output: str, overrides: tuple[str, ...]) -> tuple[Any, Any, bool]:
    """The summary of a short run, the benchmarks' values for the same ranks, and torch's flag after it."""
    run = load_config(config, overrides=overrides)
    summary = train(run, Options(Path(output), max_steps=2))
    assert summary is not None
    flag = torch.are_deterministic_algorithms_enabled()
    load = make_workload(run, device=torch.device("cpu"))
    torch.use_deterministic_algorithms(False)  # the pool's processes serve other tests
    return summary, load.resolved.summary(), flag


@pytest.mark.parametrize(
    "overrides",
    [
        ("mpl_scale.parallel.engine=flat", "zero_optimization.stage=0", "mpl_scale.parallel.deterministic=true"),
        full(("mpl_scale.parallel.engine=flat", "zero_optimization.stage=2", "train_micro_batch_size_per_gpu=5")),
        ("zero_optimization.stage=3", "mpl_scale.parallel.teacher=deferred"),
    ],
    ids=["flat 0", "flat 2", "auto 3"],
)
def test_a_run_and_the_benchmarks_report_what_check_prints(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = write(tmp_path, tiny())
    resolved = resolve(load_config(config, overrides=overrides), world=2, device="cpu")
    for summary, benchmark, deterministic in pool(2).run(run_here, config, str(tmp_path / "out"), overrides):
        assert summary["resolved"] == resolved.summary() == benchmark
        assert (summary["engine"], summary["zero_stage"]) == (resolved.engine, resolved.stage)
        assert deterministic == resolved.numerics.deterministic  # the run before may have had another


def reads() -> Iterator[tuple[str, str]]:
    """(file, field) of every `parallel.<field>` in the package and the benchmarks."""
    for path in (*(ROOT / "mpl_scale").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in AUTOS:
                of = node.value
                if (isinstance(of, ast.Name) and of.id == "parallel") or (
                    isinstance(of, ast.Attribute) and of.attr == "parallel"
                ):
                    yield str(path.relative_to(ROOT)), node.attr


def test_nobody_else_reads_a_setting_that_may_be_auto() -> None:
    found: dict[str, set[str]] = {}
    for file, field in reads():
        found.setdefault(file, set()).add(field)
    others = {file: fields - READERS.get(file, set()) for file, fields in found.items()}
    others = {file: fields for file, fields in others.items() if fields}
    assert not others, "read mpl_scale.resolve.Resolved instead"
    assert found["mpl_scale/resolve.py"] == AUTOS


def test_kernels_ask_for_triton_in_the_run_and_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loaded(tmp_path)
    assert resolve(run, world=1, device="cpu").kernels == "eager"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for installed, kernels in ((None, "eager"), (object(), "compiled")):
        monkeypatch.setattr(mpl_scale.resolve, "find_spec", lambda name, found=installed: found)
        resolved = resolve(run, world=1, device="cuda")
        assert resolved.kernels == kernels
        assert main_job(make_jobs(run, resolved.batches, kernels=resolved.kernels)).kernels == kernels
    monkeypatch.setattr(mpl_scale.resolve, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)  # torch for CPUs: a plan is for another machine's GPUs
    assert resolve(run, world=1, device="cuda").kernels == "compiled"


@pytest.mark.parametrize(
    ("derivative", "tf32", "on"),
    [("jvp", "auto", True), ("difference", "auto", False), ("jvp", False, False), ("difference", False, False)],
)
def test_tf32_is_on_where_no_central_difference_needs_fp32(
    tmp_path: Path, derivative: str, tf32: object, on: bool
) -> None:
    raw = tiny()
    raw["mpl_scale"]["method"]["feedback"] = {"rule": "per_sample", "derivative": derivative}
    raw["mpl_scale"]["parallel"] = {"tf32": tf32}
    run = load_config(write(tmp_path, raw))
    assert resolve(run, world=1, device="cuda").numerics.tf32 is on
    assert resolve(run, world=1, device="cpu").numerics.tf32 is False


def test_tf32_with_a_central_difference_is_refused(tmp_path: Path) -> None:
    raw = tiny()
    raw["mpl_scale"]["method"]["feedback"] = {"rule": "per_sample", "derivative": "difference"}
    raw["mpl_scale"]["parallel"] = {"tf32": True}
    with pytest.raises(ValueError, match=r"rule = per_sample with mpl_scale.parallel.tf32 = true.*derivative = jvp"):
        resolve(load_config(write(tmp_path, raw)), world=1, device="cuda")


def test_a_required_graph_is_refused_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="graph = required, but the run computes on cpu"):
        report(loaded(tmp_path, graph="required"), world=1, cuda=False)


def test_check_leaves_this_processs_flags_alone(tmp_path: Path) -> None:
    before = torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    report(loaded(tmp_path, deterministic=True), world=1, cuda=True)
    assert (torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")) == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_average_longer_than_the_run_is_announced_with_a_decay_that_fits(tmp_path: Path) -> None:
    raw = tiny()
    raw["mpl_scale"]["phases"]["train"]["steps"] = 120
    path = write(tmp_path, raw)

    def warnings(decay: float) -> tuple[str, ...]:
        run = load_config(path, overrides=[f"mpl_scale.model.bn_decay={decay}"])
        return resolve(run, world=1, device="cpu").warnings

    (line,) = warnings(0.99)
    assert "mpl_scale.model.bn_decay = 0.99" in line
    assert "phases.train.steps = 120" in line
    assert "set bn_decay = 0.958 or train for 500 steps" in line
    assert warnings(0.958) == ()
    assert warnings(0.9) == ()
