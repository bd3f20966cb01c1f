"""Every method on digits, the same seeds for all: the small copy of Tables 2, 9, 10 and 11, and of Figure 4.

    python -m benchmarks.digits_table --seeds 0 1 2 3 4 --labels 4 10 --output benchmarks/results/cpu/digits_table.json

Runs in memory (benchmarks/in_memory.py), one after another, on the settings of ds_configs/digits.json but for those
named here. Noisy Student and Reduced MPL take their distributions from the same seed's UDA network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.in_memory import CPU, ImageViews, Results, logits_of, train
from benchmarks.paired import Kept, paired, written
from benchmarks.report import ROOT, provenance, write
from benchmarks.small_digits import Digits, make_digits
from mpl_scale.cli.command import replace_missing_characters
from mpl_scale.config import RunConfig, load_config
from mpl_scale.monitor import format_table

CONFIG = ROOT / "ds_configs" / "digits.json"
SETTINGS = {"mpl_scale.parallel.engine": "flat", "train_batch_size": 20}
STRONG_LABELLED = {"mpl_scale.data.labelled_view": "strong"}
NO_FINETUNE = {"mpl_scale.phases.finetune.steps": 0}
REDUCED = {
    "mpl_scale.method.name": "reduced_mpl",
    "mpl_scale.method.teacher_loss": "supervised",
    "mpl_scale.model.teacher": {"name": "reduced_teacher", "kwargs": {"hidden": 128}},
}


def baseline(name: str, **method: object) -> dict[str, Any]:
    """Settings of a method that is not MPL."""
    return {
        "mpl_scale.method.name": name,
        **{f"mpl_scale.method.{key}": value for key, value in method.items()},
        **NO_FINETUNE,
    }


def over(teacher_loss: str, rule: str = "cosine") -> dict[str, Any]:
    """MPL over a teacher of that loss."""
    return {"mpl_scale.method.teacher_loss": teacher_loss, "mpl_scale.method.feedback.rule": rule}


METHODS: dict[str, dict[str, Any]] = {
    "supervised": baseline("supervised"),
    "label smoothing 0.1": baseline("supervised", label_smoothing=0.1),
    "mixup": baseline("mixup"),
    "randaugment": {**baseline("supervised"), **STRONG_LABELLED},
    "pseudo labels": baseline("pseudo_label", teacher_loss="supervised", pseudo_label_threshold=0.7),
    "uda": baseline("uda"),
    "uda, confident labelled images masked": baseline("uda", **{"uda.labelled_threshold": 0.9}),
    "noisy student": baseline("noisy_student", pseudo_label_threshold=0.0),
    "mpl over supervised": over("supervised"),
    "mpl over mixup": over("mixup"),
    "mpl over randaugment": {**over("supervised"), **STRONG_LABELLED},
    "mpl over pseudo labels": {**over("pseudo_label"), "mpl_scale.method.pseudo_label_threshold": 0.7},
    "mpl over uda": over("uda"),
    "mpl regularizer": {
        **over("uda"),
        "mpl_scale.data.unlabelled_from": "labelled",
        "mpl_scale.data.unlabelled_ratio": 1,
        "mpl_scale.data.strong.num_ops": 0,
        "mpl_scale.data.strong.cutout": 0,
    },
    "reduced mpl": REDUCED,
}
"""Settings by row; those of the controls are added below."""
NO_FEEDBACK = ", no feedback"
TEACHERS = ("supervised", "mixup", "randaugment", "pseudo labels", "uda")
METHODS |= {
    f"{mpl}{NO_FEEDBACK}": {**METHODS[mpl], "mpl_scale.method.feedback.rule": "none"}
    for mpl in (*(f"mpl over {teacher}" for teacher in TEACHERS), "mpl regularizer")
}
PAIRS = tuple(
    pair
    for mpl, teacher in (
        *((f"mpl over {teacher}", teacher) for teacher in TEACHERS),
        ("mpl regularizer", "supervised"),
        ("mpl regularizer", "label smoothing 0.1"),
    )
    for pair in [(mpl, teacher), (f"{mpl}{NO_FEEDBACK}", teacher), (mpl, f"{mpl}{NO_FEEDBACK}")]
)
"""MPL - the method alone (its teacher's in Table 10) = control without feedback - that + what the feedback is worth."""
FIGURE_4 = ("supervised", "mpl over uda")


def config_of(method: str, *, steps: int, seed: int) -> RunConfig:
    """The configuration of a row."""
    settings = {**SETTINGS, "mpl_scale.seed": seed, "mpl_scale.phases.train.steps": steps, **METHODS[method]}
    if method == "pseudo labels":
        settings["mpl_scale.phases.teacher_warmup.steps"] = steps // 2
    if method == "noisy student":  # its distributions are stored, and a check asks for a trained teacher
        settings["mpl_scale.phases.teacher_warmup.steps"] = 1
    return load_config(CONFIG, overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()])


class Curve:
    """Training accuracy by step, percent: of the student on what it is taught, of the teacher on labelled images."""

    def __init__(self, every: int) -> None:
        self._every, self.values = every, {}  # type: ignore[var-annotated]

    def __call__(self, phase: str, step: int, metrics: Mapping[str, torch.Tensor]) -> None:
        """See in_memory.Watch. Sums over `every` steps."""
        if phase != "train":
            return
        for name in ("student_accuracy", "teacher_accuracy"):
            if name in metrics:
                key = f"{name}@{-(-step // self._every) * self._every}"
                self.values[key] = self.values.get(key, 0.0) + 100 * metrics[name].item() / self._every


def run_seed(kept: Kept, *, labels: int, seed: int, steps: int, methods: list[str]) -> dict[str, Results]:
    """All methods on one seed's data. UDA's network is trained anew when a row needs its distributions."""
    samples = make_digits(Digits(per_class=labels), seed=seed)
    stored: list[torch.Tensor] = []

    def distributions() -> torch.Tensor:
        if not stored:
            run = config_of("uda", steps=steps, seed=seed)
            _, weights = train(run, samples, ImageViews)
            views = ImageViews(samples, run.mpl, stream=0)
            stored.append(logits_of(run.mpl, "student", weights["student"], views.ready(samples.inputs)).softmax(1))
        return stored[0]

    def results(method: str) -> Results:
        run = config_of(method, steps=steps, seed=seed)
        data = samples
        if run.mpl.data.unlabelled_from == "labelled":
            data = replace(samples, unlabelled=samples.labelled)
        if method in ("noisy student", "reduced mpl"):
            data = replace(samples, distributions=distributions())
        curve = Curve(max(1, steps // 20))
        found, _ = train(run, data, ImageViews, watch=curve)
        return {**found, **curve.values}

    return {method: kept(f"{labels}/{seed}/{steps}/{method}", lambda m=method: results(m)) for method in methods}


def rows_of(label: str, values: Results) -> list[dict[str, Any]]:
    """Table rows: the network that is returned, its average, and the finetuned one."""
    row: dict[str, Any] = {"method": label, "top-1": values["student_top1"]}
    if "ema_top1" in values:
        row["EMA top-1"] = values["ema_top1"]
    if "finetuned_top1" in values:
        row["finetuned top-1"] = values["finetuned_top1"]
    return [row]


def best(values: Results) -> float:
    """The accuracy of the network that the paper returns: the finetuned student where there is one."""
    return values.get("finetuned_top1", values["student_top1"])


def main() -> int:
    replace_missing_characters()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--labels", nargs="+", type=int, default=[4], help="a class")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--keep", type=Path, default=Path("runs/digits_table.jsonl"), help="runs that are done")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--add_to", type=Path, metavar="JSON", help="add the rows to this result of the same settings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept, document = Kept(options.keep), {"kind": "digits_table", **provenance("benchmarks.digits_table", CPU)}
    document |= {"steps": options.steps, "seeds": options.seeds, "labels": {}}
    for labels in options.labels:
        found: dict[str, list[Results]] = {method: [] for method in options.methods}
        for seed in options.seeds:
            runs = run_seed(kept, labels=labels, seed=seed, steps=options.steps, methods=options.methods)
            for method, values in runs.items():
                found[method].append(values)
            print(f"{labels} labels a class, seed {seed}: {len(runs)} runs", flush=True)
        rows = [row for method, values in found.items() for run in values for row in rows_of(method, run)]
        columns = dict.fromkeys(("top-1", "EMA top-1", "finetuned top-1"), ".2f")
        print(f"\n{labels} labels a class\n\n{format_table(rows, by=['method'], columns=columns)}", flush=True)
        if options.add_to is not None:
            before = json.loads(options.add_to.read_text())
            if (before["steps"], before["seeds"]) != (options.steps, options.seeds):
                parser.error(f"{options.add_to} has other steps or seeds; give the same ones")
            found = {**before["labels"][str(labels)]["runs"], **found}
        document["labels"][str(labels)] = {"runs": found, "differences": differences_of(found)}
    if options.add_to is not None:
        added = {name: value for name, value in document.items() if name not in ("kind", "steps", "seeds", "labels")}
        before["added"] = [*before.get("added", []), {"methods": options.methods, **added}]
        document = {**before, "labels": {**before["labels"], **document["labels"]}}
    if options.output is not None:
        write(options.output, document)
    return 0


def differences_of(found: Mapping[str, list[Results]]) -> dict[str, dict[str, float]]:
    """Paired differences of the rows that are there, printed as well."""
    differences = {}
    for ours, other in PAIRS:
        if ours in found and other in found and len(found[ours]) > 1:
            pair = paired([best(run) for run in found[ours]], [best(run) for run in found[other]])
            differences[f"{ours} - {other}"] = pair
            print(f"{ours} - {other}: {written(pair)}", flush=True)
    return differences


if __name__ == "__main__":
    sys.exit(main())
