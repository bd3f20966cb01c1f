"""From the paths on the command line to the page and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpl_scale.files import naming, replace_text
from mpl_scale.report.drawing import Drawn, Plot, render, require_matplotlib
from mpl_scale.report.figures import FIGURES
from mpl_scale.report.material import Material
from mpl_scale.report.page import Picture, make_page
from mpl_scale.report.results import read_results
from mpl_scale.report.runs import Run, add_runs, find_runs

PNG = b"\x89PNG\r\n\x1a\n"


def write_report(paths: Sequence[Path], output: Path, *, title: str = "Meta Pseudo Labels: report") -> list[Path]:
    """Write the page at output, and one PNG beside it for each figure.

    Args:
        paths: each the output folder of a run, a folder that holds such folders, a benchmark's result file (.json), or
            a picture (.png), which is shown as it is.
        output: the HTML file; its folder is made.
        title: of the page.

    Returns:
        What was written, the page first.

    Raises:
        ValueError: names the file that is missing or broken, and the fix; nothing is written.
    """
    require_matplotlib()
    material = read(paths)
    plots = [plot for make in FIGURES.values() for plot in make(material)]
    drawn = [render(plot) for plot in plots]
    pictures = [_picture(plot, files) for plot, files in zip(plots, drawn, strict=True)]
    pictures += [_given(path) for path in material.pictures]
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = [output.with_name(f"{output.stem}-{plot.name}.png") for plot in plots]
    for path, files in zip(beside, drawn, strict=True):
        with naming(path):
            path.write_bytes(files.png)
    replace_text(output, make_page(material, pictures, title=title))
    return [output, *beside]


def read(paths: Sequence[Path]) -> Material:
    """Everything that the paths hold; ValueError as of `write_report`."""
    material, runs = Material(), list[Run]()
    for path in paths:
        if path.is_dir():
            runs += [run for run in find_runs(path) if run.folder not in [one.folder for one in runs]]
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder; give a run's --output, a benchmark's .json or a .png")
        elif path.suffix == ".json":
            read_results(material, path)
        elif path.suffix == ".png":
            if not path.read_bytes().startswith(PNG):
                raise ValueError(f"{path}: not a PNG file; draw it again, or leave it out")
            material.pictures.append(path)
        else:
            raise ValueError(
                f"{path}: neither a folder nor .json nor .png; give a run's --output or a benchmark's file"
            )
    add_runs(material, runs)
    return material


def _picture(plot: Plot, files: Drawn) -> Picture:
    about = (plot.name, plot.title, plot.caption, plot.alt, plot.size[0])
    return Picture(*about, "image/svg+xml", files.light, files.dark)


def _given(path: Path) -> Picture:
    data = path.read_bytes()
    return Picture(
        f"picture-{path.stem}", path.name, f"{path}, as it was given.", path.name, 9.6, "image/png", data, data
    )
