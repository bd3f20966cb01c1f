"""The paper's Figures 2 to 5 from what was read, each where its methods are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mpl_scale.config.names import Registry
from mpl_scale.report.controls import twin_of
from mpl_scale.report.curves import comparisons, training_curves
from mpl_scale.report.drawing import COLOURS, MARKERS, Plot, draw_curve, line_style
from mpl_scale.report.material import Material, Moons, Outcome, Training, mean_and_deviation, top1_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpl_scale.report.drawing import Theme

FIGURES: Registry[Callable[[Material], list[Plot]]] = Registry("figure")
"""In the order of the page; each gives no plots where its runs are not there."""
STAGES = {
    "supervised": "supervised",
    "uda": "+ UDA",
    "control": "MPL with h = 0",
    "mpl": "MPL",
    "finetuned": "+ finetuning",
}
SHOWN = 3
"""Configurations of Figure 4 for each line of the paper's: the best of them."""
SUCCESS = 95.0
"""Two moons: more is a success, percent."""


@FIGURES.register("breakdown")
def breakdown(material: Material) -> list[Plot]:
    """Figure 3: supervised, + UDA, MPL without and with feedback, + finetuning; of several configurations the best.

    MPL stands here beside its control only.
    """
    panels = {}
    for (source, labels), methods in material.tables().items():
        bars: dict[str, tuple[float, float, int]] = {}
        for method in sorted(methods, key=lambda name: material.returned(source, name, labels)):  # the best is the last
            runs, stage = methods[method], methods[method][0].stage
            parts: list[tuple[str | None, str, list[Outcome]]] = [(stage, "student", runs)]
            if stage == "mpl":
                twin = twin_of(material, source, labels, method)
                parts = [("control", "student", twin), *parts, ("finetuned", "finetuned", runs)] if twin else []
            for name, network, these in parts:
                values = top1_of(these, network)
                if name and values:
                    bars[name] = (*mean_and_deviation(values), len(values))
        if "supervised" in bars and len(bars) > 1:
            panels[_where(source, labels)] = {name: bars[name] for name in STAGES if name in bars}
    if not panels:
        return []
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Figure, theme: Theme) -> None:
        for place, (where, bars) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            lowest = min(mean - deviation for mean, deviation, _ in bars.values())
            highest = max(mean + deviation for mean, deviation, _ in bars.values())
            bottom = max(0.0, lowest - 0.35 * max(highest - lowest, 1.0))
            for x, (name, (mean, deviation, _)) in enumerate(bars.items()):
                axes.bar(x, mean - bottom, bottom=bottom, width=0.62, color=COLOURS[list(STAGES).index(name)])
                if deviation:
                    axes.errorbar(x, mean, yerr=deviation, color=theme.text, capsize=3, linewidth=1)
                axes.annotate(
                    f"{mean:.1f}", (x, mean + deviation), xytext=(0, 3), textcoords="offset points", ha="center"
                )
            axes.set_xticks(range(len(bars)), [STAGES[name] for name in bars])
            axes.set_ylim(bottom, highest + 0.12 * (highest - bottom))
            axes.set_ylabel("top-1 (%)")
            axes.set_title(where, loc="left")
            axes.grid(axis="x", visible=False)

    caption = (
        "Each bar adds one part to the bar before it; mean over seeds, whiskers one standard deviation. The axis does "
        "not begin at 0. Of several configurations of one method, the one whose returned network is best is drawn. "
        "MPL is drawn only beside its control on the same seeds, whose feedback is h = 0: what feedback adds is the "
        "step between the two."
    )
    alt = "; ".join(
        f"{where}: {', '.join(f'{STAGES[name]} {mean:.1f}%' for name, (mean, *_) in bars.items())}"
        for where, bars in panels.items()
    )
    size = (4.8 * columns if columns > 1 else 6.0, 3.0 * rows)
    return [Plot("breakdown", "Breakdown of gains (Figure 3)", caption, alt, size, draw)]


@FIGURES.register("training_accuracy")
def training_accuracy(material: Material) -> list[Plot]:
    """Figure 4: what a network is taught, and how much of it it gets right."""
    panels: dict[str, list[Training]] = {}
    for curve in material.training:
        panels.setdefault(_where(curve.source, curve.labels), []).append(curve)
    panels = {where: _best(material, curves) for where, curves in panels.items()}
    panels = {
        where: curves for where, curves in panels.items() if {"supervised", "student"} <= {c.kind for c in curves}
    }
    if not panels:
        return []
    styles = {"supervised": COLOURS[0], "student": COLOURS[5], "teacher": COLOURS[2]}

    def draw(figure: Figure, theme: Theme) -> None:
        for place, (where, curves) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(len(panels), 1, place)
            seen: dict[str, int] = {}
            for curve in curves:
                number = seen[curve.kind] = seen.get(curve.kind, -1) + 1
                dashes = line_style(len(COLOURS) * number)["linestyle"]
                draw_curve(axes, curve.curve, color=styles[curve.kind], linestyle=dashes, label=curve.who)
            axes.set_ylim(0, 103)
            axes.set_xlabel("step of phase train")
            axes.set_ylabel("training accuracy (%)")
            axes.set_title(where, loc="left")
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    caption = (
        "Training accuracy: of the supervised network and of the teacher on labelled images, of MPL's student on the "
        "pseudo labels that it is taught. The paper's student stays below the supervised network. At most the best "
        f"{SHOWN} configurations of each are drawn."
    )
    alt = f"Training accuracy over steps of {', '.join(curve.who for curves in panels.values() for curve in curves)}"
    return [Plot("training-accuracy", "Training accuracy (Figure 4)", caption, alt, (9.6, 3.1 * len(panels)), draw)]


def _best(material: Material, curves: Sequence[Training]) -> list[Training]:
    """The SHOWN curves of every kind whose runs ended with the best accuracy."""

    def rank(curve: Training) -> float:
        return -material.returned(curve.source, curve.method, curve.labels)

    kept = [
        curve
        for kind in ("supervised", "student", "teacher")
        for curve in sorted((c for c in curves if c.kind == kind), key=rank)[:SHOWN]
    ]
    return [curve for curve in curves if curve in kept]


@FIGURES.register("labels")
def labels(material: Material) -> list[Plot]:
    """Figure 5: accuracy of the network that is returned, over labelled images a class."""
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for outcome in material.outcomes:
        if outcome.labels is not None and outcome.returned is not None:
            methods = panels.setdefault(outcome.source, {})
            methods.setdefault(outcome.method, {}).setdefault(outcome.labels, []).append(outcome.returned)
    panels = {
        source: several
        for source, methods in panels.items()
        if (several := {method: counts for method, counts in methods.items() if len(counts) > 1})
    }
    return [_accuracy_over_labels(source, methods) for source, methods in panels.items()]


def _accuracy_over_labels(source: str, methods: dict[str, dict[float, list[float]]]) -> Plot:
    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot(1, 1, 1)
        counts = sorted({count for points in methods.values() for count in points})
        for number, points in enumerate(methods.values()):
            ordered = sorted(points)
            cells = [mean_and_deviation(points[count]) for count in ordered]
            # beside each other: whiskers of several methods at one count would hide one another
            shift = 1 + min(0.018, 0.12 / len(methods)) * (number - (len(methods) - 1) / 2)
            axes.errorbar(
                [count * shift for count in ordered],
                [mean for mean, _ in cells],
                yerr=[deviation for _, deviation in cells],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                capsize=3,
                **line_style(number),
            )
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("labelled images a class (logarithmic)")
        axes.set_ylabel("top-1 (%)")
        axes.legend(axes.containers, list(methods), loc="center left", bbox_to_anchor=(1.0, 0.5))

    caption = "The finetuned student where there is one, else the student; mean over seeds, one standard deviation."
    name = "labels" if source == "runs" else f"labels-{source.partition('.')[0]}"
    size = (9.6, max(3.8, 0.2 * len(methods) + 0.6))
    title = f"Accuracy against labels (Figure 5){'' if source == 'runs' else f', {source}'}"
    return Plot(name, title, caption, f"Accuracy over labels a class of {', '.join(methods)}", size, draw)


@FIGURES.register("two_moons")
def two_moons(material: Material) -> list[Plot]:
    """Figure 2 in numbers: each seed's accuracy, and the line above which it is a success."""
    if not material.moons:
        return []
    tables: Sequence[Moons] = material.moons
    heights = [len(one.accuracy) + 2.0 for one in tables]

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.add_gridspec(len(tables), 1, height_ratios=heights)
        for place, one in enumerate(tables):
            axes = figure.add_subplot(grid[place])
            axes.axvline(SUCCESS, color=theme.text, linewidth=0.8, linestyle="--")
            for row, values in enumerate(one.accuracy.values()):
                spread = [row + 0.36 * (seed / max(len(values) - 1, 1) - 0.5) for seed in range(len(values))]
                axes.scatter(values, spread, s=16, color=COLOURS[row % len(COLOURS)], alpha=0.8, linewidths=0)
                mean = mean_and_deviation(values)[0]
                axes.plot([mean, mean], [row - 0.32, row + 0.32], color=theme.text, linewidth=1.6)
            names = [f"{name} ({100 * one.success[name]:.0f}% succeed)" for name in one.accuracy]
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xlabel("points classified right (%)")
            axes.set_title(f"{one.source}: {one.table}", loc="left")
            axes.grid(axis="y", visible=False)

    caption = "One dot for each seed, the short line their mean; right of the dashed line (95%) a run is a success."
    alt = "; ".join(f"{one.table}: {', '.join(one.accuracy)}" for one in tables)
    size = (9.6, 0.36 * sum(heights) + 0.3)
    return [Plot("two-moons", "Two moons (Figure 2)", caption, f"Accuracy of each seed. {alt}", size, draw)]


FIGURES.register("curves")(training_curves)
FIGURES.register("comparisons")(comparisons)


def _where(source: str, labels: float | None) -> str:
    return source if labels is None else f"{source}, {labels:g} labels a class"
