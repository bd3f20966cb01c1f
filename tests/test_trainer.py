"""Runs of a few steps through the real trainer: every method and rule, what they write, how they are evaluated."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpl_scale.cli.main import main
from mpl_scale.config import check, load_config
from mpl_scale.data import load_images, make_splits
from mpl_scale.data.distributions import check_distributions
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.mpl import FEEDBACK_RULES, LOSSES, METHODS
from mpl_scale.trainer.evaluation import Evaluator
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.ranks import pool
from tests.support.tiers import full

EVERY_LINE = {
    "global_step",
    "phase",
    "step",
    "part",
    "wall",
    "images_per_second",
    "data_wait_share",
    "student_lr",
    "student_loss",
}
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


OWN = {name for name, method in METHODS.items() if method.step.__module__.startswith("mpl_scale.")}
"""Tests register methods too."""


@pytest.mark.parametrize(
    "method",
    [
        name if name == "mpl" else full(name)
        for name in sorted(OWN - {"teacher_warmup", "reduced_mpl", "noisy_student"})
    ],
)
def test_every_method_learns_something(tmp_path: Path, method: str) -> None:
    """100 steps bring the test loss of the network that sees labels below ln 10, an untrained net's.

    With the config's weight of 2, an untrained network that follows all its own labels has soon one class for all.
    """
    adapts = method in LOSSES and LOSSES[method].adapts
    overrides = (
        *(["mpl_scale.method.uda.weight=0.3"] if adapts else []),
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


def test_a_stored_teacher_teaches_the_reduced_one_and_a_noisy_student(tmp_path: Path) -> None:
    """Appendix E and Table 11 from files: a UDA network, its distributions of all images, what learns from them."""
    config, stored = config_with(tmp_path), tmp_path / "uda.npy"
    steps = ("mpl_scale.phases.train.steps=60", "mpl_scale.model.bn_decay=0.9", "mpl_scale.phases.finetune.steps=0")
    pool(2).run(run, config, str(tmp_path / "uda"), ("mpl_scale.method.name=uda", *steps))
    arguments = ["--ds_config", config, "--checkpoint", str(tmp_path / "uda"), "--output", str(stored)]
    assert main(["distributions", *arguments]) == 0
    values = np.load(stored)
    assert values.shape == (1797, 10)
    assert np.abs(values.astype(np.float64).sum(1) - 1).max() < 5e-3  # ten float16 roundings of 5e-4
    labels = load_images(load_config(config).mpl.data).labels
    assert (values.argmax(1) == labels).mean() > 0.2  # rows are by sample id: 0.1 by chance
    here = (f"mpl_scale.data.distributions={stored}", *steps, "mpl_scale.phases.train.steps=30")
    reduced = {"name": "reduced_teacher", "kwargs": {"hidden": 16}}
    names = ("mpl_scale.method.name=reduced_mpl", "mpl_scale.method.teacher_loss=supervised")
    teacher = (f"mpl_scale.model.teacher={json.dumps(reduced)}",)
    first, second = pool(2).run(run, config, str(tmp_path / "reduced"), (*here, *names, *teacher))
    assert first["results"] == second["results"]
    assert set(first["results"]) == {"student", "ema"}  # the teacher sees no image
    assert train_lines(tmp_path / "reduced", "train")[-1].keys() >= MPL_LINE - {"teacher_uda_loss"}
    noisy = ("mpl_scale.method.name=noisy_student", "mpl_scale.phases.teacher_warmup.steps=0")
    results = pool(2).run(run, config, str(tmp_path / "noisy"), (*here, *noisy))[0]["results"]
    assert results["student"]["loss"] < 2.28  # ln 10 is an untrained net's


def test_what_stored_distributions_need_is_said(tmp_path: Path) -> None:
    reduced = ("mpl_scale.method.name=reduced_mpl", "mpl_scale.method.teacher_loss=supervised")
    with pytest.raises(ValueError, match=r"reduced_mpl learns from a trained teacher's distributions; write them"):
        run(config_with(tmp_path), str(tmp_path / "out"), reduced)
    np.save(tmp_path / "few.npy", np.zeros((7, 10), np.float16))
    few = (f"mpl_scale.data.distributions={tmp_path / 'few.npy'}",)
    with pytest.raises(ValueError, match=r"few.npy' holds float16 \[7, 10\], and the data set has 1797 images of 10"):
        run(config_with(tmp_path), str(tmp_path / "out"), few)


def test_damaged_distributions_are_refused(tmp_path: Path) -> None:
    """Whatever the damage is; a file without an account is judged by its numbers alone."""
    config, stored = config_with(tmp_path), tmp_path / "t.npy"
    (checkpoint := tmp_path / "out").mkdir()
    short = ("mpl_scale.phases.train.steps=1", "mpl_scale.phases.finetune.steps=0")
    run(config, str(checkpoint), short)
    command = ["distributions", "--ds_config", config, "--checkpoint", str(checkpoint), "--output", str(stored)]
    assert main(command) == 0
    good, whole = np.load(stored), stored.read_bytes()
    splits = make_splits(load_images(load_config(config).mpl.data), config=load_config(config).mpl.data, seed=0)
    assert check_distributions(stored, splits) == hashlib.sha256(whole).hexdigest()

    def judged(values: np.ndarray) -> None:
        np.save(stored, values)
        check_distributions(stored, splits)

    not_a_number, negative = good.copy(), good.copy()
    not_a_number[700, 3], negative[5, :2] = np.nan, (-1, 2)
    for values, message in (
        (not_a_number, "row 700 is no distribution"),
        (negative, "row 5 is no distribution"),
        (good * np.float16(0.5), r"row 0 is no distribution .*sum 0\.[45]"),
        (good[::-1], "is not the file that t.npy.json beside it is of"),
        (good[:, :9], r"holds float16 \[1797, 9\]"),
        (good[:900], r"holds float16 \[900, 10\]"),
    ):
        with pytest.raises(ValueError, match=message):
            judged(values)
    stored.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="ends before its 17970 numbers do"):
        check_distributions(stored, splits)
    stored.write_bytes(whole)
    account = json.loads((tmp_path / "t.npy.json").read_text())
    account["images"]["data.files"] = "of others"
    (tmp_path / "t.npy.json").write_text(json.dumps(account))
    with pytest.raises(ValueError, match=r"is of other images, or of another order \(data.files\)"):
        run(config, str(tmp_path / "new"), (*short, f"mpl_scale.data.distributions={stored}"))
    (tmp_path / "t.npy.json").unlink()
    judged(good)


def test_labelled_images_can_be_seen_in_their_strong_view(tmp_path: Path) -> None:
    """RandAugment as a baseline: another view of the same images, without the operation that needs other images."""
    view = "mpl_scale.data.labelled_view=strong"
    weak, strong = (
        run(config_with(tmp_path), str(tmp_path / name), ("mpl_scale.method.name=supervised", *more))["results"]
        for name, more in (("weak", ()), ("strong", (view,)))
    )
    assert weak != strong
    with pytest.raises(ValueError, match=r"labelled_view = strong with sample_pairing .* set data.strong.op_set"):
        run(config_with(tmp_path), str(tmp_path / "out"), (view, 'mpl_scale.data.strong.ops=["sample_pairing"]'))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixes_need_pairs(tmp_path: Path, name: str) -> None:
    odd = (f"mpl_scale.method.name={name}", "train_batch_size=15")
    with pytest.raises(ValueError, match=rf"train_micro_batch_size_per_gpu = 15 with {name}.* must be even; use 16"):
        run(config_with(tmp_path), str(tmp_path / "out"), odd)


def test_cutmix_needs_whole_images(tmp_path: Path) -> None:
    changes = ["mpl_scale.method.teacher_loss=cutmix", "mpl_scale.parallel.width=2"]
    over_teacher = load_config(config_with(tmp_path), overrides=changes)
    with pytest.raises(ValueError, match=r"width = 2 with cutmix.*set width = 1"):
        check(over_teacher, world=2, cuda=False)


@pytest.mark.parametrize(
    "rule", [rule if rule in ("cosine", "soft_exact") else full(rule) for rule in sorted(FEEDBACK_RULES)]
)
def test_every_rule_runs_and_is_logged(tmp_path: Path, rule: str) -> None:
    labels = "soft" if rule == "soft_exact" else "sampled"
    overrides = (f"mpl_scale.method.feedback.rule={rule}", f"mpl_scale.method.pseudo_labels={labels}")
    pool(2).run(run, config_with(tmp_path), str(tmp_path / "out"), overrides)
    last = train_lines(tmp_path / "out", "train")[-1]
    if rule not in ("none", "loss_difference", "kekmodel"):
        assert last.keys() >= MPL_LINE
        assert -1 <= last["cosine"] <= 1
    assert (last["h"] == 0) == (rule == "none")


@pytest.mark.parametrize("preset", ["paper", "exact", full("released_code"), full("kekmodel_compat")])
def test_every_preset_runs(tmp_path: Path, preset: str) -> None:
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["method"] = {"preset": preset, "student_wait_steps": 3}
    pool(2).run(run, write(tmp_path, raw), str(tmp_path / "out"), ())
    rows = train_lines(tmp_path / "out", "train")
    assert [row["student_lr"] > 0 for row in rows] == [False, True, True, True]  # steps 2, 4, 6, 8
    assert rows[0]["h"] == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the flat engine at stage 2, which recomputes nothing."""
    folder = tmp_path_factory.mktemp("plain")
    overrides = ("mpl_scale.parallel.recompute=none", "zero_optimization.stage=2")
    return pool(2).run(run, config_with(folder), str(folder / "out"), overrides)[0]["results"]


@pytest.mark.parametrize("policy", [full("bn_act"), "block"])
def test_recomputation_trains_the_same_networks(tmp_path: Path, plain: dict[str, Any], policy: str) -> None:
    """Bitwise, at width 1: the same sums in the same order."""
    overrides = (f"mpl_scale.parallel.recompute={policy}", "zero_optimization.stage=2")
    assert pool(2).run(run, config_with(tmp_path), str(tmp_path / "out"), overrides)[0]["results"] == plain


@pytest.mark.parametrize("stage", [2, full(3)])
def test_both_engines_train_the_same_networks(tmp_path: Path, plain: dict[str, Any], stage: int) -> None:
    """Sixteen steps in three phases: float32 sums in another order, nothing else."""
    overrides = ("mpl_scale.parallel.engine=deepspeed", f"zero_optimization.stage={stage}")
    found = pool(2).run(run, config_with(tmp_path), str(tmp_path / "out"), overrides)[0]["results"]
    losses, expected = ({name: result["loss"] for name, result in each.items()} for each in (found, plain))
    assert losses == pytest.approx(expected, rel=1e-4)


def test_deepspeeds_monitor_sections_are_honoured(tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "digits"}
    config = config_with(tmp_path, csv_monitor=section)
    pool(2).run(run, config, str(tmp_path / "out"), ())
    written = {path.name for path in (tmp_path / "csv" / "digits").iterdir()}
    assert {"train_student_loss.csv", "train_h.csv", "test_student_loss.csv", "test_finetuned_top1.csv"} <= written


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


def test_the_run_leaves_its_resolved_config_command_machine_and_versions(tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary = run(config_with(tmp_path), str(output), ("mpl_scale.seed=4",))
    resolved = load_config(output / "config.json")
    assert resolved.mpl.seed == 4
    assert summary["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert shlex.split(summary["command"])[0] == sys.argv[0]
    assert summary["processor"].startswith(f"{os.cpu_count()} cores of ")
    assert json.loads((output / "summary.json").read_text()) == summary
    assert (output / "DONE").exists()
