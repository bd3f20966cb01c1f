"""What mpl-scale report says of feedback: signal, sign, labels, and gains beside their controls."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpl_scale.report.build import read
from mpl_scale.report.figures import FIGURES
from mpl_scale.report.page import make_page
from mpl_scale.report.runs import Run
from tests.support.configs import DIGITS
from tests.support.report_page import RULE, Page, material_of, trial

CPU = DIGITS.parents[1] / "benchmarks" / "results" / "cpu"


def test_the_signal_and_the_noise_of_h_are_told() -> None:
    """Of the last 1,000 steps of phase train; not of controls."""
    steps = [(1, 9.0), (1200, 0.1), (1600, 0.3), (2000, -0.1)]
    lines = [{"phase": "train", "part": "train", "step": step, "global_step": step, "h": h} for step, h in steps]
    lines += [{"phase": "finetune", "part": "train", "step": 7, "global_step": 2007}]
    runs = [trial(rule, **{RULE: rule}) for rule in ("cosine", "none")]
    material = material_of([replace(run, metrics=lines) for run in runs])
    rows = Page(make_page(material, [], title="t")).tables["Did the feedback say anything?"]
    assert [row[1:] for row in rows[1:]] == [["+0.1000 ± 0.2000", "0.50", "67%", "not measured", "", "", "3"]]


def test_the_sign_of_h_is_compared_with_the_measured_drop_and_labels_with_the_control() -> None:
    """h is right three times of four; signs as frequent (3/4 and 2/4 above 0) would agree half the time by chance."""
    pairs = [(0.3, 0.1), (0.2, 0.5), (-0.1, -0.2), (0.1, -0.3)]
    runs = []
    for rule, right in (("cosine", 0.75), ("none", 0.5)):
        lines = [
            {"phase": "train", "part": "train", "step": step, "global_step": step, "h": h - 0.1, "feedback": h}
            | {"labelled_loss_drop": drop, "label_agreement": right}
            for step, (h, drop) in enumerate(pairs, start=1)
        ]
        settings = {RULE: rule, "logging__labelled_loss_drop": rule == "cosine"}
        runs.append(replace(trial(rule, **settings), metrics=lines))
    material = material_of(runs)
    _, (_, *cells) = Page(make_page(material, [], title="t")).tables["Did the feedback say anything?"]
    assert cells[2:] == ["50%", "75% (by chance 50%)", "75.0%", "50.0%", "4"]


def ended(name: str, *seeds: int, **settings: Any) -> list[Run]:
    return [trial(f"{name}/seed_{s}", seed=s, **settings) for s in seeds]


@pytest.mark.parametrize(
    ("control", "shown"),
    [
        ([], False),
        (ended("none", 0, 1, **{RULE: "none"}), True),
        (ended("none", 0, 1, 2, **{RULE: "none", "method__feedback__weight": 0.5}), True),
        (ended("none", 0, **{RULE: "none"}), False),  # a seed is missing
        (ended("none", 0, 1, **{RULE: "none", "method__teacher_loss": "supervised"}), False),  # another teacher
        (ended("flipped", 0, 1, **{RULE: "flipped"}), False),
    ],
    ids=["none", "twin", "more seeds", "a seed short", "another teacher", "wrong sign"],
)
def test_a_gain_of_mpl_is_shown_beside_its_control_alone(control: list[Run], shown: bool) -> None:
    supervised, mpl = ended("s", 0, 1, method__name="supervised"), ended("mpl", 0, 1, **{RULE: "cosine"})
    material = material_of([*supervised, *mpl, *control])
    bars = FIGURES["breakdown"](material)
    assert bool(bars) == shown
    assert ("No gain without a control" in make_page(material, [], title="t")) != shown
    if shown:
        assert re.fullmatch(r"runs, .*supervised 0.0%, MPL with h = 0 0.0%, MPL 0.0%", bars[0].alt)


def test_differences_of_a_benchmark_are_shown_where_it_has_the_control(tmp_path: Path) -> None:
    document = json.loads((CPU / "digits_table_long.json").read_text())
    (part,) = document["labels"].values()
    (shown,) = read([CPU / "digits_table_long.json"]).comparisons
    assert {"mpl over mixup - mixup", "mpl over uda - uda"} <= shown.rows.keys()
    assert not {"mpl over supervised - supervised", "mpl over pseudo labels - pseudo labels"} & shown.rows.keys()
    del part["runs"]["mpl over mixup, no feedback"]
    (tmp_path / "less.json").write_text(json.dumps(document))
    (less,) = read([tmp_path / "less.json"]).comparisons
    assert shown.rows.keys() - less.rows.keys() == {
        "mpl over mixup - mixup",
        "mpl over mixup - mpl over mixup, no feedback",
    }
