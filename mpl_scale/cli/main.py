"""Parse the command line, load the configuration, hand over; print errors as one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mpl_scale.cli.stop import StopRequest
from mpl_scale.config import RunConfig, check, load_config

EXAMPLES = """examples:
  deepspeed --num_accelerators 2 train.py --ds_config ds_configs/digits.json
  torchrun --nproc_per_node 2 train.py --ds_config ds_configs/digits.json --output runs/a
  python train.py --ds_config ds_configs/digits.json --set mpl_scale.method.feedback.rule=none --seed 3
  mpl-scale check --ds_config ds_configs/digits.json --world 2
  mpl-scale split --model tf_efficientnet_l2 --size 512 --width 16
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done or stopped with its state saved, 1 unequal, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        return {"train": _train, "check": _check, "split": _split}[options.command](options)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        where = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank == "0" or where:  # what every rank finds wrong is said once
            print(f"mpl-scale: error{where}: {error}", file=sys.stderr, flush=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpl-scale",
        description="Train teacher and student by Meta Pseudo Labels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    train = commands.add_parser("train", help="train; what train.py runs", formatter_class=parser.formatter_class)
    check_command = commands.add_parser("check", help="validate a ds_config and print its batch equation")
    for command in (train, check_command):
        command.add_argument("--ds_config", "--deepspeed_config", required=True, metavar="FILE", help="the run's JSON")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="A.B.C=VALUE",
            help="override one field, as mpl_scale.optim.student.lr=0.1 or zero_optimization.stage=3",
        )
        command.add_argument("--seed", type=int, help="short for --set mpl_scale.seed=N")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    train.add_argument("--output", type=Path, metavar="DIR", help="default: runs/<name of the config>")
    train.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default: auto")
    train.add_argument("--max_steps", type=_positive, metavar="N", help="shorten every phase to N steps")
    train.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    split_command = commands.add_parser("split", help="show, and --verify, how a model is split by width")
    _add_split_options(split_command)
    check_command.add_argument("--world", type=_positive, default=1, metavar="N", help="number of ranks")
    return parser


def _add_split_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="NAME", help="a registered model or any timm classifier")
    command.add_argument(
        "--size", type=_positive, required=True, metavar="S", help="height and width of the images, pixels"
    )
    command.add_argument("--width", type=_positive, required=True, metavar="N", help="ranks that share one image")
    command.add_argument("--classes", type=_positive, default=1000)
    command.add_argument("--switch_at", default="never", metavar="auto|never|PATH", help="default: never")
    command.add_argument("--halo", default="plain", choices=("plain", "block_input"))
    command.add_argument("--verify", action="store_true", help="run split and whole on N local processes and compare")
    command.add_argument("--batch", type=_positive, default=2, help="images of --verify")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _load(options: argparse.Namespace) -> RunConfig:
    overrides = list(options.set)
    if options.seed is not None:
        overrides.append(f"mpl_scale.seed={options.seed}")
    return load_config(options.ds_config, overrides=overrides)


def _check(options: argparse.Namespace) -> int:
    print(check(_load(options), world=options.world, cuda=False).equation())
    return 0


def _split(options: argparse.Namespace) -> int:
    from mpl_scale.cli.split import split  # torch: seconds

    return split(options)


def _train(options: argparse.Namespace) -> int:
    stop = StopRequest().install()
    run = _load(options)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    from mpl_scale.trainer.prepare import (
        Options,
        train,
    )  # torch, DALI, deepspeed: seconds, after the config is known good

    output = options.output or Path("runs") / Path(options.ds_config).stem
    summary = train(run, Options(output, options.resume, options.max_steps), stop_requested=stop)
    if summary is not None and os.environ.get("RANK", "0") == "0":
        results = ", ".join(f"{name} {result['top1']:.2f}%" for name, result in summary["results"].items())
        print(f"done: test top-1 {results}; files in {output}", flush=True)
    return 0
