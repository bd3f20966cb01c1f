"""A table of results: runs that differ only in what is measured become one row, mean ± deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def format_table(rows: Sequence[Mapping[str, Any]], *, by: Sequence[str], columns: Mapping[str, str]) -> str:
    """A Markdown table that also reads as plain text; ends with a line end.

    Args:
        rows: one per run, {"method": "mpl", "seed": 1, "accuracy": 0.97}.
        by: fields that name a configuration; runs equal in these are one row, in order of first appearance.
        columns: measured fields and how to format their numbers, {"accuracy": ".2%"}. Absent or None: not counted.

    A cell holds the mean and, over two runs or more, the sample standard deviation (n - 1); "-" without any run.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
    lines = [[*by, *columns, "runs"]]
    for names, runs in groups.items():
        cells = [_cell([run[c] for run in runs if run.get(c) is not None], spec) for c, spec in columns.items()]
        lines.append([*(str(name) for name in names), *cells, str(len(runs))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    aligned = [
        [_pad(cell, width, column < len(by)) for column, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in aligned)


def _cell(values: Sequence[float], spec: str) -> str:
    """mean ± deviation of the values of one cell."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), spec)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), spec)}"


def _pad(cell: str, width: int, left: bool) -> str:
    """Names to the left, numbers to the right."""
    return cell.ljust(width) if left else cell.rjust(width)
