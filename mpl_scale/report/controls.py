"""The control of a gain: the same run with feedback h = 0. What has none beside it is not shown as a gain of MPL.

A student of MPL sees strong views and a teacher's labels; most of its lead over supervised training comes from them.
What the feedback adds is the difference to `feedback.rule: none` with everything else, seeds included, alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from mpl_scale.report.material import Material, Outcome

METHODS = ("mpl", "reduced_mpl")
CONTROL_RULES = ("none", "flipped")
RULE = "mpl_scale.method.feedback.rule"
FEEDBACK = "mpl_scale.method.feedback."
LOGGING = "mpl_scale.logging."
METHOD = "mpl_scale.method.name"
ENDINGS = (", no feedback", "_no_feedback", ", feedback none")
"""What the benchmarks call the control of a method: its name and one of these."""
SHARED = {"mpl_per_sample": "mpl_no_feedback"}
"""Methods of the benchmarks whose control has another name."""
LISTED = 10


def is_fed_back(settings: Mapping[str, Any]) -> bool:
    """Whether a run's student taught its teacher; settings: dotted fields."""
    return settings[METHOD] in METHODS and settings.get(RULE) not in CONTROL_RULES


def without_feedback(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run and its control have in common: neither their feedback section nor what is logged of it."""
    return {name: value for name, value in settings.items() if not name.startswith((FEEDBACK, LOGGING))}


def is_control(settings: Mapping[str, Any]) -> bool:
    """Whether a run is MPL with h = 0."""
    return settings[METHOD] in METHODS and settings.get(RULE) == "none"


def named_fed_back(method: str) -> bool:
    """As `is_fed_back`, by what the benchmarks call a method."""
    return bool(re.match(r"(reduced )?mpl\b|mpl_", method)) and not (
        method.endswith(ENDINGS) or re.search(r"\bflipped|_flipped", method)
    )


def named_twin(method: str, methods: Collection[str]) -> str | None:
    """The control of a benchmark's method among those of its file; None: it is not there."""
    names = (SHARED.get(method), *(method + ending for ending in ENDINGS))
    return next((name for name in names if name in methods), None)


def with_control(pairs: Mapping[str, Mapping[str, float]], methods: Collection[str]) -> dict[str, Mapping[str, float]]:
    """Those of a file's differences "A - B" whose A has its control in the file, or is not MPL with feedback."""
    firsts = {row: row.partition(" - ")[0] for row in pairs}
    return {
        row: pair
        for row, pair in pairs.items()
        if not named_fed_back(firsts[row]) or named_twin(firsts[row], methods) is not None
    }


def twin_of(material: Material, source: str, labels: float | None, method: str) -> list[Outcome]:
    """The outcomes of a method's control on its seeds, in their order; empty where one is missing."""
    methods = material.tables().get((source, labels), {})
    runs = methods.get(method, [])
    by_seed = {run.seed: run for run in methods.get(runs[0].twin or "", [])} if runs else {}
    return [by_seed[run.seed] for run in runs] if runs and all(run.seed in by_seed for run in runs) else []


def refused(material: Material) -> dict[str, list[str]]:
    """MPL's configurations whose gain is not shown, by source."""
    found: dict[str, list[str]] = {}
    for (source, labels), methods in material.tables().items():
        for method, runs in methods.items():
            if runs[0].fed_back and not twin_of(material, source, labels, method):
                where = method if labels is None else f"{method} ({labels:g} labels a class)"
                found.setdefault(source, []).append(where)
    return found


def refusal(names: list[str]) -> str:
    """The sentence that stands where a gain would; names: of `refused`."""
    listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    return (
        f"{listed}: no runs with feedback.rule none and everything else alike, seeds included, are beside these, so "
        "neither Figure 3 nor paired differences show what MPL gains."
    )
