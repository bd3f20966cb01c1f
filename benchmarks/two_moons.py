"""Section 3.1, TwoMoon: success rates of the methods over seeds, the feedback's controls, and Figure 2.

    python -m benchmarks.two_moons --output benchmarks/results/cpu/two_moons.json --figure docs/images/two_moons.png

Three tables, each with ds_configs/two_moons.json and the settings named here. "methods": the paper's three and MPL's
control, one fixed setting for all, chosen on other seeds (100 and up). "literal": the file as it is, the paper's text.
"no labels": the teacher is shown no label at all, so whatever it knows about the classes has come through the student's
feedback. A table that --tables leaves out stays in --output as it was, with the commit that it came from.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.in_memory import CPU, PointViews, Results, Samples
from benchmarks.many_seeds import Stacked, as_overrides, train_many
from benchmarks.paired import Kept, paired, written
from benchmarks.report import ROOT, provenance, write
from mpl_scale.cli.command import replace_missing_characters
from mpl_scale.config import RunConfig, load_config

CONFIG = ROOT / "ds_configs" / "two_moons.json"
POINTS, LABELS_A_CLASS, NOISE = 2000, 3, 0.1
SUCCESS = 95.0
"""Percent of the points that are right: less is no success."""

NETWORKS = {f"mpl_scale.model.{name}.init_range": 1.0 for name in ("teacher", "student")}
METHODS_STEPS = 12000
METHODS_SETTING: dict[str, Any] = {
    **NETWORKS,
    **{f"mpl_scale.optim.{name}.lr": 0.3 for name in ("teacher", "student")},
    **{f"mpl_scale.optim.{name}.momentum": 0.9 for name in ("teacher", "student")},
    "mpl_scale.phases.train.steps": METHODS_STEPS,
    "mpl_scale.method.teacher_loss": "uda",
    "mpl_scale.method.uda.weight": 5.0,
    "mpl_scale.method.feedback.weight": 0.3,
}
METHODS_JITTER = 0.1
METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"mpl_scale.method.name": "supervised"},
    "pseudo labels": {
        "mpl_scale.method.name": "pseudo_label",
        "mpl_scale.method.teacher_loss": "supervised",
        "mpl_scale.method.pseudo_label_threshold": 0.0,
        "mpl_scale.phases.teacher_warmup.steps": METHODS_STEPS,
    },
    "mpl": {},
    "mpl, feedback none": {"mpl_scale.method.feedback.rule": "none"},
}
LITERAL: dict[str, dict[str, Any]] = {
    "supervised": {"mpl_scale.method.name": "supervised"},
    "mpl": {},
    "mpl, feedback none": {"mpl_scale.method.feedback.rule": "none"},
}
BLIND_SETTING: dict[str, Any] = {
    **NETWORKS,
    **{f"mpl_scale.optim.{name}.lr": 1.0 for name in ("teacher", "student")},
    "mpl_scale.phases.train.steps": 4000,
    "mpl_scale.method.teacher_loss": "supervised",
    "mpl_scale.method.supervised_weight": 0.0,
    "mpl_scale.method.feedback.weight": 0.3,
}
BLIND: dict[str, dict[str, Any]] = {
    name: {"mpl_scale.method.feedback.rule": name} for name in ("cosine", "none", "flipped")
}
TABLES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "methods": (METHODS, METHODS_SETTING),
    "literal": (LITERAL, {}),
    "no labels": (BLIND, BLIND_SETTING),
}
"""Rows and what they share, by table."""
ORIGIN = ("command", "commit", "changed_files")


class Jittered(PointViews):
    """The strong view of a UDA teacher."""

    jitter = METHODS_JITTER


def make_samples(seed: int) -> Samples:
    """2,000 points in two clusters, 3 of each labelled, drawn by the seed; all of them are tested."""
    from sklearn.datasets import make_moons

    points, targets = make_moons(POINTS, noise=NOISE, random_state=seed)
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(np.flatnonzero(targets == label), LABELS_A_CLASS, replace=False) for label in (0, 1)]
    labels, everything = torch.from_numpy(targets).long(), np.arange(POINTS)
    return Samples(
        inputs=torch.from_numpy(points).float(),
        labels=labels,
        truth=labels,
        labelled=np.sort(np.concatenate(drawn)),
        unlabelled=everything,
        test=everything,
    )


def config_of(settings: dict[str, Any]) -> RunConfig:
    """The configuration ds_configs/two_moons.json with these settings."""
    return load_config(CONFIG, overrides=as_overrides(settings))


def run(table: str, row: str, *, seeds: Sequence[int]) -> tuple[list[Results], dict[str, Stacked]]:
    """A row of a table on some seeds."""
    rows, setting = TABLES[table]
    settings = {**setting, **rows[row]}
    views = Jittered if table == "methods" else PointViews
    return train_many(config_of(settings), [make_samples(seed) for seed in seeds], views, seeds=seeds)


def top1(kept: Kept, table: str, row: str, *, seeds: Sequence[int]) -> list[float]:
    """Accuracy of the student by seed, percent."""

    def measured() -> dict[str, float]:
        begun = time.perf_counter()
        results, _ = run(table, row, seeds=seeds)
        print(f"{table}, {row}: {len(seeds)} seeds in {time.perf_counter() - begun:.0f} s", flush=True)
        return {str(seed): values["student_top1"] for seed, values in zip(seeds, results, strict=True)}

    found = kept(f"{table}/{row}/{len(seeds)}", measured)
    return [found[str(seed)] for seed in seeds]


def summary(accuracy: dict[str, list[float]], *, ours: str) -> dict[str, dict[str, Any]]:
    """Successes, mean and deviation of the accuracy by row; for ours, the paired difference to every other row."""
    return {
        row: {
            "success": float(np.mean(np.array(values) > SUCCESS)),
            "accuracy": float(np.mean(values)),
            "deviation": float(np.std(values, ddof=1)),
            "student_top1": values,
            "paired": {other: paired(values, accuracy[other]) for other in accuracy if row == ours != other},
        }
        for row, values in accuracy.items()
    }


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print success rates and accuracies as a Markdown table."""
    print(f"\n{title}\n\n| method | success | accuracy |\n| --- | --- | --- |")
    for row, values in rows.items():
        print(f"| {row} | {values['success']:.2f} | {values['accuracy']:.1f} ± {values['deviation']:.1f} |")
    for row, values in rows.items():
        for other, pair in values["paired"].items():
            print(f"{row} - {other}: {written(pair)}", flush=True)


def draw(path: Path, *, seed: int, rows: tuple[str, ...] = ("supervised", "pseudo labels", "mpl")) -> None:
    """Figure 2: decision regions of each method's student on one seed's points; labelled ones are large."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = make_samples(seed)
    x, y = np.meshgrid(np.linspace(-1.6, 2.6, 300), np.linspace(-1.1, 1.6, 200))
    grid = torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1)).float()
    figure, axes = pyplot.subplots(1, len(rows), figsize=(4 * len(rows), 3.2), constrained_layout=True)
    colours = np.array(["tab:red", "tab:green"])
    points, truth = samples.inputs.numpy(), samples.truth.numpy()
    for axis, row in zip(axes, rows, strict=True):
        results, trained = run("methods", row, seeds=[seed])
        with torch.no_grad():
            decided = trained["student"](grid).argmax(1).reshape(x.shape)
        axis.contourf(x, y, decided.numpy(), levels=[-0.5, 0.5, 1.5], colors=["#f4b6b6", "#b9e3b9"])
        axis.scatter(*points[::4].T, s=3, c=colours[truth[::4]], linewidths=0)
        labelled = samples.labelled
        axis.scatter(*points[labelled].T, s=90, c=colours[truth[labelled]], edgecolors="black", marker="*", zorder=3)
        axis.set_title(f"{row}: {results[0]['student_top1']:.1f}%")
        axis.set_xticks([])
        axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    replace_missing_characters()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30, help="of the methods and the literal settings")
    parser.add_argument("--blind_seeds", type=int, default=30, help="of the teacher without labels")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), help="default: all")
    parser.add_argument("--keep", type=Path, default=Path("runs/two_moons.jsonl"), help="runs that are done")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--figure", type=Path, metavar="PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(options.keep)
    document = {"kind": "two_moons", **provenance("benchmarks.two_moons", CPU), "tables": {}}
    document["points"] = {"count": POINTS, "labels_a_class": LABELS_A_CLASS, "noise": NOISE, "jitter": METHODS_JITTER}
    if options.output is not None and options.output.exists():
        before = json.loads(options.output.read_text())
        origin = {key: before[key] for key in ORIGIN if key in before}
        document["tables"] = {
            table: {"origin": origin, **part} for table, part in before["tables"].items() if table not in options.tables
        }
    for table in options.tables:
        rows, setting = TABLES[table]
        seeds = options.blind_seeds if rows is BLIND else options.seeds
        accuracy = {row: top1(kept, table, row, seeds=range(seeds)) for row in rows}
        ours = "cosine" if rows is BLIND else "mpl"
        document["tables"][table] = {"setting": setting, "rows": summary(accuracy, ours=ours)}
        show(f"{table}, {seeds} seeds", document["tables"][table]["rows"])
    document["tables"] = {table: document["tables"][table] for table in TABLES if table in document["tables"]}
    if options.figure is not None:
        draw(options.figure, seed=0)
    if options.output is not None:
        write(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
