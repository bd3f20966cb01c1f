"""What a sweep has found so far, as a table."""

from __future__ import annotations

import json
import statistics
from typing import Any

from mpl_scale.sweep.folder import State, Sweep, Task, measured

SHOWN_VALUE = 24
"""Characters of a value in the table."""


def summary_lines(sweep: Sweep) -> list[str]:
    """Trials, the best first; those without a result; then the final runs, mean and deviation over their seeds."""
    metric, ranked = sweep.metric(), sweep.ranked()
    states = {task: task.state() for task in sweep.trials}
    counts = ", ".join(f"{sum(s is state for s in states.values())} {state.value}" for state in State)
    lines = [f"{len(sweep.trials)} trials: {counts}"]
    if ranked:
        fields = list(sweep.spec.space)
        short = [field.removeprefix("mpl_scale.") for field in fields]
        rows = [["trial", str(metric), *short]]
        rows += [[task.name, f"{value:.3f}", *_drawn(task, fields)] for value, task in ranked]
        lines += ["", *_aligned(rows)]
    failed = [task for task, state in states.items() if state is State.FAILED]
    if failed:
        lines += ["", *(f"{task.name} failed: {task.error()}" for task in failed)]
    if sweep.spec.seeds and ranked and not any(state in (State.NEW, State.BEGUN) for state in states.values()):
        lines += ["", *_finals(sweep, str(metric))]
    return lines


def _finals(sweep: Sweep, metric: str) -> list[str]:
    by_trial: dict[int, list[Task]] = {}
    for task in sweep.finals():
        by_trial.setdefault(task.index, []).append(task)
    rows = [["best trials", metric, "deviation", "seeds"]]
    for index, tasks in by_trial.items():
        done = [task for task in tasks if task.state() is State.DONE]
        values = [value for task in done if (value := measured(task.results(), metric)) is not None]
        mean = f"{statistics.fmean(values):.3f}" if values else "-"
        deviation = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
        rows.append([f"trial_{index:03d}", mean, deviation, f"{len(values)} of {len(tasks)}"])
    failed = [task for tasks in by_trial.values() for task in tasks if task.state() is State.FAILED]
    return [*_aligned(rows), *(f"{task.name} failed: {task.error()}" for task in failed)]


def _drawn(task: Task, fields: list[str]) -> list[str]:
    """The values of the space's fields; a section's as one value."""
    cells = []
    for field in fields:
        inner = {name[len(field) + 1 :]: value for name, value in task.values.items() if name.startswith(f"{field}.")}
        cells.append(_cell(task.values.get(field, inner)))
    return cells


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[: SHOWN_VALUE - 3]}..."


def _aligned(rows: list[list[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
