"""Pictures: what a plot is, the two themes it is drawn in, and the one place that imports matplotlib.

Colours are those of Okabe and Ito, told apart by colour-blind people, but for black and yellow, which one of the two
themes would hide; lines repeat them with other dashes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpl_scale.packages import require_packages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mpl_scale.report.material import Curve

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
POINTS = 400
"""Of a line; more cannot be seen."""
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True)
class Theme:
    """Colours of everything but the data."""

    face: str
    text: str
    faint: str


LIGHT = Theme(face="#ffffff", text="#1c1c1c", faint="#d9d9d9")
DARK = Theme(face="#16181b", text="#e4e4e4", faint="#3b3f44")


@dataclass(frozen=True)
class Plot:
    """A picture of the report.

    name: of its file. title and caption: beside it. alt: what it shows, for those who cannot see it. size: inches.
    draw: puts axes into the figure.
    """

    name: str
    title: str
    caption: str
    alt: str
    size: tuple[float, float]
    draw: Callable[[Figure, Theme], None]


def require_matplotlib() -> None:
    """Raise ValueError, with the way to install it, where matplotlib is missing."""
    require_packages([("mpl-scale report", "matplotlib")])


@dataclass(frozen=True)
class Drawn:
    """A plot as files: SVG in both themes, PNG in the light one."""

    light: bytes
    dark: bytes
    png: bytes


def render(plot: Plot, *, dpi: int = 150) -> Drawn:
    """Draw once, write three times; the same bytes for the same data."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), LIGHT.text)
    face = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), LIGHT.face)
    settings: Any = {**STYLE, **text, **face, "grid.color": LIGHT.faint, "svg.hashsalt": plot.name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=plot.size, layout="constrained")
        FigureCanvasAgg(figure)
        plot.draw(figure, LIGHT)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=dpi, metadata={"Software": None})
        figure.set_layout_engine("none")  # its places hold: finding them again takes as long as drawing
        figure.savefig(svg, format="svg", metadata={"Date": None})
    dark = svg.getvalue()
    for ours, theirs in ((LIGHT.face, DARK.face), (LIGHT.text, DARK.text), (LIGHT.faint, DARK.faint)):
        dark = dark.replace(ours.encode(), theirs.encode())  # no datum has one of these colours
    return Drawn(svg.getvalue(), dark, png.getvalue())


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the line of that number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def draw_curve(axes: Axes, curve: Curve, *, scale: float = 1.0, **style: Any) -> None:
    """The mean as a line, over a band of one deviation where there are several runs."""
    stride = max(1, -(-len(curve.steps) // POINTS))
    # the last point is what a run ended with: it always stands
    chosen = sorted({*range(0, len(curve.steps), stride), len(curve.steps) - 1})
    steps = [curve.steps[i] for i in chosen]
    mean = [scale * curve.mean[i] for i in chosen]
    spread = [scale * curve.deviation[i] for i in chosen]
    axes.plot(steps, mean, marker="o" if len(steps) == 1 else None, **style)
    if any(spread):
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend under all axes, with as many columns as the labels leave room for."""
    if not handles:
        return
    width = 0.085 * max(len(label) for label in labels) + 0.6  # inches of an entry at 9 points
    columns = max(1, min(len(labels), int((figure.get_figwidth() - 0.2) / width)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
