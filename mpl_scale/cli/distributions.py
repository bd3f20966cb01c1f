"""`mpl-scale distributions`: what a trained network says of every image, for Reduced MPL and Noisy Student."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mpl_scale.cli.checkpoint_path import choose_checkpoint
from mpl_scale.cli.command import Command
from mpl_scale.files import refuse_output, refuse_run


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ds_config", required=True, help="of the run that made the checkpoint, and of its data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as train")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder step_..., or a run's output folder")
    parser.add_argument(
        "--network", choices=("teacher", "student", "ema"), help="default: the teacher, if there is one"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="NPY", help="for mpl_scale.data.distributions")


def _run(options: argparse.Namespace) -> int:
    refuse_output(options.output, folder=False)
    refuse_run(options.output)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: one rank writes all of it; start no launcher")
    import torch  # seconds

    from mpl_scale.config import load_config
    from mpl_scale.trainer.stored_distributions import store_distributions

    run = load_config(options.ds_config, overrides=options.set)
    checkpoint = choose_checkpoint(options.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = store_distributions(run, checkpoint, options.output, network=options.network, device=device)
    print(f"{count} distributions by {checkpoint}: {options.output}")
    return 0


DISTRIBUTIONS = Command(
    name="distributions",
    help="store a trained network's distribution of every image",
    examples=(
        "mpl-scale distributions --ds_config ds_configs/digits.json --checkpoint runs/teacher --output teacher.npy",
    ),
    options=_options,
    run=_run,
)
