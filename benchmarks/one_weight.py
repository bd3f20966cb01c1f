"""Does one feedback weight serve all sizes of batch and all smoothing? `soft_exact` by both normalisations.

    python -m benchmarks.one_weight --output benchmarks/results/cpu/one_weight.json

Fashion-MNIST as vectors with 4 labels a class, teacher settings that nobody tuned, seeds that no experiment has used.
For each batch and smoothing: h = 0, and both values of `feedback.normalise` at the same weights. A look, not a test.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.in_memory import CPU
from benchmarks.many_seeds import train_many
from benchmarks.paired import Kept
from benchmarks.preregistered import INPUTS, POOL, TASKS, Jittered, config_of
from benchmarks.report import provenance, write
from benchmarks.small_digits import Digits, make_digits
from mpl_scale.config.presets import merge
from mpl_scale.config.schema import Config

TEACHER = {"unlabelled_weight": 1.0, "jitter": 1.0, "threshold": 0.7, "feedback_weight": 1.0}
WEIGHTS = (0.1, 0.3, 1.0, 3.0)
PLACES = ((20, 0.0), (20, 0.1), (20, 0.3), (80, 0.0), (10, 0.0))
"""Labelled images of a batch (three times as many are unlabelled), and the student's label smoothing."""
RULES = {
    "h = 0": {"rule": "none"},
    **{
        f"{normalise} {weight:g}": {"rule": "soft_exact", "normalise": normalise, "weight": weight}
        for normalise in ("norms", "credits")
        for weight in WEIGHTS
    },
}
FIRST_SEED, SEEDS = 9000, 8


def accuracies(data: str, feedback: dict[str, Any], labelled: int, smoothing: float, seeds: range) -> dict[str, float]:
    """The student's top-1, percent, by seed."""
    run = config_of(data, "soft_exact", TEACHER)
    changes = {"method": {"feedback": feedback, "student_label_smoothing": smoothing}}
    section = merge(run.mpl.model_dump(mode="json"), changes)
    run = dataclasses.replace(
        run, mpl=Config.model_validate_json(json.dumps(section)), deepspeed={"train_batch_size": labelled}
    )
    digits = Digits(**TASKS["4 labels"], vectors=True, data=data, pool=POOL[data])
    samples = [make_digits(digits, seed=seed) for seed in seeds]
    results, _ = train_many(run, samples, Jittered, seeds=seeds)
    return {str(seed): values["student_top1"] for seed, values in zip(seeds, results, strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=INPUTS, default="fashion_mnist")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--places", type=int, default=len(PLACES), help="how many batches and smoothings, from the first"
    )
    parser.add_argument("--keep", type=Path, default=Path("runs/one_weight.jsonl"), help="runs that are done")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept, seeds, rows = Kept(options.keep), range(FIRST_SEED, FIRST_SEED + options.seeds), []
    for labelled, smoothing in PLACES[: options.places]:
        row: dict[str, Any] = {"labelled": labelled, "smoothing": smoothing, "top1": {}}
        for name, feedback in RULES.items():
            found = kept(
                f"{options.data}/{labelled}/{smoothing}/{name}/{seeds.stop}",
                lambda feedback=feedback, place=(labelled, smoothing): accuracies(
                    options.data, feedback, *place, seeds
                ),
            )
            row["top1"][name] = [found[str(seed)] for seed in seeds]
            print(f"batch {labelled}, smoothing {smoothing:g}, {name}: {np.mean(row['top1'][name]):.2f}", flush=True)
        rows.append(row)
        if options.output is not None:
            write(options.output, {"kind": "one_weight", **provenance("benchmarks.one_weight", CPU), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
