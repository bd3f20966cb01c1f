"""JSON files of the benchmarks: one reader for each kind, found by the file's "kind"."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mpl_scale.config.names import Registry, suggest
from mpl_scale.report.controls import named_fed_back, named_twin, with_control
from mpl_scale.report.material import Comparison, Curve, Material, Moons, Origin, Outcome, Training
from mpl_scale.report.runs import read_object

Reader = Callable[[Material, str, dict[str, Any]], None]
READERS: Registry[Reader] = Registry("reader of benchmark results")
"""By kind: adds what the document of that source says."""
STAGES = {"supervised": "supervised", "uda": "uda", "mpl": "mpl", "mpl over uda": "mpl"}
"""Figure 3's bars by what the benchmarks call the methods."""
FACTS = ("command", "commit", "machine", "ranks", "threads_per_rank", "steps")


def read_results(material: Material, path: Path) -> None:
    """Add a file's numbers. ValueError names the file and the fix."""
    document = read_object(path, fix="give a result file of a benchmark, or run it again")
    kind = str(document.get("kind", "methods" if "rows" in document else None))
    if kind not in READERS:
        hint = suggest(kind, READERS)
        raise ValueError(f"{path}: kind = {kind!r} is no benchmark that a report shows; {hint}")
    try:
        READERS[kind](material, path.name, document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path}: not what benchmark {kind} writes ({type(error).__name__}: {error}); run its command again"
        ) from error
    versions = ", ".join(f"{name} {value}" for name, value in document.get("versions", {}).items())
    facts = {name: str(document[name]) for name in FACTS if name in document}
    material.origins.append(Origin(path, {**facts, **({"versions": versions} if versions else {})}))


@READERS.register("methods")
def _methods(material: Material, source: str, document: dict[str, Any]) -> None:
    """benchmarks/methods.py: rows in the order of seeds; X+finetune belongs to the X before it."""
    found: dict[str, list[dict[str, float]]] = {}
    for row in document["rows"]:
        method, _, finetuned = row["method"].partition("+finetune")
        if row["method"].endswith("+finetune") and not finetuned:
            found[method][-1]["finetuned"] = row["top-1"]
            continue
        top1 = {"student": row["top-1"], **({"ema": row["EMA top-1"]} if row.get("EMA top-1") is not None else {})}
        found.setdefault(method, []).append(top1)
    for method, runs in found.items():
        labels = document.get("labels")
        material.outcomes += [_outcome(source, method, found, labels, n, top1) for n, top1 in enumerate(runs)]


def _outcome(
    source: str, method: str, methods: Collection[str], labels: float | None, seed: int, top1: Mapping[str, float]
) -> Outcome:
    """methods: all those of the file, among which the control is looked for."""
    fed_back = named_fed_back(method)
    twin = named_twin(method, methods) if fed_back else None
    return Outcome(source, method, STAGES.get(method), labels, seed, top1, fed_back=fed_back, twin=twin)


@READERS.register("digits_table")
def _digits_table(material: Material, source: str, document: dict[str, Any]) -> None:
    for count, part in document["labels"].items():
        labels = float(count)
        for method, runs in part["runs"].items():
            stage = STAGES.get(method)
            for seed, values in zip(document["seeds"], runs, strict=True):
                top1 = {name.removesuffix("_top1"): values[name] for name in values if name.endswith("_top1")}
                material.outcomes.append(_outcome(source, method, part["runs"], labels, seed, top1))
            if stage in ("supervised", "mpl"):
                for who in ("student", "teacher"):
                    _add_training(material, source, method, who, labels, runs)
        pairs = with_control(part.get("differences", {}), part["runs"])
        if pairs:
            setting = f"MPL against its teacher's method alone and its control, {labels:g} labels a class"
            material.comparisons.append(Comparison(source, setting, pairs))


def _add_training(
    material: Material, source: str, method: str, who: str, labels: float, runs: list[dict[str, float]]
) -> None:
    mark = f"{who}_accuracy@"
    points = [{float(name.removeprefix(mark)): run[name] for name in run if name.startswith(mark)} for run in runs]
    curve = Curve.over_runs(points)
    if curve.steps:
        kind = "supervised" if method == "supervised" else who
        name = method if kind == "supervised" else f"{method}: {who}"
        material.training.append(Training(source, method, name, kind, labels, curve))


@READERS.register("two_moons")
def _two_moons(material: Material, source: str, document: dict[str, Any]) -> None:
    for table, part in document["tables"].items():
        accuracy = {row: [float(value) for value in values["student_top1"]] for row, values in part["rows"].items()}
        success = {row: float(values["success"]) for row, values in part["rows"].items()}
        material.moons.append(Moons(source, table, accuracy, success))
        pairs = {f"{row} - {other}": pair for row in accuracy for other, pair in part["rows"][row]["paired"].items()}
        pairs = with_control(pairs, accuracy)
        if pairs:
            material.comparisons.append(Comparison(source, f"two moons, {table}", pairs))


@READERS.register("feedback")
def _feedback(material: Material, source: str, document: dict[str, Any]) -> None:
    for setting, part in document["settings"].items():
        for rule, values in part["student_top1"].items():
            material.outcomes += [
                Outcome(source, rule, None, None, seed, {"student": value}, setting)
                for seed, value in enumerate(values)
            ]
        material.comparisons.append(Comparison(source, setting, part["paired"]))
