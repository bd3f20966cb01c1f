"""`mpl-scale predict`: what a trained network says of a folder of new images."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mpl_scale.cli.checkpoint_path import choose_checkpoint
from mpl_scale.cli.command import Command, add_network_options, is_main, positive
from mpl_scale.files import refuse_output, refuse_run


def _options(parser: argparse.ArgumentParser) -> None:
    add_network_options(parser)
    parser.add_argument("images", type=Path, metavar="PATH", help="a folder of images, at any depth, or one image")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the table: .csv or .parquet")
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="classes of each image (default: 1)")


def _run(options: argparse.Namespace) -> int:
    refuse_output(options.output, folder=False)
    refuse_run(options.output)
    checkpoint = choose_checkpoint(options.checkpoint)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    from mpl_scale.inference.predict import PredictOptions, predict  # torch, DALI: seconds
    from mpl_scale.inference.scoring import StoredNetwork

    network = StoredNetwork(checkpoint, options.network)
    found = predict(PredictOptions(network, options.images, options.output, top=options.top))
    if is_main():
        for note in found["notes"]:
            print(note)
        bad = f", {found['unreadable']:,} of them unreadable (column error)" if found["unreadable"] else ""
        print(f"{found['images']:,} images{bad} by the {options.network} of {checkpoint}: {options.output}")
    return 0


PREDICT = Command(
    name="predict",
    help="write what a trained network says of new images as a table",
    examples=(
        "mpl-scale predict runs/digits photos --output predictions.csv --top 3",
        "torchrun --nproc_per_node 8 --no-python mpl-scale predict runs/l2 photos --output predictions.parquet",
    ),
    options=_options,
    run=_run,
)
