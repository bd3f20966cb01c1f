"""Parse the command line, hand over to a command, print errors as one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mpl_scale.cli.check import CHECK
from mpl_scale.cli.completion import COMPLETION
from mpl_scale.cli.distributions import DISTRIBUTIONS
from mpl_scale.cli.export import EXPORT
from mpl_scale.cli.index import INDEX
from mpl_scale.cli.inspect import INSPECT
from mpl_scale.cli.plan import PLAN
from mpl_scale.cli.report import REPORT
from mpl_scale.cli.select import SELECT
from mpl_scale.cli.split import SPLIT
from mpl_scale.cli.sweep import SWEEP
from mpl_scale.cli.train import TRAIN

COMMANDS = (TRAIN, PLAN, CHECK, SPLIT, INDEX, SELECT, DISTRIBUTIONS, INSPECT, EXPORT, REPORT, SWEEP, COMPLETION)

PACKAGES = {
    "nvidia": ("nvidia-dali (DALI)", "nvidia-dali-cuda130"),
    "deepspeed": ("deepspeed", "deepspeed"),
    "timm": ("timm", "timm"),
    "torch": ("torch", "torch"),
    "sklearn": ("scikit-learn", "scikit-learn"),
    "PIL": ("pillow", "pillow"),
    "shtab": ("shtab", "shtab"),
    "google_crc32c": ("google-crc32c", "google-crc32c"),
}
"""Of modules that may be missing: the name for people, and pip's."""


def _missing(module: str) -> str:
    name, wheel = PACKAGES[module]
    return f"{name} is not installed: make install, or pip install {wheel}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done or stopped with its state saved, 1 unequal, 2 bad input."""
    options = make_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if options.debug or package not in PACKAGES:
            raise
        print(f"mpl-scale: error: {_missing(package)}", file=sys.stderr, flush=True)
        return 2
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        where = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank == "0" or where:  # what every rank finds wrong is said once
            print(f"mpl-scale: error{where}: {error}", file=sys.stderr, flush=True)
        return 2
    return status


def make_parser() -> argparse.ArgumentParser:
    """All commands, each with its examples."""

    def examples(lines: Sequence[str]) -> str:
        return "\n  ".join(["examples:", *lines])

    parser = argparse.ArgumentParser(
        prog="mpl-scale",
        description="Train teacher and student by Meta Pseudo Labels.",
        epilog=examples([line for command in COMMANDS for line in command.examples[:1]]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        own = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=examples(command.examples),
            formatter_class=parser.formatter_class,
        )
        command.options(own)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        own.set_defaults(run=command.run, parser=parser)
    return parser
