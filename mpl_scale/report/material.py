"""What a report is made of, wherever it was read: outcomes of runs, curves, statistics, and where they come from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NETWORKS = {"student": "student", "ema": "its average (EMA)", "finetuned": "finetuned", "teacher": "teacher"}
"""Networks of an outcome, and how a table calls them."""


@dataclass(frozen=True)
class Outcome:
    """What one run ended with.

    source: the file, or "runs". labels: labelled images a class, None: unknown. stage: supervised, uda or mpl where the
    method is one of Figure 3's; else None. top1: percent, by network. setting: what the file's methods were run under,
    where it has several. fed_back: whether it is MPL with a feedback that is no control. twin: the method of the same
    source and labels that is the same with h = 0; None: there is none.
    """

    source: str
    method: str
    stage: str | None
    labels: float | None
    seed: int
    top1: Mapping[str, float]
    setting: str | None = None
    fed_back: bool = False
    twin: str | None = None

    @property
    def returned(self) -> float | None:
        """Accuracy of the network that the paper returns, percent: the finetuned student where there is one."""
        return self.top1.get("finetuned", self.top1.get("student"))


@dataclass(frozen=True)
class Curve:
    """A measure over steps, of runs that differ in their seed: steps [n], mean [n], deviation [n] (0 for one run)."""

    steps: Sequence[float]
    mean: Sequence[float]
    deviation: Sequence[float]

    @classmethod
    def over_runs(cls, runs: Sequence[Mapping[float, float]]) -> Curve:
        """Mean and sample deviation at the steps that all runs have; runs: value by step."""
        common = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
        values = [[run[step] for run in runs] for step in common]
        spread = [statistics.stdev(row) if len(row) > 1 else 0.0 for row in values]
        return cls(common, [statistics.fmean(row) for row in values], spread)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration. curves: over global steps, by the metric's name, which evaluation/ precedes where the
    line is an evaluation's: a loss has the same name in both.
    """

    label: str
    labels: float | None
    stage: str | None
    seeds: Sequence[int]
    settings: Mapping[str, Any]
    curves: Mapping[str, Curve]
    feedback: Sequence[float] = ()
    """h of all runs' lines of metrics in their last LAST_STEPS steps of phase train; empty without feedback."""
    drops: Sequence[tuple[float, float]] = ()
    """Of the same lines h before its baseline, and how far the student's update lowered its labelled loss."""
    right: Sequence[float] = ()
    """Of the same lines the share of right pseudo labels, where the truth is known."""
    twin: str | None = None
    """The label of the same configuration with h = 0."""


LAST_STEPS = 1000


@dataclass(frozen=True)
class Training:
    """Figure 4: accuracy on what a network is taught, percent, over the steps of phase train.

    kind: supervised, or student or teacher of the MPL run. who: as in a legend.
    """

    source: str
    method: str
    who: str
    kind: str
    labels: float | None
    curve: Curve


@dataclass(frozen=True)
class Comparison:
    """Paired differences in percentage points, by what is compared: mean, low, high, t_p, wins, seeds."""

    source: str
    setting: str
    rows: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Moons:
    """A table of two moons: accuracy by seed of each row, percent; success: share of the seeds above 95%."""

    source: str
    table: str
    accuracy: Mapping[str, Sequence[float]]
    success: Mapping[str, float]


@dataclass(frozen=True)
class Origin:
    """Where numbers come from. facts: by name, as the file has them."""

    path: Path
    facts: Mapping[str, str]


@dataclass
class Material:
    """Everything that was read: the runs and results that a report shows."""

    outcomes: list[Outcome] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    moons: list[Moons] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)

    def returned(self, source: str, method: str, labels: float | None) -> float:
        """Mean accuracy of the network that is returned, percent; -1 where no run has ended."""
        key = (source, method, labels)
        ended = [one.returned for one in self.outcomes if (one.source, one.method, one.labels) == key]
        values = [value for value in ended if value is not None]
        return statistics.fmean(values) if values else -1.0

    def by_setting(self) -> dict[str, dict[str, dict[str, list[Outcome]]]]:
        """Outcomes that have a setting: by source, method and setting."""
        found: dict[str, dict[str, dict[str, list[Outcome]]]] = {}
        for outcome in self.outcomes:
            if outcome.setting is not None:
                settings = found.setdefault(outcome.source, {}).setdefault(outcome.method, {})
                settings.setdefault(outcome.setting, []).append(outcome)
        return found

    def tables(self) -> dict[tuple[str, float | None], dict[str, list[Outcome]]]:
        """Outcomes by source and labels, then by method, in order of appearance; those of settings are not here."""
        found: dict[tuple[str, float | None], dict[str, list[Outcome]]] = {}
        for outcome in self.outcomes:
            if outcome.setting is not None:
                continue
            methods = found.setdefault((outcome.source, outcome.labels), {})
            methods.setdefault(outcome.method, []).append(outcome)
        return found


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Sample deviation; 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def group_names(groups: Sequence[Group]) -> list[str]:
    """Labels, with the number of labelled images where the groups differ in it."""
    several = len({group.labels for group in groups}) > 1
    return [
        f"{group.label}, {group.labels:g} labels a class" if several and group.labels is not None else group.label
        for group in groups
    ]


def top1_of(runs: Sequence[Outcome], network: str) -> list[float]:
    """Accuracies of one network, percent, over the runs that have it."""
    return [run.top1[network] for run in runs if network in run.top1]
