"""What of a run may change when it continues: each field of the schema, and runs that are refused, extended, left."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from mpl_scale.checkpoint import find
from mpl_scale.config import Config, check, load_config
from mpl_scale.config.deepspeed_keys import SECTIONS, TOP_LEVEL
from mpl_scale.config.load import _section_type
from mpl_scale.trainer.identity import RULES, Verdict, judge, rule_of
from mpl_scale.trainer.phases import plan_phases
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.image_sets import write_folder
from tests.support.ranks import pool
from tests.support.runs import StopAfter, final_state, lines

MANIFEST = {
    "images": 1797,
    "refused": 0,
    "classes": 10,
    "labels": "ab",
    "index": {"folder": "/data/a", "root": "/data", "sha256": "12"},
    "unlabelled_index": None,
    "parts": {name: {"count": 40, "sha256": 4 * name} for name in ("test", "held_out", "labelled", "unlabelled")},
}


def fields(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Every leaf of the schema."""
    for name, info in section.model_fields.items():
        inner = _section_type(info.annotation)
        yield from [f"{prefix}.{name}"] if inner is None else fields(inner, f"{prefix}.{name}")


OURS = list(fields(Config, "mpl_scale"))
THEIRS = [name for name, key in TOP_LEVEL.items() if key.effect != "refused"]
THEIRS += [f"{section}.{name}" for section, keys in SECTIONS.items() for name in keys]


def test_every_field_has_a_rule_and_every_rule_a_field() -> None:
    """Where the fields of a section differ in kind, the section has no rule that a new field would inherit."""
    assert [field for field in (*OURS, *THEIRS) if rule_of(field) is None] == []
    known = [*OURS, *THEIRS, "--max_steps", "ranks", "batch", "data", "splits", "distributions", "weights"]
    assert [rule for rule in RULES if not any(f"{field}.".startswith(f"{rule}.") for field in known)] == []
    for mixed in ["data", "optim", "optim.student", "phases", "phases.finetune", "phases.train"]:
        assert rule_of(f"mpl_scale.{mixed}.new_field") is None


def kept(
    folder: Path, *overrides: str, max_steps: int | None = None, ranks: int = 1, **manifest: Any
) -> dict[str, Any]:
    """What a run of 4 + 8 + 4 steps keeps."""
    run = load_config(write(folder, tiny()), overrides=overrides)
    batches = check(run, world=ranks, cuda=False)
    return {
        "config": run.resolved(),
        "identity": {
            "max_steps": max_steps,
            "ranks": ranks,
            "batch": {"labelled": batches.labelled, "unlabelled": batches.unlabelled},
            "steps": {phase.name: phase.steps for phase in plan_phases(run.mpl, batches, max_steps=max_steps)},
            "manifest": {**MANIFEST, **manifest},
            "distributions": None,
            "weights": {"teacher": None, "student": None},
        },
    }


def verdict(folder: Path, at: tuple[str, int], wanted: Mapping[str, Any], *, identity: bool = True) -> Verdict:
    """On continuing from a checkpoint of the plain run."""
    stored = {**kept(folder), "phase": at[0], "phase_step": at[1]}
    return judge(stored if identity else {key: stored[key] for key in stored if key != "identity"}, wanted)


WARMING, TRAINING, TUNING, DONE = ("teacher_warmup", 2), ("train", 3), ("finetune", 1), ("finetune", 4)
EVERYWHERE = (WARMING, TRAINING, TUNING, DONE)
LAST = DONE[1]


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("mpl_scale.seed=9", ()),
        ("mpl_scale.model.student.dropout=0.3", ()),
        ('mpl_scale.model.student.frozen=["features.0"]', ()),
        ('mpl_scale.model.teacher.kwargs={"widths": [4, 8]}', ()),
        ("mpl_scale.model.bn_decay=0.5", ()),
        ("mpl_scale.method.feedback.rule=none", ()),
        ("mpl_scale.method.ema_decay=0", ()),
        ("mpl_scale.data.strong.magnitude=3", ()),
        ("mpl_scale.data.mean=[0, 0, 0]", ()),
        ("mpl_scale.data.unlabelled_ratio=2", ()),
        ("mpl_scale.data.root=/moved", EVERYWHERE),  # the manifest decides
        ("mpl_scale.data.split_seed=0", EVERYWHERE),
        ("mpl_scale.data.threads=2", EVERYWHERE),
        ("mpl_scale.data.evaluation_batch=7", EVERYWHERE),
        ("mpl_scale.data.evaluation.kind=center_crop", (WARMING, TRAINING, TUNING)),
        ("mpl_scale.optim.teacher.lr=0.5", (WARMING, TRAINING)),
        ("mpl_scale.optim.student.lr=0.5", (WARMING, TRAINING)),
        ("mpl_scale.optim.student.schedule=constant", (WARMING, TRAINING)),
        ("mpl_scale.optim.student.name=rmsprop", (WARMING,)),
        ("mpl_scale.optim.teacher.momentum=0.5", ()),
        ("mpl_scale.optim.student.layer_decay=0.5", (WARMING,)),
        ("mpl_scale.phases.finetune.optim.lr=0.5", (WARMING, TRAINING, TUNING)),
        ("mpl_scale.phases.finetune.optim.name=lars", (WARMING, TRAINING)),
        ("mpl_scale.phases.finetune.steps=9", EVERYWHERE),
        ("mpl_scale.phases.finetune.steps=2", (WARMING, TRAINING, TUNING)),
        ("mpl_scale.phases.finetune.steps=0", (WARMING, TRAINING)),
        ("mpl_scale.phases.train.steps=12", EVERYWHERE),
        ("mpl_scale.phases.train.steps=7", (WARMING, TRAINING)),
        ("mpl_scale.phases.train.steps=2", (WARMING,)),
        ("mpl_scale.phases.teacher_warmup.steps=0", ()),
        ("mpl_scale.logging.every=5", EVERYWHERE),
        ("mpl_scale.checkpoint.keep=9", EVERYWHERE),
        ('mpl_scale.guard.rewind={"factor": 2}', EVERYWHERE),
        ("mpl_scale.parallel.engine=flat", EVERYWHERE),
        ("mpl_scale.parallel.recompute=block", EVERYWHERE),
        ("zero_optimization.stage=3", EVERYWHERE),
        ("train_batch_size=80", ()),
        ("gradient_clipping=2", (WARMING, TRAINING, TUNING)),
        ("bf16.enabled=false", EVERYWHERE),  # the default, written out
        ("bf16.enabled=true", (WARMING, TRAINING, TUNING)),
    ],
)
def test_what_may_change_and_until_when(tmp_path: Path, override: str, allowed: tuple[tuple[str, int], ...]) -> None:
    wanted = kept(tmp_path, override)
    for at in EVERYWHERE:
        found = verdict(tmp_path, at, wanted)
        assert (not found.refused) == (at in allowed), (at, found.refused)
        if override != "bf16.enabled=false":
            assert any(
                override.split("=")[0].startswith(field) or field.startswith(override.split("=")[0])
                for field in found.changed
            )


def test_the_data_and_their_split_are_compared_by_content(tmp_path: Path) -> None:
    moved = kept(tmp_path, index={**MANIFEST["index"], "folder": "/data/b", "root": "/elsewhere"})
    assert verdict(tmp_path, TRAINING, moved) == Verdict({}, [], None, False)
    for name, other in (
        ("labels", "cd"),
        ("images", 1798),
        ("index", {"sha256": "34"}),
        ("unlabelled_index", {"sha256": "5"}),
    ):
        assert f"data.{name}: " in verdict(tmp_path, TRAINING, kept(tmp_path, **{name: other})).refused[0]
    parts = copy.deepcopy(MANIFEST["parts"])
    parts["labelled"]["sha256"] = "other"
    found = verdict(tmp_path, TRAINING, kept(tmp_path, "mpl_scale.data.labelled_per_class=3", parts=parts))
    assert found.changed["mpl_scale.data.labelled_per_class"] == [4, 3]
    assert found.refused[0].startswith(
        "mpl_scale.data.labelled_per_class: 4 -> 3 (with it, splits.labelled is another)"
    )
    assert found.refused[1].startswith("splits.labelled: ")
    parts = {**MANIFEST["parts"], "test": MANIFEST["parts"]["held_out"], "held_out": {"count": 0, "sha256": ""}}
    assert verdict(tmp_path, TRAINING, kept(tmp_path, parts=parts)).refused
    assert not verdict(tmp_path, TRAINING, kept(tmp_path, "mpl_scale.data.evaluate_on=held_out", parts=parts)).refused


def test_weights_are_compared_by_content(tmp_path: Path) -> None:
    """A file that was moved is the same one; another one at the same place is not."""
    where = "mpl_scale.model.teacher.weights"
    stored = kept(tmp_path, f"{where}=/a/model.safetensors")
    stored |= {"phase": "train", "phase_step": 3}
    stored["identity"]["weights"] = {"teacher": "12", "student": None}
    moved = copy.deepcopy(stored)
    moved["config"]["mpl_scale"]["model"]["teacher"]["weights"] = "/b/model.safetensors"
    found = judge(stored, moved)
    assert (found.changed, found.refused) == ({where: ["/a/model.safetensors", "/b/model.safetensors"]}, [])
    replaced = copy.deepcopy(stored)
    replaced["identity"]["weights"]["teacher"] = "34"
    assert judge(stored, replaced).refused == ['weights.teacher: "12" -> "34" (fixed for a run)']


def test_layout_and_batch(tmp_path: Path) -> None:
    found = verdict(tmp_path, TRAINING, kept(tmp_path, ranks=2))
    assert (found.changed, found.refused) == ({"ranks": [1, 2]}, [])
    assert found.notes() == ["ranks: 1 -> 2"]


def test_max_steps_counts_as_steps(tmp_path: Path) -> None:
    shorter = verdict(tmp_path, ("train", 6), kept(tmp_path, max_steps=5))
    assert "mpl_scale.phases.train.steps (or --max_steps) = 5 is fewer than the 6 steps trained" in shorter.refused
    stored = {**kept(tmp_path, max_steps=3), "phase": "finetune", "phase_step": 3}
    more = judge(stored, kept(tmp_path))
    assert (more.changed, more.refused, more.reopened) == ({"--max_steps": [3, None]}, [], "teacher_warmup")
    assert judge(stored, kept(tmp_path, max_steps=3)).done


def test_more_steps_reopen_the_phase_and_those_after_it(tmp_path: Path) -> None:
    """The finetuning follows anew, so that its settings may change too, even to fewer steps."""
    settings = (
        "mpl_scale.phases.train.steps=12",
        "mpl_scale.phases.finetune.steps=2",
        "mpl_scale.phases.finetune.optim.name=lars",
    )
    found = verdict(tmp_path, DONE, kept(tmp_path, *settings))
    assert (found.refused, found.reopened, found.done) == ([], "train", False)
    late = kept(tmp_path, "mpl_scale.phases.teacher_warmup.steps=6")
    without = {**kept(tmp_path, "mpl_scale.phases.teacher_warmup.steps=0"), "phase": "train", "phase_step": 3}
    assert (
        "mpl_scale.phases.teacher_warmup.steps (or --max_steps): phase train has begun" in judge(without, late).refused
    )


def test_a_checkpoint_of_an_earlier_version_has_its_config_compared(tmp_path: Path) -> None:
    """Where neither it nor its folder keeps the split, the fields that it follows from are fixed."""
    assert (
        verdict(tmp_path, TRAINING, kept(tmp_path, "mpl_scale.optim.student.lr=0.5", ranks=2), identity=False).refused
        == []
    )
    for override in ("mpl_scale.seed=1", "mpl_scale.data.labelled_per_class=3", "train_batch_size=80"):
        (refused,) = verdict(tmp_path, TRAINING, kept(tmp_path, override), identity=False).refused
        assert refused.startswith(override.partition("=")[0])
    stored = {**kept(tmp_path), "phase": "train", "phase_step": 3}
    del stored["config"]["mpl_scale"]["guard"]["max_skipped"]  # a field that did not exist yet
    assert judge(stored, kept(tmp_path)).changed == {}


def make_config(folder: Path, **checkpoint: int) -> str:
    """Constant rates: longer runs begin as shorter ones do."""
    raw = tiny()
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["logging"]["progress"] = "lines"
    section["checkpoint"] = {"every": 3, "keep": 3, **checkpoint}
    for network in ("teacher", "student"):
        section["optim"][network] |= {"schedule": "constant", "warmup_steps": 0}
    return write(folder, raw)


def run(config: str, output: Path, *overrides: str, stop_after: int | None = None, **options: Any) -> Any:
    return train(
        load_config(config, overrides=overrides), Options(output, **options), stop_requested=StopAfter(stop_after)
    )


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A config and the folder of its run: 4 + 8 + 4 steps."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_config(folder)
    assert run(config, folder / "out") is not None
    return config, folder / "out"


def refused_on_both_ranks(config: str, output: str, overrides: tuple[str, ...]) -> str:
    try:
        train(load_config(config, overrides=overrides), Options(Path(output)))
    except ValueError as error:
        return str(error)
    return ""


def test_a_finished_run_is_refused_under_another_configuration(
    finished: tuple[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    config, output = finished
    before = content_of(output)
    other = ("mpl_scale.seed=9", "mpl_scale.optim.student.lr=0.5", "mpl_scale.method.feedback.rule=none")
    with pytest.raises(ValueError, match=r"another --output, or delete .* --resume never") as caught:
        run(config, output, *other)
    assert "mpl_scale.seed: 0 -> 9 (fixed for a run)" in str(caught.value)
    assert "mpl_scale.optim.student.lr" in str(caught.value)
    assert "\n" not in str(caught.value)
    said = capfd.readouterr().err
    for line in ("mpl_scale.seed: 0 -> 9", 'mpl_scale.method.feedback.rule: "cosine" -> "none"', "splits.labelled: "):
        assert line in said
    assert content_of(output) == before
    first, second = pool(2).run(refused_on_both_ranks, config, str(output), other)
    assert first == second
    assert "mpl_scale.seed: 0 -> 9" in first
    with pytest.raises(ValueError, match="is fewer than the 8 steps trained"):
        run(config, output, max_steps=5)
    assert {path: text for path, text in content_of(output).items() if path.name != ".lock"} == {
        path: text for path, text in before.items() if path.name != ".lock"
    }


def test_a_finished_run_is_left_alone_where_nothing_is_left_to_do(
    finished: tuple[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    config, output = finished
    before = content_of(output)
    assert run(config, output, "mpl_scale.logging.every=1") == json.loads((output / "summary.json").read_text())
    said = capfd.readouterr().err
    assert "mpl_scale.logging.every: 2 -> 1" in said
    assert "is finished: nothing is trained" in said
    assert content_of(output) == before


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_finished_run_is_refused_once_its_files_have_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where names, labels and counts are the same; moving all of them is no change."""
    root = write_folder(tmp_path / "images", classes=10, images=12)
    raw = json.loads(Path(make_config(tmp_path)).read_text())
    raw["mpl_scale"]["data"] |= {"source": "folder", "root": str(root)}
    config, output = write(tmp_path, raw), tmp_path / "out"
    done = run(config, output)
    assert run(config, output) == done
    moved = root.rename(tmp_path / "moved")
    assert run(config, output, f"mpl_scale.data.root={moved}") == done
    swap(moved / "class0" / "0.png", moved / "class1" / "0.png")
    with pytest.raises(ValueError, match="--output"):
        run(config, output, f"mpl_scale.data.root={moved}")
    assert "data.files: " in capfd.readouterr().err
    assert json.loads((output / "summary.json").read_text()) == done


def test_a_damaged_summary_is_named(finished: tuple[str, Path], tmp_path: Path) -> None:
    config, output = finished
    shutil.copytree(output, tmp_path / "out")
    for content in ("[]", "{", "{}"):
        (tmp_path / "out" / "summary.json").write_text(content)
        with pytest.raises(ValueError, match=r"summary\.json: .*delete DONE"):
            run(config, tmp_path / "out")


def test_a_finished_run_without_checkpoints_is_not_overwritten(finished: tuple[str, Path], tmp_path: Path) -> None:
    config, output = finished
    shutil.copytree(output, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(ValueError, match="its checkpoints are gone"):
        run(config, tmp_path / "out", "mpl_scale.seed=3")
    assert (tmp_path / "out" / "DONE").exists()


def test_more_training_steps_after_the_finetuning_equal_an_uninterrupted_run(
    finished: tuple[str, Path], tmp_path: Path
) -> None:
    """Bitwise: weights, results, metrics. The checkpoints of the first finetuning are gone."""
    config, before = finished
    output, longer = tmp_path / "out", "mpl_scale.phases.train.steps=12"
    shutil.copytree(before, output)
    old = json.loads((output / "summary.json").read_text())
    assert run(config, output, longer, stop_after=2) is None
    assert not (output / "summary.json").exists()  # of 8 steps, and config.json says 12
    assert load_config(output / "config.json").mpl.phases.train.steps == 12
    assert find(output / "checkpoints")[0].name == "step_00000014"
    extended = run(config, output, longer)
    whole = run(config, tmp_path / "whole", longer)
    assert extended["results"] == whole["results"]
    assert extended["steps"] == whole["steps"] == 20
    expected, found = final_state(tmp_path / "whole"), final_state(output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert lines(output) == lines(tmp_path / "whole")
    assert whole["history"] == []
    (entry,) = extended["history"]
    assert (entry["phase"], entry["step"], entry["results"]) == ("train", 8, old["results"])
    assert entry["changed"] == {"mpl_scale.phases.train.steps": [8, 12]}


def test_a_phase_whose_checkpoints_are_gone_is_not_reopened(tmp_path: Path) -> None:
    config, output = make_config(tmp_path, keep=1), tmp_path / "out"
    run(config, output)
    before = content_of(output)
    with pytest.raises(ValueError, match=r"no checkpoint of phase train is kept; .*checkpoint\.keep_every"):
        run(config, output, "mpl_scale.phases.train.steps=12")
    newest = find(output / "checkpoints")[0]
    with pytest.raises(ValueError, match="give a checkpoint of phase train"):
        run(config, output, "mpl_scale.phases.train.steps=12", resume=str(newest))
    assert content_of(output) == before


def test_what_changed_on_the_way_is_in_the_summary(tmp_path: Path) -> None:
    config, output, rate = make_config(tmp_path), tmp_path / "out", "mpl_scale.optim.student.lr"
    first = load_config(config).mpl.optim.student.lr
    assert run(config, output, stop_after=6) is None
    assert run(config, output, f"{rate}=0.5", stop_after=3) is None
    assert run(config, output, f"{rate}=0.5", stop_after=1) is None  # nothing changed
    with pytest.raises(ValueError, match=r"labelled_per_class: 4 -> 3|splits\.labelled: "):
        run(config, output, f"{rate}=0.5", "mpl_scale.data.labelled_per_class=3")
    summary = run(config, output, f"{rate}=0.5", "mpl_scale.phases.finetune.optim.lr=0.1")
    assert [(entry["phase"], entry["step"], entry["changed"]) for entry in summary["history"]] == [
        ("train", 2, {rate: [first, 0.5]}),
        ("train", 6, {"mpl_scale.phases.finetune.optim.lr": [0.002, 0.1]}),
    ]
