"""`mpl-scale export`: one network of a checkpoint, for timm and what reads its models, torch.export or ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpl_scale.cli.checkpoint_path import choose_checkpoint
from mpl_scale.cli.command import Command
from mpl_scale.files import refuse_output, refuse_run


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a folder step_..., or a run's output folder")
    parser.add_argument(
        "--network",
        choices=("teacher", "student", "ema"),
        default="student",
        help="ema: the student's moving average; default: student",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="gets the network, config.json and README.md"
    )
    parser.add_argument(
        "--format",
        choices=("timm", "torch_export", "onnx"),
        default="timm",
        help="timm: weights with timm's keys, safetensors; torch_export, onnx: a program; default: timm",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another network that --output holds")


def _run(options: argparse.Namespace) -> int:
    refuse_output(options.output, folder=True)
    refuse_run(options.output)
    from mpl_scale.checkpoint.export import export  # torch: seconds

    checkpoint = choose_checkpoint(options.checkpoint)
    content = export(
        checkpoint, options.output, network=options.network, format=options.format, overwrite=options.overwrite
    )
    print(f"{options.network} of {checkpoint}, {content['architecture']}: {options.output}")
    return 0


EXPORT = Command(
    name="export",
    help="write a network of a checkpoint with a Hugging Face (timm) config: safetensors, torch.export or ONNX",
    examples=(
        "mpl-scale export runs/digits --network student --output exported",
        "mpl-scale export runs/digits --format onnx --output exported_onnx",
    ),
    options=_options,
    run=_run,
)
