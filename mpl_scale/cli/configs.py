"""`mpl-scale configs`: the configurations that come with the package."""

from __future__ import annotations

import argparse

from mpl_scale.cli.command import Command
from mpl_scale.config.shipped import shipped_configs


def _options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def _run(options: argparse.Namespace) -> int:
    found = shipped_configs()
    width = max(map(len, found))
    for name, paper in found.items():
        print(f"{name:{width}}  {paper}")
    return 0


CONFIGS = Command(
    name="configs",
    help="list the configurations that come with the package, each with its place in the paper",
    examples=("mpl-scale configs",),
    options=_options,
    run=_run,
)
