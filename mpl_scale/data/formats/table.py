"""Source `table`: a table.csv or table.parquet that lists image files below its folder, and their labels.

Columns: `path`, relative to the table's folder; `label`, whole numbers or names; `split`, if there is one, a word for a
part (index/parts.py), `unlabelled`, or nothing for training. Other columns are not read.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mpl_scale.data.formats.folder import scan_files
from mpl_scale.data.formats.listing import (
    Listing,
    Row,
    Summary,
    read_summary,
    row_name,
    summarise,
    whole_number,
    write_listing,
)
from mpl_scale.data.index.format import (
    CLASSES_FILE,
    Layout,
    NoShards,
    Refusal,
    Scan,
    ScanOptions,
    Shard,
    classes_file,
    register_format,
)
from mpl_scale.packages import require_packages

NAMES = ("table.csv", "table.parquet")
_COLUMNS = ("path", "label", "split")
PIECE_ROWS = 1 << 16
_READ_BYTES = 1 << 20


@register_format("table")
class Table:
    """The images of each folder and part, a shard for each SHARD_ROWS of them; its `label` is the shard's number."""

    layout: Layout = "file"
    first_label: int | None = 0
    checksums = False

    def sidecars(self, root: Path) -> Sequence[str]:
        return (*NAMES, CLASSES_FILE)

    def shards(self, root: Path) -> Sequence[Shard]:
        summary = _summary(_table(root))
        missing = next((group.folder for group in summary.groups if not os.path.isdir(root / group.folder)), None)
        if missing is not None:
            raise ValueError(
                f"mpl_scale.data.root = '{root}' has no folder '{missing}', which its table names; correct the table"
            )
        return [Shard(shard.folder, shard.part, number) for number, shard in enumerate(summary.shards)]

    def classes(self, root: Path) -> Sequence[str] | None:
        return classes_file(root) or _summary(_table(root)).class_names

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        table = _table(root)
        listing = _listing(unpacked.parent, table)
        listed = listing.summary.shards[shard.label : shard.label + 1]
        if [found.folder for found in listed] != [shard.name]:
            raise ValueError(f"'{table[0]}' has changed while it was read; run the same command again")
        _, part, start, stop = listed[0]
        files = listing.names(start, stop)
        scan = scan_files(root, shard.name, files)
        if not options.labels or part == "unlabelled":
            scan.entries["label"] = options.label_offset or 0
            return scan
        known, values = self._labels(root, listing.summary)
        numbers = listing.labels[start:stop]
        unreadable = [refusal.entry for refusal in scan.refusals if refusal.entry is not None]
        scan.entries["label"] = values[numbers]
        scan.entries["label"][unreadable] = 0
        for row in np.setdiff1d(np.flatnonzero(~known[numbers]), unreadable).tolist():
            text = listing.summary.labels[numbers[row]]
            why = f"label '{text[:40]}' is no class" if text else "it has no label"
            scan.refusals.append(Refusal(f"{shard.name}/{files[row]}", None, why, row, label=True))
            scan.entries["height"][row] = scan.entries["width"][row] = 0
        return scan

    def _labels(self, root: Path, summary: Summary) -> tuple[np.ndarray, np.ndarray]:
        """Whether each text is a class, bool [L], and its label, int64 [L], 0 where it is none."""
        if summary.class_names is None:
            found = [whole_number(text) for text in summary.labels]
        else:
            numbers = {name: label for label, name in enumerate(self.classes(root) or ())}
            found = [numbers.get(text) for text in summary.labels]
        return np.array([label is not None for label in found]), np.array([label or 0 for label in found], np.int64)


_Table = tuple[Path, int, int]
"""A table, its size in bytes and its time, which tell it from what it was before."""


def _table(root: Path) -> _Table:
    found = [root / name for name in NAMES if (root / name).is_file()]
    if not found:
        raise NoShards(f"mpl_scale.data.root = '{root}' holds no {' or '.join(NAMES)} with columns path and label")
    if len(found) > 1:
        raise ValueError(f"mpl_scale.data.root = '{root}' holds {' and '.join(NAMES)}; remove one")
    status = found[0].stat()
    return found[0], status.st_size, status.st_mtime_ns


_SUMMARIES: dict[_Table, Summary] = {}
"""Of the tables used last."""


def _summary(table: _Table) -> Summary:
    """What a table names.

    Raises:
        NoShards: a parquet file of something else. ValueError: as summarise.
    """
    if table not in _SUMMARIES:
        _remember(table, summarise(table[0], read_rows))
    return _SUMMARIES[table]


def _remember(table: _Table, summary: Summary) -> None:
    for former in list(_SUMMARIES)[:-1]:
        del _SUMMARIES[former]
    _SUMMARIES[table] = summary


def _listing(beside: Path, table: _Table) -> Listing:
    """The rows of a table, written into the folder of a build by the first of its processes that asks."""
    path, size, mtime_ns = table
    folder = beside / f"table-{size}-{mtime_ns}"
    write_listing(folder, path, read_rows, lambda: _summary(table), unchanged=lambda: _table(path.parent) == table)
    if table not in _SUMMARIES:
        _remember(table, read_summary(folder))
    return Listing(folder, _SUMMARIES[table])


def read_rows(path: Path) -> Iterator[Sequence[Row]]:
    yield from _csv_rows(path) if path.suffix == ".csv" else _parquet_rows(path)


def _csv_rows(path: Path) -> Iterator[Sequence[Row]]:
    first = 1  # row of a piece
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = next(reader, [])
            _refuse_misspelt(path, columns)
            if "path" not in columns or any(columns.count(name) > 1 for name in _COLUMNS):
                raise ValueError(
                    f"'{path}' has the columns {columns}; its first line must have path, label, split once"
                )
            # A column that is not there is the empty one behind the last.
            image, label, split = (columns.index(name) if name in columns else len(columns) for name in _COLUMNS)
            count = len(columns)
            while piece := list(itertools.islice(reader, PIECE_ROWS)):
                rows = list(filter(None, piece))
                wrong = next((at for at, row in enumerate(rows) if len(row) < count or any(row[count:])), None)
                if wrong is not None:
                    raise ValueError(
                        f"{row_name(path, first + wrong)}: {len(rows[wrong])} value(s), where the first line names "
                        f"{count} columns; correct it (a value with a comma stands in double quotes)"
                    )
                for row in rows:
                    row[count:] = [""]
                yield [(row[image], row[label].strip(), row[split].strip()) for row in rows]
                first += len(rows)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        where = "" if reader.line_num == 0 else f" after line {reader.line_num}"
        raise ValueError(f"'{path}' cannot be read{where}: {error}; write comma-separated values in UTF-8") from error


def _refuse_misspelt(path: Path, columns: Sequence[str]) -> None:
    """ValueError where a column would be one of ours but for spaces and capitals."""
    for name in columns:
        meant = name.strip().lower()
        if meant != name and meant in _COLUMNS:
            raise ValueError(f"'{path}' has a column '{name}'; write it as '{meant}', or rename it if it is not meant")


def _parquet_rows(path: Path) -> Iterator[Sequence[Row]]:
    require_packages([(f"the table '{path}'", "pyarrow")])
    from pyarrow import ArrowException, types
    from pyarrow.parquet import ParquetFile

    try:
        # Without pre_buffer and with a buffer, a row group is not held as a whole.
        with ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
            names = file.schema_arrow.names
            _refuse_misspelt(path, names)
            columns = [column for column in _COLUMNS if column in names]
            if "path" not in columns:
                raise NoShards(f"'{path}' holds no column 'path'")
            doubled = next((column for column in columns if names.count(column) > 1), None)
            if doubled is not None:
                raise ValueError(f"'{path}' has several columns '{doubled}'; remove all but one")
            for column in columns:
                kind = file.schema_arrow.field(column).type
                if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
                    raise ValueError(f"'{path}': column '{column}' is {str(kind)[:200]}; write text, or whole numbers")
            for batch in file.iter_batches(PIECE_ROWS, columns=columns, use_threads=False):
                texts = [
                    ["" if value is None else str(value) for value in batch.column(column).to_pylist()]
                    if column in columns
                    else [""] * len(batch)
                    for column in _COLUMNS
                ]
                yield [(image, label.strip(), split.strip()) for image, label, split in zip(*texts, strict=True)]
    except (OSError, ArrowException) as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from error
