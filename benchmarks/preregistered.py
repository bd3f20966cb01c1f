"""The experiment of docs/experiments/feedback.md: does feedback pay, on which tasks, against what it stands on?

    python -m benchmarks.preregistered --data digits --output benchmarks/results/cpu/feedback_digits.json
    python -m benchmarks.preregistered --data fashion_mnist --output benchmarks/results/cpu/feedback_fashion_mnist.json

Tasks, methods, tuning, seeds and tests are fixed by that page, which was committed before the runs. Every method is
tuned by the same number of trials on seeds of its own. Results are kept as they come, and are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.feedback import BASE, BATCH
from benchmarks.in_memory import CPU, PointViews, Samples
from benchmarks.many_seeds import train_many
from benchmarks.paired import Kept, paired, written
from benchmarks.report import provenance, write
from benchmarks.small_digits import Digits, make_digits
from mpl_scale.config import RunConfig
from mpl_scale.config.presets import merge
from mpl_scale.config.schema import Config
from mpl_scale.data.samples.plan import Draws

TASKS = {
    "class mismatch": {"per_class": 4, "known": 6},
    "wrong labels": {"per_class": 20, "wrong": 0.4},
    "4 labels": {"per_class": 4},
    "long tail": {"per_class": 4, "tail": 0.05},
    "2 labels": {"per_class": 2},
    "plain": {"per_class": 20},
}
"""What is done to the data, see small_digits.Digits."""
POOL = {"digits": None, "fashion_mnist": 600}
INPUTS = {"digits": 64, "fashion_mnist": 196}
BASELINES = ("supervised", "uda", "fixmatch")
FEEDBACK = {
    "cosine": {"feedback": {"rule": "cosine"}},
    "per_sample": {"feedback": {"rule": "per_sample"}},
    "soft_exact": {"feedback": {"rule": "soft_exact"}, "pseudo_labels": "soft"},
}
"""MPL over a UDA teacher, by rule."""
METHODS = (*BASELINES, *FEEDBACK)
VARIANTS = {"": 1.0, ", h = 0": 0.0, ", flipped": -1.0}
"""Of MPL: what the tuned feedback weight is multiplied by. All else is the tuned MPL's."""
TRIALS, TUNING_SEEDS = 12, range(7000, 7008)
FIRST_SEED, SEEDS = 8000, 120
PRIMARY = ("soft_exact - uda", "soft_exact - soft_exact, h = 0")
"""The family of tests over all tasks of a data set: feedback pays on a task where both are above 0 at p < 0.01."""


def trials() -> list[dict[str, float]]:
    """The same draws for all methods: each reads what it knows."""
    rng = np.random.default_rng(0)

    def log_uniform(low: float, high: float) -> float:
        return round(float(np.exp(rng.uniform(np.log(low), np.log(high)))), 4)

    return [
        {
            "unlabelled_weight": log_uniform(0.1, 5.0),
            "jitter": log_uniform(0.3, 2.0),
            "threshold": float(rng.choice([0.5, 0.7, 0.9])),
            "feedback_weight": log_uniform(0.03, 2.0),
        }
        for _ in range(TRIALS)
    ]


def config_of(data: str, method: str, trial: dict[str, float], *, sign: float = 1.0) -> RunConfig:
    """The configuration of a method with a trial's settings, for all seeds."""
    network = {"name": "two_moons_mlp", "kwargs": {"hidden": 64, "inputs": INPUTS[data], "relu": True}}
    changes: list[dict[str, Any]] = [
        {"model": {"teacher": network, "student": network}, "data": {"jitter": trial["jitter"]}},
        {
            "method": {
                "uda": {"weight": trial["unlabelled_weight"], "temperature": 0.7, "threshold": trial["threshold"]}
            }
        },
        {"method": {"pseudo_label_threshold": trial["threshold"]}},
    ]
    if method in BASELINES:
        changes += [{"method": {"name": method}}]
    else:
        feedback = {"weight": sign * trial["feedback_weight"]} if sign else {"rule": "none"}
        changes += [
            {"method": {"teacher_loss": "uda"}},
            {"method": FEEDBACK[method]},
            {"method": {"feedback": feedback}},
        ]
    section = reduce(merge, changes, BASE)
    return RunConfig(
        path=Path("benchmarks/preregistered.py"),
        mpl=Config.model_validate_json(json.dumps(section)),
        deepspeed={"train_batch_size": BATCH},
    )


class Jittered(PointViews):
    """The strong view of a vector: noise that depends on seed and place in the run alone, the same for all methods."""

    def __init__(self, samples: Samples, config: Config, *, stream: int) -> None:
        super().__init__(samples, config, stream=stream)
        self._noise = torch.Generator().manual_seed(config.seed * 100 + stream)

    def strong(self, weak: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Gaussian noise of standard deviation data.jitter; batches are asked for in their order."""
        return weak + self.config.data.jitter * torch.randn(weak.shape, generator=self._noise)


class Experiment:
    """Accuracies by data set, task, method, trial and seeds; what is kept is not run again."""

    def __init__(self, data: str, kept: Kept, *, drawn: int = TRIALS) -> None:
        self.data, self._kept, self._drawn = data, kept, trials()[:drawn]

    def accuracies(self, task: str, method: str, trial: int, *, seeds: range, sign: float = 1.0) -> list[float]:
        """Top-1 of the network that the method returns, percent, by seed."""
        drawn = self._drawn[trial]

        def measured() -> dict[str, float]:
            digits = Digits(**TASKS[task], vectors=True, data=self.data, pool=POOL[self.data])
            samples = [make_digits(digits, seed=seed) for seed in seeds]
            results, _ = train_many(config_of(self.data, method, drawn, sign=sign), samples, Jittered, seeds=seeds)
            return {str(seed): values["student_top1"] for seed, values in zip(seeds, results, strict=True)}

        found = self._kept(f"{self.data}/{task}/{method} x {sign:g}/{trial}/{seeds.start}-{seeds.stop}", measured)
        return [found[str(seed)] for seed in seeds]

    def tuned(self, task: str, method: str) -> tuple[int, list[float]]:
        """The best trial by the mean over the tuning seeds, the first of equals; and the means of all."""
        means = [
            float(np.mean(self.accuracies(task, method, trial, seeds=TUNING_SEEDS)))
            for trial in range(1 if method == "supervised" else len(self._drawn))
        ]
        return int(np.argmax(means)), means

    def task(self, task: str, *, seeds: range) -> dict[str, Any]:
        """All methods of a task, tuned, then run on the seeds."""
        top1: dict[str, list[float]] = {}
        tuning: dict[str, Any] = {}
        for method in METHODS:
            trial, means = self.tuned(task, method)
            tuning[method] = {"trial": trial, **self._drawn[trial], "means": means}
            for variant in VARIANTS if method in FEEDBACK else ("",):
                name = method + variant
                top1[name] = self.accuracies(task, method, trial, seeds=seeds, sign=VARIANTS[variant])
                print(f"  {name}: {np.mean(top1[name]):.2f} ± {np.std(top1[name], ddof=1):.2f}", flush=True)
        pairs = {
            f"{rule} - {control}": paired(top1[rule], top1[control])
            for rule in FEEDBACK
            for control in ("uda", "fixmatch", *(rule + variant for variant in VARIANTS if variant))
        }
        return {"digits": TASKS[task], "tuning": tuning, "student_top1": top1, "paired": pairs}


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """The p values of one family of tests, adjusted by Holm's method."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = least
    return adjusted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=POOL, default="digits")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="fewer than the page says: only to try the command")
    parser.add_argument("--trials", type=int, default=TRIALS, help="likewise")
    parser.add_argument("--keep", type=Path, default=Path("runs/preregistered.jsonl"), help="runs that are done")
    parser.add_argument("--output", type=Path, metavar="JSON", help="tasks that it has and --tasks has not stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    experiment = Experiment(options.data, Kept(options.keep), drawn=options.trials)
    document = {"kind": "preregistered", "data": options.data, "tasks": {}, "holm": {}}
    if options.output is not None and options.output.exists():
        document = json.loads(options.output.read_text())
    for task in options.tasks:
        print(f"\n{options.data}, {task}", flush=True)
        found = experiment.task(task, seeds=range(FIRST_SEED, FIRST_SEED + options.seeds))
        origin = provenance("benchmarks.preregistered", CPU)
        document |= origin  # of the task that was done last
        document["tasks"][task] = {**origin, **found}
        document["holm"] = holm(
            {
                f"{name}: {pair}": values["t_p"]
                for name, row in document["tasks"].items()
                for pair, values in row["paired"].items()
                if pair in PRIMARY
            }
        )
        for pair, values in found["paired"].items():
            print(f"  {pair}: {written(values)}", flush=True)
        if options.output is not None:
            write(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
