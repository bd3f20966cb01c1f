"""Weights from elsewhere: by `weights` and never by kwargs, with a new classifier where asked for or announced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpl_scale.config import RunConfig, check, load_config
from mpl_scale.config.model_kwargs import REFUSED
from mpl_scale.models import build_model
from mpl_scale.models.registry import register_model
from mpl_scale.models.weights import load_weights, plain_model
from mpl_scale.trainer.preflight import check_models, network_notes
from tests.support.configs import tiny, write


def run_with(folder: Path, *overrides: str, **student: Any) -> RunConfig:
    raw = tiny()
    raw["mpl_scale"]["model"]["student"] |= student
    raw["mpl_scale"]["model"]["bn_decay"] = 0.2  # of runs as short as these
    return load_config(write(folder, raw), overrides=overrides)


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("network", ["teacher", "student"])
def test_kwargs_that_defeat_the_trainer_are_refused_with_the_fix(tmp_path: Path, network: str, key: str) -> None:
    run = run_with(tmp_path, f"mpl_scale.model.{network}.kwargs.{key}=1")
    with pytest.raises(ValueError, match=rf"^mpl_scale\.model\.{network}\.kwargs\.{key} = 1: .*(set|remove)"):
        check(run, world=1, cuda=False)


def test_a_builder_that_loads_trained_statistics_keeps_its_function(tmp_path: Path) -> None:
    """Variances near eps: with our eps of 1e-3 instead of its 1e-5 the outputs would be others altogether."""
    trained = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    with torch.no_grad():
        trained[1].running_var.uniform_(1e-4, 1e-2)
        trained[1].running_mean.normal_()

    @register_model("test_pretrained_builder")
    def builder(*, num_classes: int) -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )
        model.load_state_dict(trained.state_dict())
        return model

    run = run_with(tmp_path, name="test_pretrained_builder", kwargs={}, dropout=0.0).mpl.model
    images = torch.randn(4, 3, 8, 8)
    ours = build_model(run.student, run, field="student", seed=0).eval()
    torch.testing.assert_close(ours(images), trained.eval()(images), rtol=1e-4, atol=1e-4)  # fp32, variances of 1e-4


def weights_of(folder: Path, classes: int, **network: Any) -> dict[str, torch.Tensor]:
    """model.safetensors of the tiny student with another number of classes."""
    shared = run_with(folder, f"mpl_scale.model.num_classes={classes}", **network).mpl.model
    torch.manual_seed(1)
    state = plain_model(shared.student, shared, field="student", device="cpu").state_dict()
    save_file(state, folder / "model.safetensors")
    return state


@pytest.mark.parametrize("network", [{}, {"name": "resnet10t", "kwargs": {}}], ids=["ours", "timm"])
def test_weights_of_other_classes_start_with_a_new_classifier_and_a_warning(
    tmp_path: Path, network: dict[str, Any]
) -> None:
    state = weights_of(tmp_path, 7, **network)
    run = run_with(tmp_path, weights=str(tmp_path), **network)
    check_models(run)
    (note,) = network_notes(run)
    head = {"classifier.weight", "classifier.bias"} if not network else {"fc.weight", "fc.bias"}
    assert note.endswith(
        f"tensors loaded; its classifier ({', '.join(sorted(head)[::-1])}; of 7 classes in the file) starts untrained"
    )
    shared = run.mpl.model
    fresh, loaded = (build_model(shared.student, shared, field="student", seed=3) for _ in range(2))
    load_weights(loaded, shared.student, shared, field="student")
    initial, found = fresh.state_dict(), loaded.state_dict()
    for key, value in found.items():
        if "running_var" not in key:  # moved by the difference of eps
            assert torch.equal(value, initial[key] if key in head else state[key]), key
    with pytest.raises(ValueError, match=r"weight is \[7, .*the model has \[10"):
        check_models(
            run_with(tmp_path, "mpl_scale.model.student.new_classifier=false", weights=str(tmp_path), **network)
        )


def test_a_new_classifier_can_be_asked_for(tmp_path: Path) -> None:
    state = weights_of(tmp_path, 10)
    settings = ("mpl_scale.model.student.new_classifier=true",)
    shared = run_with(tmp_path, weights=str(tmp_path)).mpl.model
    run = run_with(tmp_path, *settings, weights=str(tmp_path))
    kept, renewed = (build_model(shared.student, shared, field="student", seed=3) for _ in range(2))
    load_weights(kept, shared.student, shared, field="student")
    load_weights(renewed, run.mpl.model.student, run.mpl.model, field="student")
    assert torch.equal(kept.state_dict()["classifier.weight"], state["classifier.weight"])
    assert not torch.equal(renewed.state_dict()["classifier.weight"], state["classifier.weight"])
    assert "new_classifier = true) starts untrained" in network_notes(run)[0]
    (whole,) = network_notes(run_with(tmp_path, weights=str(tmp_path)))
    assert re.fullmatch(rf"mpl_scale\.model\.student\.weights = {tmp_path}: (\d+) of \1 tensors loaded", whole)


def test_a_new_classifier_is_not_frozen(tmp_path: Path) -> None:
    weights_of(tmp_path, 7)
    frozen = 'mpl_scale.model.student.frozen=["{}"]'
    check_models(run_with(tmp_path, frozen.format("features"), weights=str(tmp_path)))
    with pytest.raises(ValueError, match=r"frozen = \['classifier'\] holds the classifier .* take it out of frozen"):
        check_models(run_with(tmp_path, frozen.format("classifier"), weights=str(tmp_path)))


def test_a_teacher_that_is_not_trained_needs_its_classifier(tmp_path: Path) -> None:
    weights_of(tmp_path, 7)
    raw = tiny()
    raw["mpl_scale"]["model"]["teacher"]["weights"] = str(tmp_path)
    raw["mpl_scale"]["method"] = {"name": "pseudo_label"}
    raw["mpl_scale"]["phases"]["teacher_warmup"]["steps"] = 0
    path = write(tmp_path, raw)
    with pytest.raises(ValueError, match="leaves the teacher a new classifier, and method pseudo_label does not train"):
        check_models(load_config(path))
    check_models(load_config(path, overrides=["mpl_scale.phases.teacher_warmup.steps=4"]))


def test_a_tag_of_timms_does_not_pass_for_weights(tmp_path: Path) -> None:
    run = run_with(tmp_path, name="resnet10t.c3_in1k", kwargs={})
    with pytest.raises(
        ValueError,
        match=r"student.name = 'resnet10t.c3_in1k': .c3_in1k names weights .*set it to timm or .*= resnet10t",
    ):
        check_models(run)


def test_wrong_kwargs_beside_weights_are_one_error(tmp_path: Path) -> None:
    weights_of(tmp_path, 10)
    run = run_with(tmp_path, weights=str(tmp_path), kwargs={"depth": 3})
    with pytest.raises(ValueError, match=r"student\.kwargs: digits_cnn cannot be built with"):
        check_models(run)
    assert json.loads(json.dumps(run.resolved()))["mpl_scale"]["model"]["student"]["new_classifier"] == "auto"
