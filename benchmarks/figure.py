"""The accuracy of every method and seed in a results file of benchmarks/methods.py, as one picture.

python -m benchmarks.figure benchmarks/results/cpu/digits_methods.json docs/images/digits_methods.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

LABELS = {
    "supervised": "supervised",
    "pseudo_label": "pseudo labels",
    "uda": "UDA",
    "mpl_no_feedback": "MPL, no feedback (h = 0)",
    "mpl_no_feedback+finetune": "... finetuned",
    "mpl": "MPL",
    "mpl+finetune": "... finetuned",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    document = json.loads(options.results.read_text())
    found: dict[str, list[float]] = {}
    for row in document["rows"]:
        found.setdefault(row["method"], []).append(row["top-1"])

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    for position, values in enumerate(found.values()):
        axes.plot(values, [position] * len(values), "o", color="#0072B2", alpha=0.45, markersize=5)
        axes.plot(statistics.mean(values), position, "|", color="#1c1c1c", markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(found)), [LABELS.get(method, method) for method in found])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 on the held-out third, %: one dot a seed, bar: mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.6, color="#d9d9d9")
    axes.set_axisbelow(True)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure, dpi=130)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
