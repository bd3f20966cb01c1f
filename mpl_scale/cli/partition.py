"""`mpl-scale partition`: how a model is partitioned by width, and a proof that the parts equal the whole."""

from __future__ import annotations

import argparse

from mpl_scale.cli.command import Command, positive


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="a registered model or any timm classifier")
    parser.add_argument(
        "--size", type=positive, required=True, metavar="S", help="height and width of the images, pixels"
    )
    parser.add_argument("--width", type=positive, required=True, metavar="N", help="ranks that share one image")
    parser.add_argument("--classes", type=positive, default=1000)
    parser.add_argument("--switch_at", default="never", metavar="auto|never|PATH", help="default: never")
    parser.add_argument("--halo", default="plain", choices=("plain", "block_input"))
    parser.add_argument(
        "--verify", action="store_true", help="run partitioned and whole on N local processes and compare"
    )
    parser.add_argument("--batch", type=positive, default=2, help="images of --verify")


def _run(options: argparse.Namespace) -> int:
    from mpl_scale.cli.partition_run import partition  # torch: seconds

    return partition(options)


PARTITION = Command(
    name="partition",
    aliases=("split",),  # its former name
    help="show, and --verify, how a model is partitioned by width",
    examples=(
        "mpl-scale partition --model tf_efficientnet_l2 --size 512 --width 16",
        "mpl-scale partition --model tf_efficientnet_b0 --size 64 --width 4 --verify",
    ),
    options=_options,
    run=_run,
)
