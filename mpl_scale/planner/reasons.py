"""Why a plan is as it is: for each of its settings, what the others would cost or why they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpl_scale.planner.search import Found, Plan

GIGA = 1e9
CAUSES = {
    "compute": "computing",
    "launches": "starting kernels without a graph",
    "halo": "exchanging halos",
    "pools": "sums over the width group",
    "statistics": "batch norm's all-reduces",
    "zero": "reducing gradients and gathering weights",
    "input": "waiting for decoded images",
}
AXES: dict[str, Callable[[Plan], Any]] = {
    "width": lambda plan: plan.choice.width,
    "recompute": lambda plan: plan.choice.recompute,
    "teacher": lambda plan: "deferred" if plan.choice.deferred else "live",
    "ZeRO": lambda plan: (plan.choice.stage, plan.choice.shards),
    "micro-batch": lambda plan: plan.choice.labelled,
}
"""What a plan chooses, by name."""


def reasons(best: Plan, found: Found) -> list[str]:
    """Lines: each setting of the best plan, then every other value with what speaks against it."""
    lines = []
    for axis, value in AXES.items():
        lines.append(f"{axis} {_shown(axis, value(best))}: {_for(best, axis, found)}")
        values = sorted({value(plan) for plan in found.plans} - {value(best)}, key=_place)
        for other in values:
            pool = _alike(axis, best, [plan for plan in found.plans if value(plan) == other])
            if not pool:
                continue
            lines.append(f"  not {_shown(axis, other)}: {against(best, pool, axis)}")
        prefix = f"{axis} "
        lines += [f"  not {name.removeprefix(prefix)}: {why}" for name, why in found.refused.items() if prefix in name]
    return lines


def _place(value: Any) -> tuple[str, Any]:
    """An order for any setting's values: names by the alphabet, a list for each stage behind them, numbers by size."""
    if isinstance(value, tuple) and isinstance(value[0], str):
        return "tuple", value
    return "name" if isinstance(value, str) else "number", value


def _alike(axis: str, best: Plan, plans: list[Plan]) -> list[Plan]:
    """A data rank's micro-batch means something only among plans of one width."""
    return [plan for plan in plans if axis != "micro-batch" or plan.choice.width == best.choice.width]


def _shown(axis: str, value: Any) -> str:
    if axis == "ZeRO" and isinstance(value, tuple):
        return f"stage {value[0]}" + (f" over {value[1]} ranks" if value[0] else "")
    return "-".join(value) if isinstance(value, tuple) else str(value)


def _for(best: Plan, axis: str, found: Found) -> str:
    """What speaks for the best plan's own value."""
    value = AXES[axis]
    others = _alike(axis, best, [plan for plan in found.fitting if value(plan) != value(best)])
    everything = _alike(axis, best, [plan for plan in found.plans if value(plan) != value(best)])
    if not others:
        return "the only one that fits" if everything else "the only one there is"
    runner_up = others[0]
    lead = runner_up.duration.total / best.duration.total
    if lead < 1.0005:
        return f"as fast as {_shown(axis, value(runner_up))}, and simpler or smaller"
    return f"the fastest that fits, by {_percent(lead)} before {_shown(axis, value(runner_up))}"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):.3g}%" if ratio < 2 else f"a factor of {ratio:.3g}"


def _milliseconds(value: float) -> str:
    return f"{value:+,.0f} ms" if abs(value) >= 100 else f"{value:+.3g} ms"


def against(best: Plan, pool: list[Plan], axis: str) -> str:
    """What speaks against every plan of a pool: it does not fit, or it is slower, and by what."""
    fitting = sorted((plan for plan in pool if plan.fits), key=lambda plan: plan.duration.total)
    if not fitting:
        return misfit(min(pool, key=lambda plan: plan.memory.total), smallest=True)
    other = fitting[0]
    ratio = other.duration.total / best.duration.total
    if ratio < 1.0005:
        return "as fast"
    before, after = best.duration.by_cause(), other.duration.by_cause()
    cause = max(after, key=lambda name: after[name] - before.get(name, 0.0))
    more = 1e3 * (after[cause] - before.get(cause, 0.0))
    changes = [
        f"{name} {_shown(name, value(other))}"
        for name, value in AXES.items()
        if name != axis and value(other) != value(best) and _alike(name, best, [other])
    ]
    needs = f" (at best with {', '.join(changes)})" if changes else ""
    return f"{_percent(ratio)} slower{needs}: {_milliseconds(more)} a step of {CAUSES[cause]}"


def misfit(plan: Plan, *, smallest: bool = False) -> str:
    """Why a plan does not fit, by its largest part."""
    categories, device = plan.memory.categories, plan.machine.device
    largest = max(categories, key=lambda name: categories[name])
    where = "even the smallest takes" if smallest else "it takes"
    return (
        f"{where} {plan.memory.total / GIGA:.1f} GB per rank, {categories[largest] / GIGA:.1f} GB of it "
        f"{largest.replace('_', ' ')}, at {plan.choice.labelled} labelled images a micro-batch; the device has "
        f"{device.memory / GIGA:.0f} GB"
    )
