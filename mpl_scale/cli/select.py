"""`mpl-scale select`: choose the unlabelled set, by a network, from the images of an index."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mpl_scale.cli.checkpoint_path import choose_checkpoint
from mpl_scale.cli.command import Command, add_config_options, is_main, load, positive
from mpl_scale.files import expanded, refuse_output, refuse_run


def _options(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser, required=False)
    parser.add_argument("--checkpoint", type=Path, metavar="CKPT", help="a step_... folder, or a run's --output")
    parser.add_argument(
        "--network", choices=("teacher", "student", "ema"), help="default: teacher, or student where there is none"
    )
    parser.add_argument("--index", type=Path, required=True, metavar="IN", help="the images to choose from")
    parser.add_argument("--root", type=Path, metavar="DIR", help="where its shards are; default: as the index says")
    parser.add_argument("--output", type=Path, metavar="OUT", help="the new index")
    parser.add_argument("--overwrite", action="store_true", help="replace another index that --output holds")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--per_class", type=positive, metavar="K", help="the K images most probable for each class")
    what.add_argument(
        "--threshold", type=_share, metavar="P", help="images whose most probable class is above P, up-sampled"
    )
    what.add_argument(
        "--write_hashes", type=Path, metavar="TXT", help="choose nothing; write the SHA-256 of the images of --index"
    )
    parser.add_argument("--min_confidence", type=_share, metavar="P", help="with --per_class: least probability")
    parser.add_argument("--argmax_only", action="store_true", help="with --per_class: an image serves one class only")
    parser.add_argument("--duplicate", action="store_true", help="with --per_class: repeat images up to K")
    parser.add_argument(
        "--class_size", type=positive, metavar="N", help="with --threshold: images of each class; default: 130000"
    )
    parser.add_argument("--remove", type=Path, metavar="TXT", help="SHA-256 of images not to be chosen, one a line")
    parser.add_argument("--distributions", action="store_true", help="store the probabilities of the chosen images")
    parser.add_argument(
        "--top", type=positive, metavar="N", help="classes kept of each image; default: 10, with --distributions all"
    )
    parser.add_argument("--chunk", type=positive, default=65536, metavar="N", help="images of a score file")
    parser.add_argument("--keep_scores", action="store_true", help="leave OUT.partial, for another rule")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def _run(options: argparse.Namespace) -> int:
    if options.write_hashes is not None:
        _refuse_unread(options)
    elif options.output is not None:
        refuse_output(options.output, folder=True)
        refuse_run(options.output)
    if options.write_hashes is not None:
        refuse_output(options.write_hashes, folder=False, option="--write_hashes")
        refuse_run(options.write_hashes, option="--write_hashes")
        from mpl_scale.select.hashes import write_hashes  # torch, DALI: seconds

        written, lost = write_hashes(options.index, options.write_hashes, root=options.root)
        print(f"{written:,} hashes in {options.write_hashes}; {lost:,} images could not be read")
        return 0
    _refuse_missing(options)
    by_threshold = options.threshold is not None
    run = load(options)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    from mpl_scale.select.run import SelectOptions, select

    chosen = SelectOptions(
        checkpoint=choose_checkpoint(expanded(options.checkpoint)),
        network=options.network,
        index=options.index,
        root=options.root,
        output=options.output,
        rule="threshold" if by_threshold else "per_class",
        count=(options.class_size or 130_000) if by_threshold else options.per_class,
        least=options.threshold if by_threshold else options.min_confidence or 0.0,
        duplicate=by_threshold or options.duplicate,
        argmax_only=options.argmax_only,
        removed=options.remove,
        distributions=options.distributions,
        top=options.top,
        chunk=options.chunk,
        keep_scores=options.keep_scores,
        overwrite=options.overwrite,
    )
    summary = select(run, chosen)
    if is_main():
        print(
            f"{summary['images']:,} rows of {summary['distinct_images']:,} images out of {summary['scored']:,}; "
            f"{summary['removed']:,} removed, {summary['unreadable']:,} unreadable: {options.output}"
        )
        if summary["empty"]:
            print(f"{len(summary['empty'])} classes have no image, listed in selection.json")
        if summary["uncertain"]:
            print(
                f"for {len(summary['uncertain'])} classes an image beyond its {summary['top']} most probable classes "
                "might fit better than the last one taken; --top with more classes settles it"
            )
    return 0


def _refuse_unread(options: argparse.Namespace) -> None:
    """ValueError for an option that --write_hashes does not read."""
    parser = argparse.ArgumentParser()
    _options(parser)
    for name, default in vars(parser.parse_args(["--index", ".", "--write_hashes", "."])).items():
        if name not in ("index", "root", "write_hashes", "local_rank") and getattr(options, name) != default:
            raise ValueError(f"--{name} means nothing with --write_hashes; leave it out")


def _refuse_missing(options: argparse.Namespace) -> None:
    for name in ("ds_config", "checkpoint", "output"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing; only --write_hashes does without it")
    rule, others = (
        ("--threshold", ("min_confidence", "argmax_only", "duplicate"))
        if options.threshold is not None
        else ("--per_class", ("class_size",))
    )
    for name in others:
        if getattr(options, name):
            raise ValueError(f"--{name} means nothing with {rule}; leave it out")


SELECT = Command(
    name="select",
    help="choose unlabelled images by a network's confidence, as a new index",
    examples=(
        "mpl-scale select --ds_config my.json --checkpoint runs/supervised --index jft.index --output chosen.index "
        "--per_class 12800",
        "torchrun --nproc_per_node 8 --no-python mpl-scale select --ds_config my.json --checkpoint runs/teacher "
        "--index jft.index --output chosen.index --threshold 0.3 --class_size 130000",
        "mpl-scale select --index imagenet-val.index --write_hashes val.txt",
    ),
    options=_options,
    run=_run,
)
