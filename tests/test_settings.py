"""Values that no run can use are refused when the file is read; settings without effect are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpl_scale.config import check, load_config
from mpl_scale.config.deepspeed_half import without_effect
from mpl_scale.config.unused import unused_settings
from mpl_scale.trainer.preflight import check_names
from tests.support.configs import DIGITS, tiny, write

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
}


@pytest.mark.parametrize("override", REFUSED)
def test_values_that_no_run_can_use(override: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[override]) as caught:
        check(load_config(DIGITS, overrides=[override]), world=1, cuda=False)
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
    "mpl_scale.method.freematch.decay=0.5": "method.freematch.decay (no loss is freematch)",
    "mpl_scale.guard.max_skipped=3": "guard.max_skipped (nonfinite = stop)",
}


@pytest.mark.parametrize("override", WITHOUT_EFFECT)
def test_settings_without_effect_are_named(tmp_path: Path, override: str) -> None:
    (note,) = load_config(write(tmp_path, tiny()), overrides=[override]).notes
    assert note.endswith(f"no effect here: mpl_scale.{WITHOUT_EFFECT[override]}")


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
    assert unused_settings(run.mpl, {"data": {"strong": {"preset": "released_code"}}}) == []


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
