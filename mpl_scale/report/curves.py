"""Training curves of runs, and differences between methods with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpl_scale.report.drawing import COLOURS, Plot, draw_curve, legend_below, line_style
from mpl_scale.report.material import Comparison, Group, Material, group_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpl_scale.report.drawing import Theme

MOST = 8
"""Configurations of one picture: more lines cannot be told apart."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. metric: of metrics.jsonl; scale: from its unit to the axis'."""

    metric: str
    title: str
    unit: str
    scale: float = 1.0
    zero: bool = False


LEARNING = (
    Panel("student_loss", "Student: training loss", "cross-entropy (nats)"),
    Panel("teacher_supervised_loss", "Teacher: loss on labelled images", "cross-entropy (nats)"),
    Panel("teacher_uda_loss", "Teacher: consistency loss (UDA)", "cross-entropy (nats)"),
    Panel("teacher_mpl_loss", "Teacher: feedback times loss (MPL)", "nats", zero=True),
    Panel("h", "Feedback h", "h, after its baseline", zero=True),
    Panel("cosine", "Cosine of the student's two gradients", "cosine", zero=True),
    Panel("label_agreement", "Pseudo labels that are right", "of those whose truth is known (%)", scale=100),
    Panel("label_evenness", "Pseudo labels over classes", "entropy over its maximum (%)", scale=100),
    Panel("evaluation/student_top1", "Student on the test images", "top-1 (%)"),
    Panel("evaluation/ema_top1", "Average of the student (EMA) on the test images", "top-1 (%)"),
    Panel("evaluation/teacher_top1", "Teacher on the test images", "top-1 (%)"),
)
SPEED = (
    Panel("images_per_second", "Throughput", "images per second"),
    Panel("data_wait_share", "Time spent waiting for data", "share of the time (%)", scale=100),
)


def shown_groups(material: Material) -> list[Group]:
    """All groups, or the best MOST by the accuracy of the network that is returned."""
    if len(material.groups) <= MOST:
        return material.groups

    def best(group: Group) -> float:
        return material.returned("runs", group.label, group.labels)

    chosen = sorted(material.groups, key=best, reverse=True)[:MOST]
    return [group for group in material.groups if group in chosen]


def training_curves(material: Material) -> list[Plot]:
    """Losses, feedback and accuracies over steps; then speed."""
    groups = shown_groups(material)
    left_out = len(material.groups) - len(groups)
    note = f" The {MOST} best of {MOST + left_out} configurations are drawn." if left_out else ""
    several = any(len(group.seeds) > 1 for group in groups)
    band = " Lines are means over seeds, bands one standard deviation." if several else ""
    found = []
    for name, title, panels, caption in (
        ("curves", "Training curves", LEARNING, "The steps that are logged, counted over all phases."),
        (
            "speed",
            "Throughput and data",
            SPEED,
            "Of all ranks together, since the log line before: an evaluation or a save between two lines counts.",
        ),
    ):
        used = [panel for panel in panels if any(_drawable(group, panel) for group in groups)]
        used = [panel for panel in used if any(_lines(group, panel) for group in groups)] or used
        if used:
            found.append(_plot(name, title, f"{caption}{band}{note}", groups, used))
    return found


def _drawable(group: Group, panel: Panel) -> bool:
    return panel.metric in group.curves


def _lines(group: Group, panel: Panel) -> bool:
    """More than one point: what a run ended with is in the table."""
    return _drawable(group, panel) and len(group.curves[panel.metric].steps) > 1


def _plot(name: str, title: str, caption: str, groups: Sequence[Group], panels: Sequence[Panel]) -> Plot:
    rows, names = -(-len(panels) // 2), group_names(groups)

    def draw(figure: Figure, theme: Theme) -> None:
        lines = {}
        for place, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, 2, place)
            axes.set_title(panel.title, loc="left")
            axes.set_ylabel(panel.unit)
            axes.set_xlabel("step")
            if panel.zero:
                axes.axhline(0, color=theme.text, linewidth=0.6)
            for number, group in enumerate(groups):
                if _drawable(group, panel):
                    draw_curve(axes, group.curves[panel.metric], scale=panel.scale, **line_style(number))
                    lines[names[number]] = axes.lines[-1]
            if panel.metric in ("images_per_second", "data_wait_share"):
                axes.set_ylim(bottom=0)
        ordered = [name for name in names if name in lines]
        legend_below(figure, [lines[label] for label in ordered], ordered)

    extra = 0.22 * len(groups) / 2 + 0.2
    alt = f"{', '.join(panel.title for panel in panels)}, over steps, for {len(groups)} configurations"
    return Plot(name, title, caption, alt, (9.6, 2.35 * rows + extra), draw)


def comparisons(material: Material) -> list[Plot]:
    """Paired differences and their 95% intervals, one panel for each setting, one picture for each file."""
    by_source: dict[str, list[Comparison]] = {}
    for comparison in material.comparisons:
        by_source.setdefault(comparison.source, []).append(comparison)
    return [_differences(source, found) for source, found in by_source.items()]


def _written(pair: Mapping[str, float]) -> str:
    """The numbers beside an interval."""
    wins = f", better on {pair['wins']} of {pair['seeds']}" if "wins" in pair and "seeds" in pair else ""
    p = f", p = {pair['t_p']:.1g}" if "t_p" in pair else ""
    return f"{pair['mean']:+.2f} ({pair['low']:.2f} to {pair['high']:.2f}){p}{wins}"


def _differences(source: str, found: Sequence[Comparison]) -> Plot:
    heights = [len(one.rows) + 2.2 for one in found]

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.add_gridspec(len(found), 1, height_ratios=heights)
        for place, one in enumerate(found):
            axes = figure.add_subplot(grid[place])
            axes.axvline(0, color=theme.text, linewidth=0.8)
            for row, pair in enumerate(one.rows.values()):
                sure = pair["low"] > 0 or pair["high"] < 0
                colour = COLOURS[0] if sure else COLOURS[6]
                axes.plot([pair["low"], pair["high"]], [row, row], color=colour, linewidth=2)
                axes.plot(pair["mean"], row, marker="o" if sure else "s", color=colour, markersize=5)
                axes.text(1.02, row, _written(pair), transform=axes.get_yaxis_transform(), va="center", fontsize=8)
            axes.set_yticks(range(len(one.rows)), list(one.rows))
            axes.set_ylim(len(one.rows) - 0.5, -0.5)
            axes.set_title(one.setting, loc="left")
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("difference (percentage points)")

    caption = (
        "Mean paired difference over the same seeds and its 95% interval and p (Student's t). Blue circles: the "
        "interval leaves out zero; grey squares: it does not. No correction for the number of comparisons."
    )
    name = f"differences-{source.partition('.')[0]}"
    alt = f"Intervals of differences for {', '.join(one.setting for one in found)}"
    return Plot(
        name, f"Paired differences ({source})", caption, alt, (9.6, 0.25 * sum(heights) + 0.2 * len(found)), draw
    )
