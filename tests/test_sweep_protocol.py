"""C.4's tuning protocol for every method of Tables 2 and 6 to 8: equal trials, 50,000 steps, the held-out images."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from mpl_scale.config import load_config
from mpl_scale.config.presets import flatten
from mpl_scale.sweep import Sweep, read_spec
from mpl_scale.sweep.check import check_tasks
from mpl_scale.sweep.space import parse
from mpl_scale.sweep.spec import Spec
from tests.support.paper_configs import FOLDER, settings

COLUMNS = ("cifar10_4k", "svhn_1k", "imagenet10_resnet50")
METHODS = ("", "_supervised", "_pseudo_label", "_uda")
NAMES = [f"{column}{method}" for column in COLUMNS for method in METHODS]
STEPS, EVALUATE_ON = "mpl_scale.phases.train.steps", "mpl_scale.data.evaluate_on"
TRIALS, LONGEST = 128, 50_000
ALMOST = 1 - 2**-53


@cache
def spec(name: str) -> Spec:
    return read_spec(FOLDER / "sweeps" / f"{name}.json")


def test_there_are_no_others() -> None:
    assert {path.stem for path in (FOLDER / "sweeps").glob("*.json")} == {*NAMES, "digits"}


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_is_the_papers(name: str) -> None:
    found, paper = spec(name), settings(name)
    assert found.ds_config.resolve() == FOLDER / f"{name}.json"
    assert (found.trials, found.seed, found.best, len(found.seeds)) == (TRIALS, 0, 1, 10)
    trial, final = found.trial(0), found.final(0, seed=1)
    assert (trial[EVALUATE_ON], final[EVALUATE_ON]) == ("held_out", "test")
    assert trial.get(STEPS, paper[STEPS]) == min(LONGEST, paper[STEPS])
    assert final.get(STEPS, paper[STEPS]) == paper[STEPS]
    assert found.settings.keys() | found.final_settings.keys() <= {STEPS, EVALUATE_ON}


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_values_can_be_drawn(name: str) -> None:
    """No method is tuned around the values that the paper found for it."""
    paper = settings(name)
    for field, given in spec(name).declared.items():
        draw, (kind,) = parse(field, given), given
        if kind == "choices":
            assert paper[field] in given[kind], field
        else:
            assert draw(0.0) <= paper[field] <= draw(ALMOST), field


@pytest.mark.parametrize("column", COLUMNS)
def test_methods_share_the_ranges_of_what_they_share(column: str) -> None:
    spaces = [spec(f"{column}{method}").declared for method in METHODS]
    shared = set.intersection(*(set(space) for space in spaces)) - {"mpl_scale.optim.student.warmup_steps"}
    assert len(shared) == 4
    for field in shared:
        assert all(space[field] == spaces[0][field] for space in spaces), field


@pytest.mark.parametrize("name", NAMES)
def test_trials_differ_and_the_first_is_valid(name: str, tmp_path: Path) -> None:
    """All 128 differ and set known fields; the first one and its final run pass the checks of `--prepare`."""
    found = spec(name)
    tasks = Sweep(found, tmp_path).trials
    assert len(tasks) == TRIALS == len({str(task.values) for task in tasks})
    base = flatten(load_config(found.ds_config).resolved())
    assert all(task.values.keys() <= base.keys() for task in tasks)
    check_tasks(found, tasks[:1], ranks=1, cuda=True)
