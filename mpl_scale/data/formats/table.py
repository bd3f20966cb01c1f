"""Source `table`: a table.csv or table.parquet that lists image files below its folder, and their labels.

Columns: `path`, relative to the table's folder; `label`, whole numbers or names; `split`, if there is one, a word for a
part (index/parts.py), `unlabelled`, or nothing for training. Other columns are not read.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mpl_scale.data.formats.folder import scan_files
from mpl_scale.data.index.format import (
    CLASSES_FILE,
    Layout,
    NoShards,
    Part,
    Refusal,
    Scan,
    ScanOptions,
    Shard,
    classes_file,
    register_format,
)
from mpl_scale.data.index.parts import PARTS
from mpl_scale.packages import require_packages

NAMES = ("table.csv", "table.parquet")
_COLUMNS = ("path", "label", "split")
_SPLITS: dict[str, Part] = {**PARTS, "": "train", "unlabelled": "unlabelled", "unlabeled": "unlabelled"}
_FLOAT = re.compile(r"-?[0-9]+(\.[0-9]*)?(e[-+]?[0-9]+)?")
_Row = tuple[str, str, str]
"""Path, label and split as text, "" where there is none."""


class _Group(NamedTuple):
    """The rows of one folder and part: names of files, and labels as they stand in the table."""

    folder: str
    part: Part
    files: list[str]
    labels: list[str]


class _Listed(NamedTuple):
    """A table. names: the labels, sorted, where they are names; None: they are numbers."""

    groups: list[_Group]
    names: list[str] | None


@register_format("table")
class Table:
    """One shard for each folder of images, and part; its `label` is the group's number."""

    layout: Layout = "file"
    first_label: int | None = 0
    checksums = False

    def sidecars(self, root: Path) -> Sequence[str]:
        return (*NAMES, CLASSES_FILE)

    def shards(self, root: Path) -> Sequence[Shard]:
        groups = _listed(root).groups
        missing = next((group.folder for group in groups if not os.path.isdir(root / group.folder)), None)
        if missing is not None:
            raise ValueError(
                f"mpl_scale.data.root = '{root}' has no folder '{missing}', which its table names; correct the table"
            )
        return [Shard(group.folder, group.part, number) for number, group in enumerate(groups)]

    def classes(self, root: Path) -> Sequence[str] | None:
        return classes_file(root) or _listed(root).names

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        group, numbers = _listed(root).groups[shard.label], None
        scan = scan_files(root, group.folder, group.files)
        if not options.labels or group.part == "unlabelled":
            scan.entries["label"] = options.label_offset or 0
            return scan
        if _listed(root).names is not None:
            numbers = {name: label for label, name in enumerate(self.classes(root) or ())}
        refused = {refusal.entry for refusal in scan.refusals}
        for row, text in enumerate(group.labels):
            if row in refused:
                continue
            label = _number(text) if numbers is None else numbers.get(text)
            if label is not None:
                scan.entries["label"][row] = label
                continue
            why = f"label '{text[:40]}' is no class" if text else "it has no label"
            scan.refusals.append(Refusal(f"{group.folder}/{group.files[row]}", None, why, row, label=True))
            scan.entries["height"][row] = scan.entries["width"][row] = 0
        return scan


def _listed(root: Path) -> _Listed:
    found = [root / name for name in NAMES if (root / name).is_file()]
    if not found:
        raise NoShards(f"mpl_scale.data.root = '{root}' holds no {' or '.join(NAMES)} with columns path and label")
    if len(found) > 1:
        raise ValueError(f"mpl_scale.data.root = '{root}' holds {' and '.join(NAMES)}; remove one")
    status = found[0].stat()
    return _read(found[0], status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)
def _read(path: Path, size: int, mtime_ns: int) -> _Listed:
    """A table; size and time tell it from what it was before.

    Raises:
        NoShards: a parquet file of something else. ValueError: a row that cannot be meant, by its number.
    """
    groups: dict[tuple[bool, str, Part], _Group] = {}
    seen: set[str] = set()
    labels: set[str] = set()
    for number, (given, label, split) in enumerate(_rows(path), 1):
        where, image = f"'{path}', row {number}", PurePosixPath(os.path.normpath(given or ".."))
        if image.is_absolute() or ".." in image.parts or not image.name or "\0" in given:
            raise ValueError(f"{where}: path '{given[:200]}' is not below the table's folder; put the table above it")
        part = _SPLITS.get(split.lower())
        if part is None:
            raise ValueError(f"{where}: split '{split[:40]}' is none of {', '.join(filter(None, _SPLITS))}; correct it")
        if str(image) in seen:
            raise ValueError(f"{where}: '{image}' stands there twice; remove one")
        seen.add(str(image))
        folder = str(image.parent)
        group = groups.setdefault((part == "test", folder, part), _Group(folder, part, [], []))
        group.files.append(image.name)
        group.labels.append(label)
        if label and part != "unlabelled":
            labels.add(label)
    if not groups:
        raise ValueError(f"'{path}' has no rows; list the images, one a row")
    numbered = all(_number(label) is not None for label in labels)
    if not numbered and all(_FLOAT.fullmatch(label) for label in labels):
        raise ValueError(
            f"'{path}': its labels are numbers such as {min(labels)}; write them as whole numbers, or names"
        )
    return _Listed([groups[key] for key in sorted(groups)], None if numbered else sorted(labels))


def _rows(path: Path) -> Iterator[_Row]:
    yield from _csv_rows(path) if path.suffix == ".csv" else _parquet_rows(path)


def _csv_rows(path: Path) -> Iterator[_Row]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or ())
            if "path" not in columns or any(columns.count(name) > 1 for name in _COLUMNS):
                raise ValueError(
                    f"'{path}' has the columns {columns}; its first line must have path, label, split once"
                )
            for row in reader:
                yield row["path"] or "", (row.get("label") or "").strip(), (row.get("split") or "").strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{path}' cannot be read: {error}; write comma-separated values in UTF-8") from error


def _parquet_rows(path: Path) -> Iterator[_Row]:
    require_packages([(f"the table '{path}'", "pyarrow")])
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = [column for column in _COLUMNS if column in file.schema_arrow.names]
            if "path" not in columns:
                raise NoShards(f"'{path}' holds no column 'path'")
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    image, label, split = (row.get(column) for column in _COLUMNS)
                    yield str(image or ""), "" if label is None else str(label), str(split or "")
    except (OSError, ArrowException) as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from error


def _number(label: str) -> int | None:
    """A whole number as it stands in a table; None: it is none."""
    digits = label.removeprefix("-")
    return int(label) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None
