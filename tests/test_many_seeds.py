"""The benchmarks behind docs/experiments.md: many seeds as one network are the single runs, and their statistics."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks import digits_table, feedback, one_weight, preregistered, two_moons
from benchmarks.in_memory import CPU, Batches, ImageViews, PointViews, Samples, train
from benchmarks.many_seeds import RULES, Stacked, as_overrides, train_many
from benchmarks.paired import Kept, paired
from benchmarks.small_digits import Digits, make_digits
from mpl_scale.augment import StrongView
from mpl_scale.config import check, load_config
from mpl_scale.data import BatchSpec, TrainLoader, load_images, make_splits
from mpl_scale.mesh import build_mesh
from mpl_scale.mpl import FEEDBACK_RULES
from mpl_scale.trainer.phases import plan_phases
from tests.support.batches import normalised
from tests.support.configs import DIGITS

STEPS = 12
MOONS = DIGITS.with_name("two_moons_uda.json")


def moons(rule: str, **changes: object) -> list[str]:
    soft = {"mpl_scale.method.pseudo_labels": "soft"} if rule == "soft_exact" else {}
    settings = {
        **two_moons.BLIND_SETTING,
        "mpl_scale.method.supervised_weight": 1.0,
        "mpl_scale.method.teacher_loss": "uda",
        "mpl_scale.method.uda.weight": 1.0,
        "mpl_scale.phases.train.steps": STEPS,
        "mpl_scale.method.feedback.rule": rule,
        **soft,
        **changes,
    }
    return as_overrides(settings)


FIXMATCH = {"mpl_scale.method.pseudo_label_threshold": 0.7}


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        *((rule, {}) for rule in sorted(RULES)),
        ("none", {"mpl_scale.method.name": "fixmatch", **FIXMATCH}),
        ("soft_exact", {"mpl_scale.method.teacher_loss": "fixmatch", **FIXMATCH}),
        ("soft_exact", {"mpl_scale.method.feedback.normalise": "credits"}),
    ],
)
def test_one_of_many_seeds_is_the_run_alone(rule: str, changes: dict[str, object]) -> None:
    """A stack of one against the plain run: the same numbers, but for float32 sums of batched products."""
    optim = {f"mpl_scale.optim.{name}.weight_decay": 0.01 for name in ("teacher", "student")}
    run = load_config(two_moons.CONFIG, overrides=moons(rule, **optim, **changes, **{"mpl_scale.seed": 3}))
    results, stacked = train_many(run, [two_moons.make_samples(3)], two_moons.Jittered, seeds=[3])
    alone, weights = train(run, two_moons.make_samples(3), two_moons.Jittered)
    assert results[0]["student_top1"] == pytest.approx(alone["student_top1"], abs=0.2)
    assert stacked.keys() == weights.keys()
    for name in stacked:
        expected = torch.cat([value.flatten() for key, value in weights[name].items() if key.endswith("weight")])
        found = torch.cat([value.detach().flatten() for value in stacked[name].weights])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)  # central differences: 1e-4 of rounding


@pytest.mark.parametrize(("rule", "loss"), [("cosine", "uda"), ("per_sample", "uda"), ("none", "fixmatch")])
def test_seeds_do_not_meet(rule: str, loss: str) -> None:
    """Another neighbour changes nothing; another number of seeds scales no step."""
    run = load_config(two_moons.CONFIG, overrides=moons(rule, **FIXMATCH, **{"mpl_scale.method.teacher_loss": loss}))
    first, second, third = (two_moons.make_samples(seed) for seed in (0, 1, 2))
    trained = [train_many(run, [first, other], two_moons.Jittered, seeds=[0, 1])[1] for other in (second, third)]
    for name in ("teacher", "student"):
        own = [torch.cat([value[0].detach().flatten() for value in stacked[name].weights]) for stacked in trained]
        others = [torch.cat([value[1].detach().flatten() for value in stacked[name].weights]) for stacked in trained]
        torch.testing.assert_close(own[0], own[1], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(others[0], others[1], rtol=1e-3)


def test_the_rules_of_many_seeds_are_gone_afterwards() -> None:
    before = set(FEEDBACK_RULES)
    run = load_config(two_moons.CONFIG, overrides=moons("cosine"))
    train_many(run, [two_moons.make_samples(0)], PointViews, seeds=[0])
    assert set(FEEDBACK_RULES) == before


def test_what_cannot_be_stacked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Conv2d cannot be stacked"):
        Stacked([torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))])
    for loss in ("mixup", "freematch"):
        run = load_config(two_moons.CONFIG, overrides=moons("none", **{"mpl_scale.method.teacher_loss": loss}))
        with pytest.raises(ValueError, match=r"no mixup or thresholds that adapt: they would mix seeds"):
            train_many(run, [two_moons.make_samples(0)], PointViews, seeds=[0])


def test_batches_in_memory_are_the_loaders() -> None:
    """The same digits, order, crops and strong views as through files and DALI, bit by bit."""
    run = load_config(DIGITS, overrides=["mpl_scale.seed=5"])
    config, phase = run.mpl, plan_phases(run.mpl, check(run, world=1, cuda=False), max_steps=None)[0]
    splits = make_splits(load_images(config.data), config=config.data, seed=5)
    batch = BatchSpec(
        image_size=8,
        labelled=phase.labelled,
        unlabelled=phase.unlabelled,
        seed=5,
        stream=phase.index,
        strong_view=StrongView(config.data.strong, seed=5, stream=phase.index),
    )
    loader = TrainLoader(config.data, splits, batch=batch, mesh=build_mesh(device=CPU))
    pixels = [np.array(Image.open(io.BytesIO(splits.images.read(i))).convert("RGB")) for i in range(len(splits.images))]
    labels = torch.from_numpy(np.asarray(splits.images.labels, np.int64))
    samples = Samples(
        inputs=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        labels=labels,
        truth=labels,
        labelled=splits.labelled,
        unlabelled=splits.unlabelled,
        test=splits.test,
    )
    batches = Batches(samples, ImageViews(samples, config, stream=phase.index), phase, seed=5)
    try:
        for step in (0, 1):
            expected, found = normalised(next(loader)), batches(step)
            for name, tensor in expected.tensors().items():
                assert torch.equal(getattr(found, name), tensor), name
    finally:
        loader.close()


def test_paired_statistics() -> None:
    ours, control = [3.0, 5.0, 4.0, 8.0, 6.0], [2.0, 5.0, 1.0, 6.0, 7.0]
    found = paired(ours, control)
    expected = stats.ttest_rel(ours, control)
    interval = expected.confidence_interval(0.95)
    assert found["t_p"] == pytest.approx(expected.pvalue)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((1.0, interval.low, interval.high))
    assert (found["wins"], found["ties"], found["seeds"]) == (3, 1, 5)
    assert found["sign_p"] == pytest.approx(0.625)  # 3 of 4: 2 (1 + 4) / 16
    assert paired([1.0, 2.0], [1.0, 2.0])["t_p"] == 1
    with pytest.raises(ValueError, match="5 and 4 values cannot be paired"):
        paired(ours, control[:4])


def test_a_run_is_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept.jsonl")
    assert kept("a", lambda: {"x": 1.0}) == {"x": 1.0}
    assert Kept(tmp_path / "kept.jsonl")("a", lambda: {"x": 2.0}) == {"x": 1.0}


def test_digits_are_spoilt_as_asked() -> None:
    samples = make_digits(Digits(per_class=20, wrong=0.4, imbalance=0.1), seed=0)
    labels, truth = samples.labels[samples.labelled], samples.truth[samples.labelled]
    assert (labels != truth).sum() == round(0.4 * len(labels))
    counts = np.bincount(truth.numpy())
    assert (counts[0], counts[9]) == (20, 2)
    assert np.all(np.diff(counts) <= 0)
    assert not set(samples.test) & set(samples.unlabelled)
    assert set(samples.labelled) <= set(samples.unlabelled)
    assert torch.equal(samples.labels[samples.test], samples.truth[samples.test])


def test_every_row_of_the_digits_table_runs(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept.jsonl")
    names = list(digits_table.METHODS)
    found = digits_table.run_seed(kept, labels=4, seed=0, steps=4, methods=names)
    assert list(found) == names
    assert all(0 <= digits_table.best(values) <= 100 for values in found.values())
    assert {name for name in names if "finetuned_top1" in found[name]} == {
        name for name in names if name.startswith(("mpl", "reduced"))
    }
    assert any(key.startswith("student_accuracy@") for key in found["mpl over uda"])


@pytest.mark.parametrize("name", sorted(feedback.SETTINGS))
def test_settings_of_the_feedback_search_are_valid(name: str) -> None:
    for rule in feedback.RULES:
        run = feedback.config_of(feedback.SETTINGS[name], rule, weight=0.5)
        assert run.mpl.method.feedback.weight == 0.5
        assert run.mpl.method.teacher_loss != "uda"  # the search is about teachers without a consistency loss


def test_the_setting_that_finds_the_moons_is_a_config() -> None:
    """What the benchmark trains 30 times is what train.py trains once."""
    one, many = load_config(MOONS).resolved(), two_moons.config_of(two_moons.METHODS_SETTING).resolved()
    assert one["mpl_scale"]["data"].pop("jitter") == two_moons.Jittered.jitter
    assert many["mpl_scale"]["data"].pop("jitter") == 0
    assert one["mpl_scale"].pop("paper") != many["mpl_scale"].pop("paper")
    assert one == many


def test_the_figure_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(two_moons.METHODS_SETTING, "mpl_scale.phases.train.steps", 3)
    two_moons.draw(tmp_path / "images" / "moons.png", seed=0, rows=("supervised", "mpl"))
    assert (tmp_path / "images" / "moons.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", preregistered.METHODS)
def test_the_preregistered_methods_share_all_but_themselves(method: str) -> None:
    trial = preregistered.trials()[0]
    uda, own = (preregistered.config_of("digits", name, trial).mpl for name in ("uda", method))
    assert own.method.uda == uda.method.uda
    assert (own.data, own.optim, own.phases) == (uda.data, uda.optim, uda.phases)
    if method in preregistered.FEEDBACK:
        control = preregistered.config_of("digits", method, trial, sign=0.0).mpl.method
        assert control.feedback.rule == "none"
        assert control.model_copy(update={"feedback": own.method.feedback}) == own.method
        flipped = preregistered.config_of("digits", method, trial, sign=-1.0).mpl.method
        assert flipped.feedback.weight == -own.method.feedback.weight


def test_a_preregistered_run_is_kept_and_depends_on_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(preregistered.BASE, "phases", {"train": {"steps": 30}})
    experiment = preregistered.Experiment("digits", Kept(tmp_path / "kept.jsonl"))
    right, wrong = (
        experiment.accuracies("class mismatch", "soft_exact", 0, seeds=range(2), sign=sign) for sign in (1.0, -1.0)
    )
    assert right != wrong
    monkeypatch.setattr(preregistered, "train_many", None)
    again = preregistered.Experiment("digits", Kept(tmp_path / "kept.jsonl"))
    assert again.accuracies("class mismatch", "soft_exact", 0, seeds=range(2)) == right


def test_one_weight_compares_both_normalisations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(preregistered.BASE, "phases", {"train": {"steps": 10}})
    output = tmp_path / "one_weight.json"
    small = ["one_weight", "--data", "digits", "--seeds", "2", "--places", "1", "--keep", str(tmp_path / "kept.jsonl")]
    monkeypatch.setattr("sys.argv", [*small, "--output", str(output)])
    assert one_weight.main() == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["labelled"], row["smoothing"]) == (20, 0.0)
    assert row["top1"].keys() == one_weight.RULES.keys()
    assert len({tuple(values) for values in row["top1"].values()}) > 4  # 10 steps turn few images


def test_holms_method() -> None:
    """Sorted p values times 4, 3, 2 and 1, never falling."""
    adjusted = preregistered.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_the_unlabelled_part_can_hold_more_classes_and_a_tail() -> None:
    samples = make_digits(Digits(per_class=4, known=6, tail=0.1, vectors=True), seed=0)
    assert set(samples.truth[samples.labelled].tolist()) == set(samples.truth[samples.test].tolist()) == set(range(6))
    counts = np.bincount(samples.truth[samples.unlabelled].numpy(), minlength=10)
    assert counts[9] == pytest.approx(counts[0] / 10, abs=1)
    assert all(counts[:-1] > counts[1:])
