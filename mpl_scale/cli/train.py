"""`mpl-scale train`: what train.py runs under a launcher."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mpl_scale.cli.command import Command, add_config_options, is_main, load, positive
from mpl_scale.cli.fit import check_this_gpu
from mpl_scale.cli.stop import StopRequest


def _options(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/<name of the config>")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default: auto")
    parser.add_argument("--max_steps", type=positive, metavar="N", help="shorten every phase to N steps")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="measured rates, of python -m benchmarks.calibrate: with mpl_scale.logging.cost = on the summary has the "
        "planned time of a step, too",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")


def _run(options: argparse.Namespace) -> int:
    stop = StopRequest().install()
    try:
        return _train(options, stop)
    finally:
        stop.close()


def _train(options: argparse.Namespace, stop: StopRequest) -> int:
    run = load(options)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    # torch, DALI, deepspeed: seconds, after the config is known to be good
    from mpl_scale.monitor import cost_lines
    from mpl_scale.trainer.prepare import Options, train

    for warning in check_this_gpu(run):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    output = options.output or Path("runs") / Path(options.ds_config).stem
    chosen = Options(output, options.resume, options.max_steps, options.calibration)
    summary = train(run, chosen, stop_requested=stop)
    if summary is not None and is_main():
        results = ", ".join(f"{name} {result['top1']:.2f}%" for name, result in summary["results"].items())
        print("\n".join([f"done: test top-1 {results}; files in {output}", *cost_lines(summary)]), flush=True)
    return 0


TRAIN = Command(
    name="train",
    help="train; what train.py runs",
    examples=(
        "deepspeed --num_accelerators 2 train.py --ds_config ds_configs/digits.json",
        "torchrun --nproc_per_node 2 train.py --ds_config ds_configs/digits.json --output runs/a",
        "python train.py --ds_config ds_configs/digits.json --output runs/b --set mpl_scale.method.feedback.rule=none",
    ),
    options=_options,
    run=_run,
)
