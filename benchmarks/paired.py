"""Two methods on the same seeds: mean difference, its 95% interval and two p values; and runs kept as they finish."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

Values = dict[str, float]


def paired(ours: Sequence[float], control: Sequence[float]) -> dict[str, float]:
    """Statistics of the differences ours - control, seed by seed.

    Returns:
        mean, low and high (Student's 95% interval of the mean), t_p (two-sided paired t test), sign_p (two-sided sign
        test, ties left out), wins, ties, seeds. Where all differences are equal, t_p is 1 for zero and 0 otherwise.

    Raises:
        ValueError: not the same number of values, or fewer than two.
    """
    if len(ours) != len(control) or len(ours) < 2:
        raise ValueError(f"{len(ours)} and {len(control)} values cannot be paired; give both for the same seeds, >= 2")
    difference = np.asarray(ours, float) - np.asarray(control, float)
    count, mean, error = len(difference), difference.mean(), stats.sem(difference)
    reach = error * stats.t.ppf(0.975, count - 1)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    t_p = float(2 * stats.t.sf(abs(mean / error), count - 1)) if error > 0 else float(mean == 0)
    sign_p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return {
        "mean": float(mean),
        "low": float(mean - reach),
        "high": float(mean + reach),
        "t_p": t_p,
        "sign_p": sign_p,
        "wins": wins,
        "ties": count - wins - losses,
        "seeds": count,
    }


def written(pair: Mapping[str, float]) -> str:
    """A comparison as one line of text."""
    return (
        f"{pair['mean']:+.2f} [{pair['low']:+.2f}, {pair['high']:+.2f}], t p {pair['t_p']:.2g}, "
        f"sign p {pair['sign_p']:.2g}, {pair['wins']} of {pair['seeds']}"
    )


class Kept:
    """Results of runs by name, in a JSON-lines file: what is there is not run again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Values] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self._found[row.pop("run")] = row

    def __call__(self, name: str, run: Callable[[], Mapping[str, float]]) -> Values:
        """The run's results, from the file or from running it."""
        if name not in self._found:
            values = dict(run())
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a") as file:
                file.write(json.dumps({"run": name, **values}) + "\n")
            self._found[name] = values
        return self._found[name]
