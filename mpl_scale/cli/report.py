"""`mpl-scale report`: runs and benchmark results as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpl_scale.cli.command import Command
from mpl_scale.files import refuse_output, refuse_run


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's output folder, a folder of such folders, a benchmark's result file (.json), or a picture (.png)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page; PNGs of its figures go beside it; default: report.html",
    )
    parser.add_argument("--title", default="Meta Pseudo Labels: report", help="of the page")


def _run(options: argparse.Namespace) -> int:
    refuse_output(options.output, folder=False)
    refuse_run(options.output)
    from mpl_scale.report import write_report  # torch comes with the monitor: seconds

    for path in write_report(options.runs, options.output, title=options.title):
        print(path)
    return 0


REPORT = Command(
    name="report",
    help="one HTML page with tables, training curves and the paper's figures, from runs and benchmark results",
    examples=(
        "mpl-scale report runs/quickstart --output report.html",
        "mpl-scale report runs/supervised runs/uda runs/mpl --output compared.html --title 'Four labels a class'",
        "mpl-scale report benchmarks/results/cpu/digits_table.json benchmarks/results/cpu/two_moons.json "
        "docs/images/two_moons.png",
    ),
    options=_options,
    run=_run,
)
