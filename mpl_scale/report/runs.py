"""Output folders of train.py: read, grouped by their resolved config but for the seed, and named by what differs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpl_scale.config.former import renamed
from mpl_scale.config.load import SECTION
from mpl_scale.config.presets import flatten
from mpl_scale.files import read_object
from mpl_scale.monitor.metrics import RESERVED, part_of, read_metrics
from mpl_scale.report.controls import is_control, is_fed_back, without_feedback
from mpl_scale.report.material import LAST_STEPS, Curve, Group, Material, Origin, Outcome, Training

SEED = "mpl_scale.seed"
LABELS = ("mpl_scale.data.labelled_per_class", "mpl_scale.data.labelled_fraction")
METHOD = "mpl_scale.method.name"
STEPS = "steps trained"
"""A field of its own: --max_steps is not part of the config."""
DEPTH = 4
"""Levels below a given folder at which runs are looked for."""
LONGEST = 60
"""Characters of a label; where all that differs does not fit, the folder's name stands for it."""
EVALUATION = "evaluation/"
"""What the names of metrics of an evaluation get in front."""
CURVES_OF_TRAINING = {"student": "student_accuracy", "teacher": "teacher_accuracy"}


@dataclass(frozen=True)
class Run:
    """One output folder. settings: dotted fields of config.json and STEPS. summary: {} where the run has not ended."""

    folder: Path
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    manifest: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return int(self.settings[SEED])

    @property
    def labels(self) -> float | None:
        """Labelled images a class: of the manifest, or else of the config."""
        if self.manifest:
            return float(self.manifest["parts"]["labelled"]["count"] / self.manifest["classes"])
        value = self.settings.get(LABELS[0])
        return None if value is None else float(value)

    @property
    def top1(self) -> dict[str, float]:
        """Percent, by network; empty where the run has not ended."""
        results = self.summary.get("results", {})
        return {name: float(result["top1"]) for name, result in results.items() if "top1" in result}

    @property
    def stage(self) -> str | None:
        """Its bar of Figure 3: MPL counts with UDA's teacher and a feedback that is no control."""
        name = self.settings[METHOD]
        if name in ("supervised", "uda"):
            return str(name)
        feedback = self.settings.get("mpl_scale.method.feedback.rule")
        return "mpl" if name == "mpl" and feedback not in ("none", "flipped") else None


def find_runs(path: Path) -> list[Run]:
    """The run in that folder, or all those below it, in the order of their names.

    Raises:
        ValueError: names the file that is missing or broken, and the fix.
    """
    if (path / "config.json").exists():
        return [read_run(path)]
    found = sorted({file.parent for depth in range(1, DEPTH + 1) for file in path.glob("*/" * depth + "config.json")})
    folders = [folder for folder in found if (folder / "metrics.jsonl").exists()]
    if not folders:
        raise ValueError(f"{path}: no config.json and metrics.jsonl there or below; give the --output of a run")
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """One output folder; ValueError as of `find_runs`."""
    config = read_object(folder / "config.json", fix="give the --output of a run")
    ours = config.get(SECTION)
    settings = flatten({**config, SECTION: renamed(ours)} if isinstance(ours, Mapping) else config)
    for name in (SEED, METHOD):
        if name not in settings:
            raise ValueError(f"{folder / 'config.json'}: no {name}; it is not what train.py writes: run it again")
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder / 'metrics.jsonl'}: no such file; the run has not begun: start it again")
    metrics = list(read_metrics(folder / "metrics.jsonl"))
    summary, manifest = (
        read_object(folder / name, fix="remove it and start the run again") if (folder / name).exists() else {}
        for name in ("summary.json", "splits/manifest.json")
    )
    for name, document, wanted in (
        ("summary.json", summary, ("results", "steps")),
        ("splits/manifest.json", manifest, ("parts", "classes")),
    ):
        if document and (missing := [key for key in wanted if key not in document]):
            raise ValueError(f"{folder / name}: no {missing[0]!r}; remove it and start the run again")
        for key in ("results", "parts"):
            if not isinstance(document.get(key, {}), Mapping):
                found = type(document[key]).__name__
                raise ValueError(f"{folder / name}: {key!r} is a {found}; remove it and start the run again")
    trained = summary.get("steps", metrics[-1]["global_step"] if metrics else 0)
    run = Run(folder, {**settings, STEPS: trained}, summary, metrics, manifest)
    try:
        _ = (run.seed, run.labels, run.top1, [row["phase"] + str(row["step"]) for row in metrics])
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{folder}: summary.json, metrics.jsonl or splits/manifest.json is not what train.py writes "
            f"({type(error).__name__}: {error}); run it again under another --output"
        ) from error
    return run


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields whose values are not the same in all, in order of first appearance; a field that is absent differs."""
    fields = dict.fromkeys(field for one in settings for field in one)
    return [field for field in fields if len({_key(one.get(field, ...)) for one in settings}) > 1]


def add_runs(material: Material, runs: Sequence[Run]) -> None:
    """Group the runs and add their results and curves."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        kept = {name: value for name, value in run.settings.items() if name != SEED}
        grouped.setdefault(_key(kept), []).append(run)
    members = sorted(grouped.values(), key=lambda group: group[0].labels or 0)
    named = list(zip(_labels(members), members, strict=True))
    controls = {_common(group[0]): label for label, group in named if is_control(group[0].settings)}
    for label, group in named:
        first = group[0]
        fed_back = is_fed_back(first.settings)
        twin = controls.get(_common(first)) if fed_back else None
        made = Group(
            label=label,
            labels=first.labels,
            stage=first.stage,
            seeds=[run.seed for run in group],
            settings={name: value for name, value in first.settings.items() if name != SEED},
            curves=_curves(group),
            feedback=[h for (h,) in _late(group, "h")] if fed_back else (),
            drops=[(h, drop) for h, drop in _late(group, "feedback", "labelled_loss_drop")] if fed_back else (),
            right=[share for (share,) in _late(group, "label_agreement")],
            twin=twin,
        )
        material.groups.append(made)
        for run in group:
            if run.summary:
                outcome = Outcome("runs", label, first.stage, first.labels, run.seed, run.top1, None, fed_back, twin)
                material.outcomes.append(outcome)
            material.origins.append(Origin(run.folder, _facts(run, label)))
        if first.stage in ("supervised", "mpl"):
            material.training += _training(group, label)


def _common(run: Run) -> str:
    """Equal for a run and its control, and for all their seeds."""
    return _key({name: value for name, value in without_feedback(run.settings).items() if name != SEED})


def _key(value: Any) -> str:
    return "absent" if value is ... else json.dumps(value, sort_keys=True)


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The method and, where several groups share it, what sets them apart; labels a class are said elsewhere."""
    shown = [
        {name: value for name, value in group[0].settings.items() if name not in (SEED, *LABELS)} for group in groups
    ]
    found: list[str] = []
    seen: dict[str, str] = {}  # settings by label: groups that differ in their labels a class alone share one
    for group, settings in zip(groups, shown, strict=True):
        method = str(settings[METHOD])
        alike = [other for other in shown if other[METHOD] == method]
        parts = [method, *(f"{_short(name)} {_value(settings.get(name))}" for name in differing(alike))]
        label, key = ", ".join(parts), _key(settings)
        if len(label) > LONGEST:
            label = f"{method} ({_folder(group)})"
        number, plain = 2, label
        while seen.setdefault(label, key) != key:
            label, number = f"{plain} #{number}", number + 1
        found.append(label)
    return found


def _folder(group: Sequence[Run]) -> str:
    """What the folders of a group's runs have in common: mpl of mpl/seed_0 and mpl/seed_1."""
    letters = zip(*(str(run.folder.absolute()) for run in group), strict=False)
    common = "".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, letters))
    return Path(re.sub(r"[/_-]*(seed[_-]?\d*)?$", "", common)).name


def _short(field: str) -> str:
    """The last two names of a field, as feedback.rule."""
    return ".".join(field.split(".")[-2:]) if field != STEPS else STEPS


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _curves(group: Sequence[Run]) -> dict[str, Curve]:
    found: dict[str, list[dict[float, float]]] = {}
    for run in group:
        points: dict[str, dict[float, float]] = {}
        for row in run.metrics:
            mark = "" if part_of(row) == "train" else EVALUATION
            for name, value in row.items():
                if name not in RESERVED and value is not None:
                    points.setdefault(f"{mark}{name}", {})[row["global_step"]] = value
        for name, values in points.items():
            found.setdefault(name, []).append(values)
    curves = {name: Curve.over_runs(runs) for name, runs in found.items()}
    return {name: curve for name, curve in curves.items() if curve.steps}


def _late(group: Sequence[Run], *names: str) -> list[tuple[float, ...]]:
    """Metrics of the lines of the last LAST_STEPS steps of phase train, of lines that have all of them."""
    found = []
    for run in group:
        rows = [row for row in run.metrics if row["phase"] == "train" and None not in map(row.get, names)]
        found += [tuple(row[name] for name in names) for row in rows if row["step"] > rows[-1]["step"] - LAST_STEPS]
    return found


def _training(group: Sequence[Run], label: str) -> list[Training]:
    found = []
    for who, metric in CURVES_OF_TRAINING.items():
        runs = [
            {
                row["step"]: 100 * row[metric]
                for row in run.metrics
                if row["phase"] == "train" and row.get(metric) is not None
            }
            for run in group
        ]
        curve = Curve.over_runs([run for run in runs if run])
        if curve.steps:
            kind = "supervised" if group[0].stage == "supervised" else who
            name = label if kind == "supervised" else f"{label}: {who}"
            found.append(Training("runs", label, name, kind, group[0].labels, curve))
    return found


def _facts(run: Run, label: str) -> dict[str, str]:
    """A row of the table of runs."""
    summary = run.summary
    parts = run.manifest.get("parts", {})
    zero = {"engine": summary.get("engine"), "ZeRO": summary.get("zero_stage")}
    facts = {
        "configuration": label,
        "config file": summary.get("config"),
        "seed": run.seed,
        "steps": run.settings[STEPS],
        "state": "done" if summary else "not finished",
        "ranks": summary.get("ranks"),
        **zero,
        "device": summary.get("device"),
        "processor": summary.get("processor"),
        "command": summary.get("command"),
        "minutes": f"{summary['seconds'] / 60:.1f}" if "seconds" in summary else None,
        **{f"{name} images": parts[name]["count"] for name in ("labelled", "unlabelled", "test") if name in parts},
        "versions": ", ".join(f"{name} {value}" for name, value in summary.get("versions", {}).items()) or None,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}
