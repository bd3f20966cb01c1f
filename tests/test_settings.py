"""Values that no run can use are refused when the file is read; settings without effect are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpl_scale.config import check, load_config, readers
from mpl_scale.config.deepspeed_half import without_effect
from mpl_scale.config.unused import unused_settings
from mpl_scale.data.decode.views import WEAK_VIEWS
from mpl_scale.data.samples.splits import SPLITS
from mpl_scale.mpl import FEEDBACK_RULES, LOSSES, METHODS
from mpl_scale.optim import OPTIMIZERS
from mpl_scale.trainer.preflight import check_names
from tests.support.configs import DIGITS, tiny, write

OPS = tiny()["mpl_scale"]["data"]["strong"]["ops"]
OF_LOSSES = "name = mpl, teacher_loss = uda, phases.teacher_warmup.steps = 4"
REFUSED = {
    "mpl_scale.data.weak.scale=[0.9, 0.1]": "scale = .* upside down",
    "mpl_scale.data.weak.ratio=[2, 0.5]": "ratio = .* upside down",
    "mpl_scale.data.strong.num_ops=1000": "less than or equal to 16",
    "mpl_scale.data.weak.pad=99": r"weak\.pad = 99 pixels with .*image_size = 8",
    "mpl_scale.data.strong.cutout=9": r"strong\.cutout = 9 pixels",
    "mpl_scale.data.strong.crop_pad=9": r"strong\.crop_pad = 9 pixels",
    "mpl_scale.data.threads=1000000": "less than or equal to 1024",
    "mpl_scale.data.prefetch=1000": "less than or equal to 64",
    "mpl_scale.model.num_classes=10000000000": "less than or equal to",
    "mpl_scale.model.image_size=1000000": "less than or equal to",
    "mpl_scale.parallel.timeout_seconds=1e30": "timeout_seconds = 1e.30",
    "mpl_scale.parallel.timeout_seconds=1e-9": "timeout_seconds = 1e-09",
    "mpl_scale.guard.hang_seconds=1e-9": "hang_seconds = 1e-09",
    "mpl_scale.checkpoint.timeout_seconds=1e12": "timeout_seconds",
    "mpl_scale.phases.train.steps=10000000000000000000000": "less than",
    f"mpl_scale.model.teacher.kwargs={'[' * 60}{']' * 60}": "nested more than 50 levels",
    f"mpl_scale.model.teacher.kwargs={'[' * 100000}": "nested more than 50 levels",
    "comet.mode=appnd": "must be one of get, create, get_or_create",
    "mpl_scale.model.bn_decay=1": "bn_decay = 1: .* never move",
    "mpl_scale.method.feedback.baseline_decay=1": "baseline_decay = 1: .* never move",
    "mpl_scale.data.label_offset=1": "label_offset = 1 has no effect with source digits",
    "mpl_scale.data.index=somewhere": "index = 'somewhere' .* source digits",
    'mpl_scale.imports=["no_such_module"]': "imports = 'no_such_module': ModuleNotFoundError",
}


@pytest.mark.parametrize("override", REFUSED)
def test_values_that_no_run_can_use(override: str) -> None:
    def checked() -> None:
        run = load_config(DIGITS, overrides=[override])
        check(run, world=1, cuda=False)
        check_names(run)

    with pytest.raises(ValueError, match=REFUSED[override]) as caught:
        checked()
    assert "\n" not in str(caught.value)


def test_a_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    for depth in (60, 100_000):
        path = tmp_path / "deep.json"
        path.write_text('{"a": ' * depth + "1" + "}" * depth)
        with pytest.raises(ValueError, match="nested more than 50 levels"):
            load_config(path)


WITHOUT_EFFECT = {
    "mpl_scale.model.student.new_classifier=true": "model.student.new_classifier (weights = null)",
    "mpl_scale.model.teacher.init_range=0.5": "model.teacher.init_range (init = default)",
    "mpl_scale.data.held_out_shards=3": "data.held_out_shards (split = stratified)",
    "mpl_scale.data.labelled_fraction=0.5": "data.labelled_fraction (split = stratified)",
    "mpl_scale.data.weak.scale=[0.5, 1.0]": "data.weak.scale (kind = shift_crop)",
    "mpl_scale.data.evaluation.crop_pct=0.5": "data.evaluation.crop_pct (kind = resize)",
    "mpl_scale.optim.student.rho=0.5": "optim.student.rho (name = sgd)",
    "mpl_scale.optim.teacher.decay_rate=0.5": "optim.teacher.decay_rate (schedule = cosine)",
    "mpl_scale.parallel.halo=block_input": "parallel.halo (width = 1)",
    "mpl_scale.checkpoint.timeout_seconds=7": "checkpoint.timeout_seconds (asynchronous = false)",
    "mpl_scale.method.freematch.decay=0.5": "method.freematch.decay "
    "(method.name = mpl, method.teacher_loss = uda, phases.teacher_warmup.steps = 4)",
    "mpl_scale.guard.max_skipped=3": "guard.max_skipped (nonfinite = stop)",
    "mpl_scale.data.allow_damaged_shards=true": "data.allow_damaged_shards (source = digits, unlabelled_index = null)",
    "mpl_scale.data.distributions=d.npy": "data.distributions (method.name = mpl)",
    "mpl_scale.data.strong.rotate=3": f"data.strong.rotate (ops = {json.dumps(OPS)})",
    "mpl_scale.method.mixup_alpha=0.3": f"method.mixup_alpha ({OF_LOSSES})",
    "mpl_scale.method.pseudo_label_threshold=0.5": f"method.pseudo_label_threshold ({OF_LOSSES})",
    "mpl_scale.method.feedback.derivative=jvp": "method.feedback.derivative (rule = cosine)",
    "mpl_scale.parallel.recompute_offload=true": "parallel.recompute_offload (recompute = none)",
}


@pytest.mark.parametrize("override", WITHOUT_EFFECT)
def test_settings_without_effect_are_named(tmp_path: Path, override: str) -> None:
    (note,) = load_config(write(tmp_path, tiny()), overrides=[override]).notes
    assert note.endswith(f"no effect here: mpl_scale.{WITHOUT_EFFECT[override]}")


WARMUP = "mpl_scale.phases.teacher_warmup.steps=4"
UNREAD = {
    "supervised": "method.uda.weight method.feedback.weight method.teacher_loss data.unlabelled_ratio "
    "data.strong.cutout method.student_label_smoothing method.supervised_weight optim.teacher.momentum",
    "mixup": "method.uda.weight method.feedback.weight method.teacher_loss data.unlabelled_ratio data.strong.cutout "
    "method.student_label_smoothing optim.teacher.momentum",
    "uda": "method.feedback.weight method.teacher_loss method.student_label_smoothing optim.teacher.momentum",
    "noisy_student": "method.feedback.weight",
    "mpl": "",
}
"""Of the settings below, those that a method does not read; its teacher is trained in the warm-up."""
GIVEN = {
    "method.uda.weight": 3.0,
    "method.feedback.weight": 2.0,
    "method.teacher_loss": "pseudo_label",
    "method.student_label_smoothing": 0.1,
    "method.supervised_weight": 0.5,
    "data.unlabelled_ratio": 2,
    "data.strong.cutout": 3,
    "optim.teacher.momentum": 0.5,
}


@pytest.mark.parametrize("method", UNREAD)
def test_what_a_method_does_not_read_is_named(method: str) -> None:
    overrides = [f"mpl_scale.{field}={value}" for field, value in GIVEN.items()]
    notes = load_config(DIGITS, overrides=[*overrides, f"mpl_scale.method.name={method}", WARMUP]).notes
    named = {field for field in GIVEN if any(f"mpl_scale.{field}" in note for note in notes)}
    assert named == set(UNREAD[method].split())


@pytest.mark.parametrize(("method", "preset"), [("uda", "exact"), ("uda", "paper"), ("mpl", "exact")])
def test_a_preset_that_no_method_reads_is_named(method: str, preset: str) -> None:
    notes = load_config(
        DIGITS, overrides=[f"mpl_scale.method.name={method}", f"mpl_scale.method.preset={preset}"]
    ).notes
    named = any("no effect here: mpl_scale.method.preset (name = uda, preset = exact)" in note for note in notes)
    assert named == (method == "uda" and preset == "exact")


def test_the_table_names_what_is_registered() -> None:
    for known, registry in (
        (readers.METHODS, METHODS),
        (readers.LOSSES, LOSSES),
        (readers.RULES, FEEDBACK_RULES),
        (readers.OPTIMIZERS, OPTIMIZERS),
        (readers.SPLITS, SPLITS),
        (readers.WEAK_VIEWS, WEAK_VIEWS),
    ):
        assert set(known) <= registry.keys()


def test_what_a_variant_inherits_is_not_named(tmp_path: Path) -> None:
    """The base's settings of UDA serve its other variants; those of the variant itself are judged."""
    write(tmp_path, tiny(), "base.json")
    variant = {
        "include": "base.json",
        "mpl_scale": {"method": {"name": "supervised"}, "phases": {"teacher_warmup": {}}},
    }
    variant["mpl_scale"]["phases"]["teacher_warmup"]["steps"] = 0  # type: ignore[index]
    path = write(tmp_path, variant, "variant.json")
    assert load_config(path).notes == ()
    (note,) = load_config(path, overrides=["mpl_scale.method.uda.weight=3"]).notes
    assert "mpl_scale.method.uda.weight (method.name = supervised" in note


def test_what_two_settings_leave_without_effect(tmp_path: Path) -> None:
    path = write(tmp_path, tiny())
    for given, named in (
        ("checkpoint.every=0 guard.rewind.window=1", "guard.rewind.window (checkpoint.every = 0)"),
        ('parallel.recompute=["none"] parallel.recompute_offload=true', 'recompute_offload (recompute = ["none"])'),
        ("data.weak.pad=0 data.weak.fill=7", "data.weak.fill (kind = shift_crop, pad = 0)"),
    ):
        (note,) = load_config(path, overrides=[f"mpl_scale.{setting}" for setting in given.split()]).notes
        assert note.endswith(named)


TOO_LATE = {
    "optim.student.schedule=step optim.student.milestones=[4,9]": "optim.student.milestones = [4, 9] of 8 steps",
    "optim.teacher.warmup_steps=9": "optim.teacher.warmup_steps = 9 of 8 steps",
    "optim.student.warmup_steps=7 method.student_wait_steps=2": "optim.student.warmup_steps = 7 of 6 steps",
    "optim.student.schedule=exponential": "optim.student.decay_steps = 750 of 8 steps",
    "method.uda.ramp_steps=8": "method.uda.ramp_steps = 8 of 8 steps",
    "phases.train.evaluate_every=9": "phases.train.evaluate_every = 9 of 8 steps",
    "phases.finetune.optim.warmup_steps=5": "phases.finetune.optim.warmup_steps = 5 of 4 steps",
    "guard.rewind={}": "guard.rewind.window = 20 of 4 lines of metrics",
}


@pytest.mark.parametrize("given", TOO_LATE)
def test_steps_beyond_the_last_one_are_named(tmp_path: Path, given: str) -> None:
    overrides = [f"mpl_scale.{setting}" for setting in given.split()]
    (note,) = load_config(write(tmp_path, tiny()), overrides=overrides).notes
    assert note.endswith(f"the run is too short for mpl_scale.{TOO_LATE[given]}")


def test_modules_that_register_nothing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "idle_module.py").write_text("import mpl_scale.optim\n")
    (tmp_path / "busy_module.py").write_text(
        "from mpl_scale.optim.optimizers import OPTIMIZERS\nOPTIMIZERS.register('of_busy_module')(object)\n"
    )
    (tmp_path / "outer_module.py").write_text("import busy_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):  # the second time they are imported already
        modules = ["os.path", "idle_module", "busy_module", "outer_module"]
        (note,) = load_config(DIGITS, overrides=[f"mpl_scale.imports={json.dumps(modules)}"]).notes
        assert note.endswith("no effect here: mpl_scale.imports = os.path, idle_module (registers nothing)")
    OPTIMIZERS.pop("of_busy_module")


def test_a_default_that_is_written_out_asks_for_nothing(tmp_path: Path) -> None:
    """So the resolved configuration beside a run says nothing new when it is loaded."""
    run = load_config(write(tmp_path, tiny()))
    (tmp_path / "resolved.json").write_text(json.dumps(run.resolved()))
    assert load_config(tmp_path / "resolved.json").notes == run.notes == ()


def test_what_a_users_own_names_read_is_not_judged(tmp_path: Path) -> None:
    own = ["mpl_scale.data.split=mine", "mpl_scale.optim.student.name=mine", "mpl_scale.data.weak.kind=mine"]
    own += ["mpl_scale.method.teacher_loss=mine", "mpl_scale.method.softmatch.decay=0.5"]
    run = load_config(
        write(tmp_path, tiny()),
        overrides=[*own, "mpl_scale.data.test_fraction=0.2", "mpl_scale.optim.student.rho=0.5"],
    )
    assert run.notes == ()


def test_a_preset_asks_for_nothing_itself() -> None:
    run = load_config(DIGITS, overrides=["mpl_scale.data.strong.preset=released_code"])
    assert unused_settings(run.mpl, [{"data": {"strong": {"preset": "released_code"}}}]) == []


def test_keys_of_stage_3_at_another_stage() -> None:
    keys = {"stage3_max_live_parameters": 1, "prefetch_bucket_size": 5}
    for flat in (True, False):
        (line,) = without_effect({"zero_optimization": {"stage": 2, **keys}}, flat=flat)
        assert all(f"zero_optimization.{key}" in line for key in keys)
        assert "stage = 2" in line
    assert without_effect({"zero_optimization": {"stage": 3, **keys}}, flat=False) == []


def test_noise_of_vectors_for_a_source_of_images() -> None:
    with pytest.raises(ValueError, match=r"data\.jitter = 0\.5 has no effect with source digits"):
        check_names(load_config(DIGITS, overrides=["mpl_scale.data.jitter=0.5"]))
