"""Runs of a few steps through the real trainer: every method and rule, what they write, how they are evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_scale.config import load_config
from mpl_scale.data import load_images, make_splits
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.mpl import FEEDBACK_RULES, METHODS
from mpl_scale.trainer.evaluation import Evaluator
from mpl_scale.trainer.prepare import Options, train
from tests.configs import tiny, write
from tests.ranks import pool

EVERY_LINE = {"global_step", "phase", "step", "images_per_second", "data_wait_share", "student_lr", "student_loss"}
MPL_LINE = EVERY_LINE | {
    "cosine",
    "h",
    "feedback",
    "baseline",
    "teacher_lr",
    "teacher_supervised_loss",
    "teacher_uda_loss",
    "teacher_mpl_loss",
    "uda_weight",
    "student_accuracy",
    "student_labelled_loss",
}


def run(config: str, output: str, overrides: tuple[str, ...]) -> Any:
    return train(load_config(config, overrides=overrides), Options(Path(output)))


def train_lines(output: Path, phase: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase and "images_per_second" in row]


def config_with(tmp_path: Path, **top_level: Any) -> str:
    raw = tiny(**top_level)
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    return write(tmp_path, raw)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"teacher_warmup"}))
def test_every_method_learns_something(tmp_path: Path, method: str) -> None:
    """100 steps bring the test loss of the network that sees labels below ln 10, an untrained net's."""
    overrides = (
        f"mpl_scale.method.name={method}",
        "mpl_scale.phases.train.steps=100",
        "mpl_scale.model.bn_decay=0.9",
    )
    first, second = pool(2).run(run, config_with(tmp_path), str(tmp_path / "out"), overrides)
    assert first["results"] == second["results"]
    assert first["results"]["teacher" if method == "mpl" else "student"]["loss"] < 2.28
    assert first["results"]["student"]["images"] == 599
    assert train_lines(tmp_path / "out", "train")[-1].keys() >= EVERY_LINE
    assert ("teacher" in first["results"]) == METHODS[method].teacher


@pytest.mark.parametrize("rule", sorted(FEEDBACK_RULES))
def test_every_rule_runs_and_is_logged(tmp_path: Path, rule: str) -> None:
    labels = "soft" if rule == "soft_exact" else "sampled"
    overrides = (f"mpl_scale.method.feedback.rule={rule}", f"mpl_scale.method.pseudo_labels={labels}")
    pool(2).run(run, config_with(tmp_path), str(tmp_path / "out"), overrides)
    last = train_lines(tmp_path / "out", "train")[-1]
    if rule not in ("none", "loss_difference"):
        assert last.keys() >= MPL_LINE
        assert -1 <= last["cosine"] <= 1
    assert (last["h"] == 0) == (rule == "none")


@pytest.mark.parametrize("preset", ["paper", "released_code", "kekmodel_compat"])
def test_every_preset_runs(tmp_path: Path, preset: str) -> None:
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["method"] = {"preset": preset, "student_wait_steps": 3}
    pool(2).run(run, write(tmp_path, raw), str(tmp_path / "out"), ())
    rows = train_lines(tmp_path / "out", "train")
    assert [row["student_lr"] > 0 for row in rows] == [False, True, True, True]  # steps 2, 4, 6, 8
    assert rows[0]["h"] == 0


def test_recomputation_trains_the_same_networks(tmp_path: Path) -> None:
    """Bitwise, at width 1: the same sums in the same order."""
    config, results = config_with(tmp_path), []
    for policy in ("none", "bn_act", "block"):
        overrides = (f"mpl_scale.parallel.recompute={policy}",)
        results.append(pool(2).run(run, config, str(tmp_path / policy), overrides)[0]["results"])
    assert results[0] == results[1] == results[2]


def test_both_engines_train_the_same_networks(tmp_path: Path) -> None:
    """Sixteen steps in three phases: float32 sums in another order, nothing else."""
    config = config_with(tmp_path)
    losses = {}
    for engine, stage in (("flat", 2), ("deepspeed", 2), ("deepspeed", 3)):
        overrides = (f"mpl_scale.parallel.engine={engine}", f"zero_optimization.stage={stage}")
        summary = pool(2).run(run, config, str(tmp_path / f"{engine}{stage}"), overrides)[0]
        losses[engine, stage] = {name: result["loss"] for name, result in summary["results"].items()}
    for values in losses.values():
        assert values == pytest.approx(losses["flat", 2], rel=1e-4)


def test_deepspeeds_monitor_sections_are_honoured(tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "digits"}
    config = config_with(tmp_path, csv_monitor=section)
    pool(2).run(run, config, str(tmp_path / "out"), ())
    written = {path.name for path in (tmp_path / "csv" / "digits").iterdir()}
    assert {"train_student_loss.csv", "train_h.csv", "finetune_finetuned_top1.csv"} <= written


def evaluate(config: str) -> dict[str, float]:
    loaded = load_config(config).mpl
    splits = make_splits(load_images(loaded.data), config=loaded.data, seed=0)
    mesh = build_mesh(device=torch.device("cpu"))
    model = build_model(loaded.model.student, loaded.model, field="student", seed=5)
    return Evaluator(loaded, splits=splits, mesh=mesh).evaluate({"student": model.state_dict()})["student"]


def test_evaluation_counts_each_image_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    """599 images over 4 ranks leave a short batch."""
    config = config_with(tmp_path)
    alone = evaluate(config)
    assert alone["images"] == 599
    for world in (2, 4):
        for result in pool(world).run(evaluate, config):
            assert result == pytest.approx(alone, rel=1e-6)


def test_the_run_leaves_its_resolved_config_and_versions(tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary = run(config_with(tmp_path), str(output), ("mpl_scale.seed=4",))
    resolved = load_config(output / "config.json")
    assert resolved.mpl.seed == 4
    assert summary["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads((output / "summary.json").read_text()) == summary
    assert (output / "DONE").exists()
