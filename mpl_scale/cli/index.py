"""`mpl-scale index`: index a data set once, in parallel, so that runs open it in no time."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from mpl_scale.cli.command import Command, positive, whole
from mpl_scale.files import expanded, refuse_output


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, metavar="SRC", help="the folder of the data set")
    parser.add_argument(
        "--source",
        metavar="NAME",
        help="folder, images, tfrecord, webdataset, parquet, arrow, cifar10, cifar100, svhn, stl10, idx, arrays or "
        "table; default: the one whose files are found in SRC",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the index; default: SRC.index")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes; default: one per core")
    parser.add_argument(
        "--label_offset", type=whole, metavar="N", help="the first class's label in the files; tfrecord: 1, others: 0"
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="images without labels, or whose labels are not to be read"
    )
    parser.add_argument("--skip_data_crc", action="store_true", help="trust the data of TFRecord files; faster")
    parser.add_argument("--force", action="store_true", help="build again what is up to date")
    parser.add_argument("--verify", action="store_true", help="build nothing; compare an index with its checksums")


def _run(options: argparse.Namespace) -> int:
    output = options.output or options.root.with_name(f"{options.root.name}.index")
    if not options.verify:
        refuse_output(output, folder=True)
    # DALI and torch come with the data package: seconds
    from mpl_scale.data.index.build import build_index, why_not_current
    from mpl_scale.data.index.detect import find_format
    from mpl_scale.data.index.format import ScanOptions
    from mpl_scale.data.index.progress import IndexProgress
    from mpl_scale.data.index.reader import IndexedImages, verify

    if options.verify:
        verify(output)
        IndexedImages(output)
        print(f"'{output}' is whole, and its shards have not changed")
        return 0
    labels = not options.unlabelled
    scan = ScanOptions(label_offset=options.label_offset, check_data=not options.skip_data_crc, labels=labels)
    root = expanded(options.root).resolve()
    source = options.source or find_format(root, labels=labels)
    if options.source is None:
        print(f"source {source}, by the files in '{root}'")
    reason = "" if options.force else why_not_current(output, source=source, root=root, options=scan)
    if reason is None:
        print(f"'{output}' is up to date; --force builds it again")
        _print_contents(output)
        _refuse_faults(output)
        return 0
    if reason:
        print(f"'{output}' is stale, building it again: {reason}")
    progress, start = IndexProgress(), time.monotonic()
    workers = options.workers or os.cpu_count() or 1
    try:
        built = build_index(source, root, output=output, workers=workers, options=scan, report=progress)
    finally:
        progress.close()
    seconds = time.monotonic() - start
    again = f", {built.reused} of them from a stopped build" if built.reused else ""
    print(f"{built.images:,} images of {built.shards:,} shards{again} in {seconds:.1f} s: {output}")
    if built.refused:
        print(f"{built.refused:,} refused, listed in {output / 'refused.jsonl'}:")
        for kind, count in built.reasons.most_common():
            print(f"  {count:>8,}  {kind}")
    _print_contents(output)
    _refuse_faults(output)
    return 0


def _refuse_faults(output: Path) -> None:
    """ValueError where no run would take the index."""
    from mpl_scale.data.index.reader import IndexedImages
    from mpl_scale.data.registry import refuse_bad_labels, refuse_damaged, refuse_twins

    images = IndexedImages(output)
    refuse_bad_labels(images, built=False)
    refuse_damaged(images)
    refuse_twins(images)


def _print_contents(output: Path) -> None:
    """The parts, the formats, and what is not used."""
    from mpl_scale.data.index.reader import IndexedImages

    for line in IndexedImages(output).contents():
        print(line)


INDEX = Command(
    name="index",
    help="index a data set: check every header, list what is refused",
    examples=(
        "mpl-scale index /data/imagenet-tfrecord --source tfrecord --output /data/imagenet.index --workers 16",
        "mpl-scale index /data/images",
        "mpl-scale index /data/crawled-shards --unlabelled",
    ),
    options=_options,
    run=_run,
)
