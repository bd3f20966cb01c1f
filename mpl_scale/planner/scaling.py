"""The sweep over numbers of devices, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpl_scale.packages import require_packages
from mpl_scale.planner.search import Plan

Swept = Mapping[int, tuple[Plan | None, Plan | None]]
"""Of search.sweep: by number of devices, the fastest plan of whole images and the fastest of split ones."""


def efficiency(found: Swept) -> dict[int, tuple[float | None, float | None]]:
    """Images per second and device, as a share of the most that any plan of the sweep reaches."""

    def rate(plan: Plan | None) -> float | None:
        return None if plan is None else plan.images_per_second / plan.choice.world

    rates = {world: (rate(whole), rate(split)) for world, (whole, split) in found.items()}
    best = max((value for pair in rates.values() for value in pair if value is not None), default=1.0)
    return {
        world: (None if whole is None else whole / best, None if split is None else split / best)
        for world, (whole, split) in rates.items()
    }


def lines(found: Swept) -> list[str]:
    """A row for each number of devices: both plans' step times and efficiencies, and which is to be taken."""
    shares = efficiency(found)
    rows = [f"{'devices':>8} {'whole: ms':>11} {'eff':>6} {'split: ms':>11} {'eff':>6} {'width':>5}  best plan"]
    for world, pair in found.items():
        cells = ""
        for plan, share in zip(pair, shares[world], strict=True):
            cells += f" {'-':>11} {'-':>6}" if plan is None else f" {1e3 * plan.duration.total:>11.1f} {share:>6.1%}"
        fitting = [plan for plan in pair if plan is not None]
        best = min(fitting, key=lambda plan: plan.duration.total, default=None)
        width = "-" if pair[1] is None else str(pair[1].choice.width)
        rows.append(f"{world:>8}{cells} {width:>5}  {best.choice if best else 'none fits'}")
    return [*rows, *_verdict(found)]


def _verdict(found: Swept) -> list[str]:
    """At which numbers of devices a width partition is faster than whole images, or the only plan that fits."""
    only = [world for world, (whole, split) in found.items() if whole is None and split is not None]
    faster = [
        world
        for world, (whole, split) in found.items()
        if whole is not None and split is not None and split.duration.total < whole.duration.total
    ]
    said = []
    if faster:
        said.append(f"the width partition is faster at {', '.join(map(str, faster))} devices")
    if only:
        said.append(f"only a width partition fits at {', '.join(map(str, only))} devices")
    return [*said] or ["whole images are faster at every number of devices"]


def plot(found: Swept, path: Path, *, title: str) -> None:
    """Efficiency over devices, one curve for whole images, one for split ones; PNG or SVG by the file's name.

    Raises:
        ValueError: matplotlib is not installed, or another kind of file.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot {path}: name a .png or .svg file")
    require_packages([(f"--plot {path}", "matplotlib")])
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = efficiency(found)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for index, name in enumerate(("whole images", "split by width")):
        points = [(world, pair[index]) for world, pair in shares.items() if pair[index] is not None]
        if points:
            axes.plot([world for world, _ in points], [100 * share for _, share in points if share], "o-", label=name)
    _decorate(axes, list(found), title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _decorate(axes: Any, worlds: list[int], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(worlds, [str(world) for world in worlds])
    axes.set_ylim(0, 105)
    axes.set_xlabel("devices")
    axes.set_ylabel("images per second and device, % of the best")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
