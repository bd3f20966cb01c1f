"""What a trained network says of new images: a table of their most probable classes.

The table has a row for each image file, in the order of their names: file (relative to the folder), class and
probability, the same for the next classes, and error: why the image could not be read, with nothing before it.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpl_scale.checkpoint.export import checkpoint_config, class_names
from mpl_scale.config.load import import_modules
from mpl_scale.data import ImageFiles
from mpl_scale.data.formats.folder import read_unlabelled
from mpl_scale.data.samples.manifest import hash_files
from mpl_scale.files import expanded, replacing
from mpl_scale.inference.scores import ScoreFiles
from mpl_scale.inference.scoring import Scoring, StoredNetwork, joined_ranks, undecodable
from mpl_scale.packages import require_packages
from mpl_scale.trainer.bad_input import value_on_main

SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class PredictOptions:
    """images: a folder, searched at any depth, or one file. output: .csv or .parquet. top: classes of each image.

    chunk: images that a stopped command may have to score again.
    """

    network: StoredNetwork
    images: Path
    output: Path
    top: int = 1
    chunk: int = 4096


def predict(options: PredictOptions) -> dict[str, Any]:
    """Write the table, on the ranks the launcher started; a stopped run is continued by the same command.

    Returns:
        images, unreadable, and notes on what else the folder holds.

    Raises:
        ValueError: bad input; what was scored until then is kept beside the output.
    """
    output = expanded(options.output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: name a {' or '.join(SUFFIXES)} file")
    if output.suffix == ".parquet":
        require_packages([(f"--output {output}", "pyarrow")])
    config = checkpoint_config(options.network.checkpoint)
    import_modules(config.imports)
    if config.model.in_chans not in (1, 3):
        raise ValueError(
            f"mpl_scale.model.in_chans = {config.model.in_chans} of {options.network.checkpoint}: image files have 1 "
            "or 3 channels; mpl-scale evaluate --data takes arrays"
        )
    images = read_unlabelled(expanded(options.images))
    classes = class_names(options.network.checkpoint) or [f"class {n}" for n in range(config.model.num_classes)]
    top = min(options.top, config.model.num_classes)
    files = ScoreFiles(output.with_name(f"{output.name}.partial"), len(images), options.chunk, top)
    with joined_ranks(config) as joined, ExitStack() as held:
        mesh, _ = joined
        identity = {"images": hash_files(images)}
        Scoring(config, images, files, options.network, joined, identity=identity).fill(held, max_bad_fraction=1.0)

        def write() -> int:
            root = expanded(options.images)
            table = _Table(files, images, classes, root if root.is_dir() else root.parent)
            (table.write_parquet if output.suffix == ".parquet" else table.write_csv)(output)
            shutil.rmtree(files.folder)
            return table.unreadable

        unreadable = value_on_main(mesh, write)
    return {"images": len(images), "unreadable": unreadable, "notes": images.contents()}


class _Table:
    """The rows, chunk by chunk. unreadable: rows with an error, once they are written."""

    def __init__(self, files: ScoreFiles, images: ImageFiles, classes: Sequence[str], root: Path) -> None:
        self._files, self._images, self._classes = files, images, np.array(classes, object)
        self._start = len(f"{root}/")
        self._reasons = {entry["sample"]: entry["reason"] for entry in map(json.loads, undecodable(files.folder))}
        self._reasons |= images.reasons
        self.unreadable = 0
        ranks = ["", *(f"_{rank}" for rank in range(2, files.top + 1))]
        self._names = ["file", *(f"{name}{rank}" for rank in ranks for name in ("class", "probability")), "error"]

    def write_csv(self, output: Path) -> None:
        """Header and rows; empty cells for what there is not."""
        with replacing(output) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self._names)
            for columns in self._chunks():
                writer.writerows(zip(*columns, strict=True))

    def write_parquet(self, output: Path) -> None:
        """A row group for each chunk; null for what there is not."""
        import pyarrow
        from pyarrow import parquet

        kinds = [pyarrow.float32() if name.startswith("probability") else pyarrow.string() for name in self._names]
        schema = pyarrow.schema(list(zip(self._names, kinds, strict=True)))
        with replacing(output) as draft, parquet.ParquetWriter(draft, schema) as writer:
            for columns in self._chunks():
                writer.write_table(pyarrow.table(columns, schema=schema))

    def _chunks(self) -> Iterator[list[list[Any]]]:
        for chunk in range(self._files.chunks):
            rows, ids = self._files.read(chunk), self._files.ids(chunk).tolist()
            good = (rows["classes"][:, 0] >= 0).tolist()
            names = self._classes[rows["classes"]]
            columns: list[list[Any]] = [[self._images.name(sample)[self._start :] for sample in ids]]
            for rank in range(self._files.top):
                for values in (names[:, rank], rows["probabilities"][:, rank].round(6)):
                    columns.append(
                        [value if is_good else None for value, is_good in zip(values.tolist(), good, strict=True)]
                    )
            columns.append(
                [None if is_good else self._reasons.get(sample) for sample, is_good in zip(ids, good, strict=True)]
            )
            self.unreadable += good.count(False)
            yield columns
