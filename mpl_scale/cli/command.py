"""What a command of `mpl-scale` is, and the options several of them share."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpl_scale.config import RunConfig, load_config


@dataclass(frozen=True)
class Command:
    """One command. Its module imports nothing heavy: `run` does, once the command line is known to be good.

    name: on the command line; aliases: former names, which work the same. help: one line. examples: whole command
    lines. options: adds its arguments. run: takes the options, with `parser` the whole command line's; returns the exit
    status, 0 done, 1 a negative answer, 2 bad input; raises ValueError or OSError for bad input.
    """

    name: str
    help: str
    examples: tuple[str, ...]
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    aliases: tuple[str, ...] = ()


def add_config_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--ds_config, --set and --seed, for `load`; required: whether the first is."""
    parser.add_argument("--ds_config", "--deepspeed_config", required=required, metavar="FILE", help="the run's JSON")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B.C=VALUE",
        help="override one field, as mpl_scale.optim.student.lr=0.1 or zero_optimization.stage=3",
    )
    parser.add_argument("--seed", type=whole, help="short for --set mpl_scale.seed=N")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The trained network: CHECKPOINT and --network; and what a launcher adds."""
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run's output folder, or a checkpoint step_...")
    parser.add_argument(
        "--network",
        choices=("teacher", "student", "ema"),
        default="student",
        help="ema: the student's moving average; default: student",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")


def is_main() -> bool:
    """Whether this process prints what all ranks have: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def load(options: argparse.Namespace) -> RunConfig:
    """The configuration that `add_config_options` names."""
    overrides = list(options.set)
    if options.seed is not None:
        overrides.append(f"mpl_scale.seed={options.seed}")
    return load_config(options.ds_config, overrides=overrides)


def replace_missing_characters() -> None:
    """Print "?" for what standard output cannot encode, as ± in ASCII: no reason for a finished run to fail."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def positive(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def whole(text: str) -> int:
    """An argument's type: a whole number of at most 18 digits."""
    try:
        value = int(text) if len(text) < 20 else None
    except ValueError:
        value = None
    if value is None:
        shown = text if len(text) < 40 else f"{text[:20]}..."
        raise argparse.ArgumentTypeError(f"{shown} is no whole number of this size")
    return value
