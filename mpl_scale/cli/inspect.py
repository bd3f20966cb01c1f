"""`mpl-scale inspect`: what a checkpoint holds, and whether its files are whole."""

from __future__ import annotations

import argparse
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_scale.cli.checkpoint_path import choose_checkpoint
from mpl_scale.cli.command import Command

if TYPE_CHECKING:
    from mpl_scale.checkpoint.format import Index, Stored


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a folder step_..., or a run's output folder")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum, not its size only")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape and dtype")


def _run(options: argparse.Namespace) -> int:
    from mpl_scale.checkpoint.format import DamagedCheckpoint, problems, read_index  # torch: seconds

    folder = choose_checkpoint(options.checkpoint)
    try:
        index = read_index(folder)
    except DamagedCheckpoint as error:
        print(error)
        return 1
    for line in (*_header(folder, index), "", *_table(index.table)):
        print(line)
    if options.tensors:
        print()
        for key, stored in sorted(index.table.items()):
            print(f"{key}  {list(stored.kind.shape)} {stored.kind.dtype}")
    found = list(problems(folder, index.files, checksums=options.verify))
    print()
    for problem in found:
        print(f"damaged: {problem}")
    if not found:
        how = "every file has the checksum" if options.verify else "every file has the size"
        print(f"{how} that the index says{'' if options.verify else '; --verify reads them all'}")
    return 1 if found else 0


def _header(folder: Path, index: Index) -> list[str]:
    from mpl_scale.monitor import config_hash

    metadata, config = index.metadata, index.metadata.get("config")
    rows = {"checkpoint": str(folder), "step": f"{index.step:,} over all phases"}
    if "phase" in metadata:
        rows["phase"] = f"{metadata['phase']}, step {metadata['phase_step']:,}"
    if config is not None:
        rows["config"] = f"{config_hash(config)}, method {config['mpl_scale']['method']['name']}"
    rows["written by"] = f"{index.world:,} rank{'s' if index.world > 1 else ''}"
    size = sum(record.size for record in index.files.values())
    rows["files"] = f"{len(index.files):,}, {size:,} bytes"
    return [f"{name:<12}{value}" for name, value in rows.items()]


def _table(table: dict[str, Stored]) -> list[str]:
    """Tensors, elements, bytes and dtypes of each network's part, as student/master."""
    import torch

    parts: dict[str, list[Stored]] = defaultdict(list)
    for key, stored in table.items():
        parts["/".join(key.split("/")[: 2 if key.count("/") > 1 else 1])].append(stored)
    lines = [f"{'part':<24}{'tensors':>9}{'elements':>16}{'bytes':>18}  dtype"]
    for part, entries in sorted(parts.items()):
        elements = sum(prod(stored.kind.shape) for stored in entries)
        size = sum(prod(stored.kind.shape) * getattr(torch, stored.kind.dtype).itemsize for stored in entries)
        dtypes = ", ".join(sorted({stored.kind.dtype for stored in entries}))
        lines.append(f"{part:<24}{len(entries):>9,}{elements:>16,}{size:>18,}  {dtypes}")
    return lines


INSPECT = Command(
    name="inspect",
    help="show what a checkpoint holds, and whether its files are whole",
    examples=(
        "mpl-scale inspect runs/digits --verify",
        "mpl-scale inspect runs/digits/checkpoints/step_00001000 --tensors",
    ),
    options=_options,
    run=_run,
)
