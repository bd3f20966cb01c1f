"""A results file as one picture: the accuracy of every method and seed, or what exact feedback is worth by task.

    python -m benchmarks.figure benchmarks/results/cpu/digits_methods.json docs/images/digits_methods.png
    python -m benchmarks.figure benchmarks/results/cpu/feedback_fashion_mnist.json docs/images/feedback.png

The first is of benchmarks/methods.py, the second of benchmarks/preregistered.py, of one data set or several.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

LABELS = {
    "supervised": "supervised",
    "pseudo_label": "pseudo labels",
    "uda": "UDA",
    "mpl_no_feedback": "MPL, no feedback (h = 0)",
    "mpl_no_feedback+finetune": "... finetuned",
    "mpl": "MPL",
    "mpl+finetune": "... finetuned",
}
DATA = {"fashion_mnist": "Fashion-MNIST", "digits": "digits"}
CONTROLS = {
    "soft_exact - soft_exact, h = 0": ("less its own h = 0 control", "o", "#0072B2"),
    "soft_exact - uda": ("less tuned UDA", "s", "#D55E00"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in options.results]

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    preregistered = all(document.get("kind") == "preregistered" for document in documents)
    rows = sum(len(document["tasks"]) for document in documents) if preregistered else 5
    figure, axes = pyplot.subplots(figsize=(7, 1.3 + 0.3 * rows), layout="constrained")
    if preregistered:
        draw_feedback(axes, documents)
    elif len(documents) == 1:
        draw_methods(axes, documents[0])
    else:
        parser.error("only results of benchmarks/preregistered.py are drawn together")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.6, color="#d9d9d9")
    axes.set_axisbelow(True)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure, dpi=130)
    return 0


def draw_methods(axes: Any, document: dict[str, Any]) -> None:
    """A dot for each seed and a bar for the mean, by method."""
    found: dict[str, list[float]] = {}
    for row in document["rows"]:
        found.setdefault(row["method"], []).append(row["top-1"])
    for position, values in enumerate(found.values()):
        axes.plot(values, [position] * len(values), "o", color="#0072B2", alpha=0.45, markersize=5)
        axes.plot(statistics.mean(values), position, "|", color="#1c1c1c", markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(found)), [LABELS.get(method, method) for method in found])
    axes.set_xlabel("top-1 on the held-out third, %: one dot a seed, bar: mean")


def draw_feedback(axes: Any, documents: list[dict[str, Any]]) -> None:
    """The two primary differences of every task, with their 95% intervals."""
    tasks = [
        (f"{DATA[document['data']]}: {name}", task["paired"])
        for document in documents
        for name, task in document["tasks"].items()
    ]
    axes.axvline(0, color="#1c1c1c", linewidth=1)
    for shift, (pair, (label, marker, colour)) in zip((-0.14, 0.14), CONTROLS.items(), strict=True):
        found = [paired[pair] for _, paired in tasks]
        means = [values["mean"] for values in found]
        reach = [values["high"] - values["mean"] for values in found]
        places = [position + shift for position in range(len(tasks))]
        axes.errorbar(means, places, xerr=reach, fmt=marker, color=colour, markersize=5, capsize=2, label=label)
    axes.set_yticks(range(len(tasks)), [name for name, _ in tasks])
    axes.set_ylim(-0.5, len(tasks) - 0.5)
    axes.set_xlabel("top-1 in points: mean of the seeds and its 95% interval")
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.35, 1.0), title="exact feedback")


if __name__ == "__main__":
    raise SystemExit(main())
