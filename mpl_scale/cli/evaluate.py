"""`mpl-scale evaluate`: a trained network on its run's test images, or on any other labelled ones."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mpl_scale.cli.checkpoint_path import choose_checkpoint
from mpl_scale.cli.command import Command, add_network_options, is_main, whole
from mpl_scale.files import refuse_output, refuse_run


def _options(parser: argparse.ArgumentParser) -> None:
    add_network_options(parser)
    parser.add_argument("--data", type=Path, metavar="PATH", help="labelled images; default: the run's test images")
    parser.add_argument("--source", default="folder", metavar="NAME", help="of --data, as mpl_scale.data.source")
    parser.add_argument("--index", type=Path, metavar="DIR", help="an index of --source, instead of --data")
    parser.add_argument("--label_offset", type=whole, metavar="N", help="of --data, as mpl_scale.data.label_offset")
    parser.add_argument(
        "--real_labels", type=Path, metavar="JSON", help="several right classes an image, as ImageNet-ReaL's real.json"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: evaluation/ beside the checkpoints")


def _run(options: argparse.Namespace) -> int:
    checkpoint = choose_checkpoint(options.checkpoint)
    output = options.output or checkpoint.absolute().parents[1] / "evaluation"
    refuse_output(output, folder=True)
    refuse_run(output)
    if options.data is None and options.index is None and (options.source, options.label_offset) != ("folder", None):
        raise ValueError("--source and --label_offset are of --data; give it, too")
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    from mpl_scale.inference.evaluate import EvaluateOptions, evaluate  # torch, DALI: seconds
    from mpl_scale.inference.labelled import DataChoice
    from mpl_scale.inference.scoring import StoredNetwork

    data = DataChoice(options.data, options.source, options.index, options.label_offset)
    network = StoredNetwork(checkpoint, options.network)
    found = evaluate(EvaluateOptions(network, output, data, real_labels=options.real_labels))
    if is_main():
        bad = f", {found['unreadable']:,} unreadable" if found["unreadable"] else ""
        print(f"{options.network} of {checkpoint}, {found['evaluated']:,} images{bad}:")
        print(
            f"top-1 {found['top1']:.2f}%, top-5 {found['top5']:.2f}%, loss {found['loss']:.4f}, "
            f"calibration error {found['calibration_error']:.2f}%"
        )
        if options.real_labels is not None:
            print(
                f"real labels: top-1 {found['real_top1']:.2f}% of the {found['real_images']:,} images that have one; "
                f"{found['real_agreement']:.2f}% of them keep their own label"
            )
        shares = sorted((result["top1"], name) for name, result in found["classes"].items())
        print(f"worst classes: {', '.join(f'{name} {share:.1f}%' for share, name in shares[:5])}")
        written = (
            "evaluation.json",
            "classes.csv",
            "confusion.csv",
            "confusion.png",
        )  # some, of many classes, are not
        print(f"files in {output}: {', '.join(name for name in written if (output / name).exists())}")
    return 0


EVALUATE = Command(
    name="evaluate",
    help="accuracy, calibration and confusions of a trained network",
    examples=(
        "mpl-scale evaluate runs/digits",
        "mpl-scale evaluate runs/digits --network ema --data photos --output evaluation",
    ),
    options=_options,
    run=_run,
)
