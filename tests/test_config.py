"""Wrong configurations: one line that names the field and the fix, before anything expensive."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mpl_scale.config import check, load_config
from mpl_scale.config.presets import PRESETS
from mpl_scale.config.schema import Config, FeedbackConfig, MethodConfig
from mpl_scale.resolve import resolve
from tests.support.configs import DIGITS, tiny, write


def load_and_check(tmp_path: Path, overrides: list[str], world: int = 2, **top_level: Any) -> None:
    check(load_config(write(tmp_path, tiny(**top_level)), overrides=overrides), world=world, cuda=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gradient_clipp1ng=1"], r'unknown key "gradient_clipp1ng"; did you mean gradient_clipping'),
        (["zero_optimization.stagee=1"], r'unknown key "zero_optimization.stagee"; did you mean stage'),
        (
            ["zero_optimization.offload_optimizer.devise=cpu"],
            r'"zero_optimization.offload_optimizer.devise"; did you mean',
        ),
        (["csv_monitor.path=x"], r'unknown key "csv_monitor.path"'),
        (["zero_optimization.overlap_com=true"], r"did you mean overlap_comm"),
        (["zero_optimization=true"], r"zero_optimization = True: must be a section"),
        (["mpl_scale.methood.name=mpl"], r'unknown key "mpl_scale.methood"; did you mean method'),
        (["mpl_scale.method.uda.temprature=1"], r'"mpl_scale.method.uda.temprature"; did you mean temperature'),
        (['mpl_scale.seed="one"'], r"mpl_scale.seed = 'one': input should be a valid integer"),
        (["mpl_scale.optim.student.lr=-1"], r"mpl_scale.optim.student.lr = -1: input should be greater than"),
        (["mpl_scale.optim.student.momentum=true"], r"momentum = True: input should be a valid number"),
        (["mpl_scale.method.pseudo_labels=hardd"], r"pseudo_labels = 'hardd': input should be 'sampled', 'argmax'"),
        (["optimizer.type=Adam"], r"optimizer: .*mpl_scale.optim"),
        (["fp16.enabled=true"], r"fp16: .*bf16"),
        (["train_batch_size=41"], r"batch equation broken: train_batch_size 41 != .* x data ranks 2"),
        (["train_micro_batch_size_per_gpu=7"], r"40 != train_micro_batch_size_per_gpu 7 x .*_steps 2 x data"),
        (["train_batch_size=0"], r"train_batch_size = 0: must be at least 1"),
        (["gradient_accumulation_steps=3"], r"40 != train_micro_batch_size_per_gpu 6 x .*_steps 3 x"),
        (
            ["mpl_scale.parallel.width=3"],
            r"width = 3 does not divide the 2 ranks; .*mpl-scale plan --ds_config .*--gpus 2",
        ),
        (
            ["mpl_scale.parallel.width=2", "mpl_scale.model.image_size=1"],
            r"parallel.width = 2 ranks for mpl_scale.model.image_size = 1 columns",
        ),
        (
            ["mpl_scale.parallel.recompute=full"],
            r"mpl_scale.parallel.recompute = 'full': input should be 'none', .*k'$",
        ),
        (['mpl_scale.parallel.recompute=["x"]'], r"mpl_scale.parallel.recompute.0 = 'x': input should be 'none'"),
        (["mpl_scale.parallel.halo=wide"], r"mpl_scale.parallel.halo = 'wide': input should be 'plain' or"),
        (["mpl_scale.parallel.shard_size=4"], r"shard_size = 4 does not divide the 2 ranks"),
        (
            ["zero_optimization.stage=3", "mpl_scale.parallel.graph=required"],
            r"graph = required.*stage = 3.*use stage 2",
        ),
        (["zero_optimization.stage=3", "mpl_scale.parallel.engine=flat"], r"engine = flat with .*stage = 3"),
        (["mpl_scale.method.pseudo_labels=soft"], r"feedback.rule = cosine with pseudo_labels = soft.*soft_exact"),
        (["mpl_scale.method.feedback.rule=soft_exact"], r"soft_exact needs pseudo_labels = soft"),
        (
            [
                "mpl_scale.method.feedback.rule=per_sample",
                "bf16.enabled=true",
                "mpl_scale.method.feedback.derivative=difference",
            ],
            r"per_sample with bf16: its central difference .*derivative = jvp",
        ),
        (
            ["mpl_scale.method.name=pseudo_label", "mpl_scale.phases.teacher_warmup.steps=0"],
            r"pseudo_label needs a trained teacher",
        ),
        (["mpl_scale.method.student_wait_steps=8"], r"student_wait_steps = 8 leaves the student no step"),
        (["mpl_scale.phases.finetune.batch_size=7"], r"finetune.batch_size = 7 does not divide over 2 .*use 8"),
        (["mpl_scale.data.std=[0.5, 0, 0.5]"], r"mpl_scale.data.std = .* from 0.001 to 1;"),
        (["mpl_scale.phases.train.steps"], r"--set mpl_scale.phases.train.steps: write it as"),
        (["train_batch_size.x=1"], r"--set train_batch_size.x=1: train_batch_size is a value, not a section"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_one_clear_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_and_check(tmp_path, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"run.json:1:2: not JSON"),
        ("[]", r"top level must be a JSON object"),
        ('{"train_batch_size": 8, "train_batch_size": 9}', r'key "train_batch_size" stands twice'),
        ('{"train_batch_size": 8}', r'there is no "mpl_scale" section'),
        ('{"mpl_scale": {}}', r"mpl_scale.model is missing"),
        ("\x00", r"not JSON"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_a_missing_file_suggests_a_near_one(tmp_path: Path) -> None:
    write(tmp_path, tiny(), "digits.json")
    with pytest.raises(ValueError, match=r"no such file; did you mean .*digits.json"):
        load_config(tmp_path / "digit.json")


def test_batch_arithmetic_uses_data_ranks(tmp_path: Path) -> None:
    batches = check(load_config(write(tmp_path, tiny())), world=4, cuda=False)
    assert (batches.labelled, batches.labelled_per_rank, batches.unlabelled, batches.data_ranks) == (40, 10, 40, 4)
    assert "40 = train_micro_batch_size_per_gpu 10 x data ranks 4" in batches.equation()


def test_the_resolved_config_loads_to_itself(tmp_path: Path) -> None:
    first = load_config(DIGITS, overrides=["mpl_scale.method.uda.weight=3"])
    path = tmp_path / "resolved.json"
    path.write_text(json.dumps(first.resolved()))
    second = load_config(path)
    assert second.mpl == first.mpl
    assert second.deepspeed == first.deepspeed
    assert second.mpl.method.uda.weight == 3


def with_feedback(folder: Path, feedback: dict[str, Any]) -> FeedbackConfig:
    """Loaded from a whole configuration as an earlier version wrote it beside a run."""
    resolved = load_config(DIGITS).resolved()
    resolved["mpl_scale"]["method"]["feedback"] |= feedback
    return load_config(write(folder, resolved)).mpl.method.feedback


def test_the_feedback_of_earlier_versions_loads(tmp_path: Path) -> None:
    """Their defaults say what is done now; the port's settings are a rule, which has the sign that a weight turned."""
    plain = with_feedback(tmp_path, {"old_loss": "own_pass", "target": "pseudo_labels"})
    assert plain == load_config(DIGITS).mpl.method.feedback
    port = {"rule": "loss_difference", "weight": -0.5, "old_loss": "update_pass", "target": "strong_argmax"}
    migrated = with_feedback(tmp_path, port)
    assert (migrated.rule, migrated.weight) == ("kekmodel", 0.5)


def test_the_finetuning_of_earlier_versions_loads_with_a_note_and_is_refused_beside_the_new_name(
    tmp_path: Path,
) -> None:
    raw = tiny()
    former = {"steps": 4, "optimizer": "lars", "lr": 0.5, "momentum": 0.1, "trust": 0.2}
    raw["mpl_scale"]["phases"]["finetune"] = former
    found = load_config(write(tmp_path, raw))
    optim = found.mpl.phases.finetune.optim
    assert (optim.name, optim.lr, optim.momentum, optim.trust, optim.schedule) == ("lars", 0.5, 0.1, 0.2, "constant")
    assert len(found.notes) == 4
    warnings = resolve(found, world=1, device="cpu").warnings
    assert any("finetune.optimizer is now mpl_scale.phases.finetune.optim.name" in line for line in warnings)
    assert load_config(write(tmp_path, found.resolved())) == replace(found, notes=())
    former["optim"] = {"lr": 0.5}
    with pytest.raises(ValueError, match=r"finetune\.lr = 0.5 is now mpl_scale\.phases\.finetune\.optim\.lr.*remove"):
        load_config(write(tmp_path, raw))


@pytest.mark.parametrize(
    "feedback",
    [
        {"rule": "cosine", "target": "strong_argmax"},
        {"rule": "loss_difference", "old_loss": "update_pass"},
        {"rule": "kekmodel", "target": "pseudo_labels"},
    ],
)
def test_settings_of_half_the_ports_feedback_are_refused(tmp_path: Path, feedback: dict[str, Any]) -> None:
    (field,) = feedback.keys() - {"rule"}
    with pytest.raises(ValueError, match=rf"feedback\.{field} = .*: no longer a field; remove it, or set .* kekmodel"):
        with_feedback(tmp_path, feedback)


def test_the_ports_feedback_needs_the_labelled_images_in_the_update_pass(tmp_path: Path) -> None:
    changes = ["mpl_scale.method.feedback.rule=kekmodel", "mpl_scale.method.student_sees_labelled=false"]
    with pytest.raises(ValueError, match=r"rule = kekmodel .* set mpl_scale.method.student_sees_labelled = true"):
        check(load_config(write(tmp_path, tiny()), overrides=changes), world=1, cuda=False)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_give_way_to_what_is_written(tmp_path: Path, name: str) -> None:
    raw = tiny()
    raw["mpl_scale"]["method"] = {"preset": name, "student_wait_steps": 0, "uda": {"weight": 0.25}}
    method = load_config(write(tmp_path, raw)).mpl.method
    assert method.uda.weight == 0.25
    assert method.pseudo_labels == PRESETS[name]["pseudo_labels"]
    assert method.feedback.rule == PRESETS[name]["feedback"]["rule"]
    assert MethodConfig.model_validate(PRESETS[name])


def test_the_exact_preset_runs_as_it_is_and_as_its_control() -> None:
    """On a config of the paper's preset; h = 0 keeps the soft labels."""
    exact = ["mpl_scale.method.preset=exact"]
    for rule, overrides in (("soft_exact", exact), ("none", [*exact, "mpl_scale.method.feedback.rule=none"])):
        run = load_config(DIGITS, overrides=overrides)
        check(run, world=1, cuda=False)
        assert (run.mpl.method.pseudo_labels, run.mpl.method.feedback.rule) == ("soft", rule)
        assert run.notes == ()


def test_every_field_with_a_description_or_a_docstring_is_closed() -> None:
    """Frozen and closed to unknown keys, all the way down."""

    def visit(model: type[BaseModel]) -> None:
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["frozen"]
        for info in model.model_fields.values():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                visit(info.annotation)

    visit(Config)


def test_all_shipped_configs_load() -> None:
    paths = sorted(DIGITS.parent.glob("*.json"))
    assert paths
    for path in paths:
        load_config(path)


@pytest.mark.parametrize("name", ["l2", "b6_wide"])
@pytest.mark.parametrize("world", [1, 8])
def test_a_config_for_other_ranks_names_the_file_for_these(name: str, world: int) -> None:
    folder = DIGITS.parent
    run = load_config(folder / f"{name}.json")
    with pytest.raises(ValueError, match=r"mpl_scale.parallel.width = 16 does not divide the") as caught:
        check(run, world=world, cuda=True)
    other = folder / f"{name}_{world}gpu.json"
    assert str(caught.value).endswith(f"; {other} can run on {world} rank{'s' if world > 1 else ''}")
    check(load_config(other), world=world, cuda=True)


def test_another_experiment_is_not_named_as_the_file_for_these_ranks(tmp_path: Path) -> None:
    base = tiny()
    base["mpl_scale"]["parallel"] = {"width": 4}
    path = write(tmp_path, base, "a.json")
    layout = {"parallel": {"width": 1}}
    write(tmp_path, {"include": "a.json", "mpl_scale": {**layout, "method": {"name": "uda"}}}, "a_uda.json")
    write(tmp_path, {"include": "a.json", "mpl_scale": {"parallel": {"width": 8}}}, "a_wider.json")
    with pytest.raises(ValueError, match="looks for a layout"):
        check(load_config(path), world=1, cuda=False)
    write(tmp_path, {"include": "a.json", "mpl_scale": layout}, "a_whole.json")
    with pytest.raises(ValueError, match=r"; [^ ]*a_whole.json can run on 1 rank$"):
        check(load_config(path), world=1, cuda=False)
