"""`mpl-scale check`: validate a configuration and print its batch equation."""

from __future__ import annotations

import argparse

from mpl_scale.cli.command import Command, add_config_options, load, positive
from mpl_scale.config import check


def _options(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    parser.add_argument("--world", type=positive, default=1, metavar="N", help="number of ranks")


def _run(options: argparse.Namespace) -> int:
    print(check(load(options), world=options.world, cuda=False).equation())
    return 0


CHECK = Command(
    name="check",
    help="validate a ds_config and print its batch equation",
    examples=("mpl-scale check --ds_config ds_configs/digits.json --world 2",),
    options=_options,
    run=_run,
)
