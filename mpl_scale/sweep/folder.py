"""The folder of a sweep: one folder for each run in it, which says by its files how far the run is.

DIR/sweep.json          what was declared; another declaration is refused
    DIR/trials.txt          the folders below, one a line, for slurm/sweep.sbatch; final runs: finals.txt
DIR/trial_007/          a run, as train.py leaves it, and
    ds_config.json      the base and this trial's values; written before anything runs
    error.json          {"status": 1, "error": "..."}: the trial ended without a result
    log.txt             what it printed
DIR/final_003_seed_1/   trial 3 again, on seed 1
DIR/best.json           a ds_config with the best trial's values
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mpl_scale.config import load_config
from mpl_scale.files import replace_text
from mpl_scale.monitor import config_hash
from mpl_scale.monitor.summary import DONE_NAME, SUMMARY_NAME
from mpl_scale.sweep.spec import Spec, nested

CONFIG_NAME, SWEEP_NAME, BEST_NAME = "ds_config.json", "sweep.json", "best.json"
TRIALS_NAME, FINALS_NAME = "trials.txt", "finals.txt"
ERROR_NAME, LOG_NAME = "error.json", "log.txt"
CANDIDATES = ("finetuned.top1", "student.top1")
"""What is compared where the spec says nothing: the first that the runs have."""


class State(Enum):
    """How far a run of a sweep is."""

    NEW = "not begun"
    BEGUN = "begun"
    FAILED = "failed"
    DONE = "done"


@dataclass(frozen=True, eq=False)
class Task:
    """One run of a sweep. index: of the trial whose values it has. seed: of a final run."""

    folder: Path
    index: int
    values: dict[str, Any]
    seed: int | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> Path:
        return self.folder / CONFIG_NAME

    def state(self) -> State:
        """The state that its files show."""
        if (self.folder / DONE_NAME).exists() and (self.folder / SUMMARY_NAME).exists():
            return State.DONE
        if (self.folder / ERROR_NAME).exists():
            return State.FAILED
        return State.BEGUN if (self.folder / "metrics.jsonl").exists() else State.NEW

    def results(self) -> dict[str, Any]:
        """Results from the run's summary; {} where it has not ended. ValueError names a file that cannot be read."""
        if self.state() is not State.DONE:
            return {}
        path = self.folder / SUMMARY_NAME
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {type(error).__name__}: {error}; remove it and run the sweep again") from None

    def error(self) -> str:
        """What it failed with, one line; empty where it did not."""
        try:
            return str(json.loads((self.folder / ERROR_NAME).read_text(encoding="utf-8"))["error"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def fail(self, status: int, error: str) -> None:
        """Record that it ended without a result."""
        replace_text(self.folder / ERROR_NAME, json.dumps({"status": status, "error": error}) + "\n")


class Sweep:
    """The runs of a spec below one folder. Nothing is written before `prepare`."""

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.trials = [Task(folder / f"trial_{index:03d}", index, spec.trial(index)) for index in range(spec.trials)]

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Write the declaration, and the configurations and the list of these runs: all trials, or all final runs.

        Raises:
            ValueError: the folder is another sweep's.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._declare()
        for task in tasks:
            task.folder.mkdir(exist_ok=True)
            self._write_config(task.config, task.values)
        listing = TRIALS_NAME if tasks[0].seed is None else FINALS_NAME
        replace_text(self.folder / listing, "".join(f"{task.name}\n" for task in tasks))

    def metric(self) -> str | None:
        """What is compared; None while no trial is done."""
        if self.spec.metric is not None:
            return self.spec.metric
        done = [task.results() for task in self.trials if task.state() is State.DONE]
        return next((name for name in CANDIDATES if any(measured(results, name) is not None for results in done)), None)

    def ranked(self) -> list[tuple[float, Task]]:
        """Trials that are done, the best first; the same whatever the order in which they ended.

        Raises:
            ValueError: a trial that is done has not measured what the spec compares.
        """
        metric = self.metric()
        found = []
        for task in self.trials:
            if metric is not None and task.state() is State.DONE:
                value = measured(task.results(), metric)
                if value is None:
                    raise ValueError(
                        f"{self.spec.path}: metric = '{metric}', which {task.folder / SUMMARY_NAME} does not have; it "
                        f"has {', '.join(names(task.results()))}"
                    )
                found.append((value, task))
        sign = 1 if metric is not None and metric.endswith("loss") else -1
        return sorted(found, key=lambda pair: (sign * pair[0], pair[1].index))

    def finals(self) -> list[Task]:
        """The best trials on every seed; none where the spec has no seeds.

        Raises:
            ValueError: trials are left, so that the best are not known; or all have failed.
        """
        if not self.spec.seeds:
            return []
        left = [task.name for task in self.trials if task.state() in (State.NEW, State.BEGUN)]
        if left:
            raise ValueError(
                f"{self.folder}: the final runs follow from all trials, and {len(left)} have not ended ({left[0]}, "
                "...): run them first, or lower --trials"
            )
        best = self.ranked()[: self.spec.best]
        if not best:
            raise ValueError(f"{self.folder}: no trial has a result; see {self.trials[0].folder / ERROR_NAME}")
        return [
            Task(
                self.folder / f"final_{task.index:03d}_seed_{seed}",
                task.index,
                self.spec.final(task.index, seed=seed),
                seed,
            )
            for _, task in best
            for seed in self.spec.seeds
        ]

    def write_best(self) -> Path | None:
        """best.json: a ds_config with the best trial's values; None while no trial is done."""
        ranked = self.ranked()
        if not ranked:
            return None
        path = self.folder / BEST_NAME
        self._write_config(path, ranked[0][1].values)
        return path

    def _write_config(self, path: Path, values: dict[str, Any]) -> None:
        base = os.path.relpath(self.spec.ds_config.resolve(), path.parent.resolve())
        text = json.dumps({"include": base, **nested(values)}, indent=2) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            replace_text(path, text)

    def _declare(self) -> None:
        """What decides on the trials' values; how many there are, and what follows on them, may change."""
        base = load_config(self.spec.ds_config)
        # what the file gives, not what it resolves to: a later version has more fields
        given = {**base.deepspeed, "mpl_scale": base.mpl.model_dump(mode="json", exclude_unset=True)}
        declared = {
            "ds_config": config_hash(given),
            "seed": self.spec.seed,
            "space": self.spec.declared,
            "set": dict(self.spec.settings),
        }
        path = self.folder / SWEEP_NAME
        if not path.exists():
            replace_text(path, json.dumps(declared, indent=2) + "\n")
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read as JSON: {error}; choose another --output") from None
        changed = [key for key in declared if not isinstance(before, dict) or before.get(key) != declared[key]]
        if changed:
            raise ValueError(
                f"{self.folder} holds a sweep with another {changed[0]}; give the spec that it was begun with, or "
                "choose another --output"
            )


def measured(results: dict[str, Any], metric: str) -> float | None:
    """A result by name, as student.top1."""
    network, _, measure = metric.partition(".")
    value = results.get(network, {}).get(measure)
    return None if value is None else float(value)


def names(results: dict[str, Any]) -> list[str]:
    """Names of all results, as student.top1."""
    return [f"{network}.{measure}" for network, values in results.items() for measure in values]
