"""The rows of a table, a piece at a time: first the folders and labels that it names, then its rows folder by folder.

A table may have hundreds of millions of rows. It is read once for what it names (Summary), which is small, and once
more to lay its rows into files in the order of an index (Listing): names one behind another, where each ends, and
labels by number. Memory holds a piece of the rows.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from mpl_scale.data.index.format import MOST_CLASSES, Part
from mpl_scale.data.index.parts import PARTS
from mpl_scale.files import create_array, lock, replacing_folder, write_text

SHARD_ROWS = 1 << 18
"""A folder with more rows is several shards: one is in memory at a time, and workers share them."""
SPLITS: dict[str, Part] = {**PARTS, "": "train", "unlabelled": "unlabelled", "unlabeled": "unlabelled"}
_SUSPECTS = 1000  # paths of equal hashes that are compared: one true pair is enough, and hashes rarely lie
_BLOCK = 1 << 20

_NUMBER = re.compile(r"[-+]?([0-9]+\.?|[0-9]*\.[0-9]+)(e[-+]?[0-9]+)?|nan", re.IGNORECASE)

Row = tuple[str, str, str]
"""Path, label and split as text, "" where there is none."""
Read = Callable[[Path], Iterator[Sequence[Row]]]
"""The rows of a table in pieces, in order."""


class Group(NamedTuple):
    """The rows of one folder and part: how many, and the bytes of their files' names."""

    folder: str
    part: Part
    rows: int
    bytes: int


class ListedShard(NamedTuple):
    """The rows [start, stop) of a Listing."""

    folder: str
    part: Part
    start: int
    stop: int


@dataclass(frozen=True)
class Summary:
    """What a table names.

    groups: in the order of the index. read_as: the number that each had while the table was read. labels: their texts,
    by number; number 0 is none.
    """

    groups: Sequence[Group]
    read_as: Sequence[int]
    labels: Sequence[str]

    @cached_property
    def shards(self) -> list[ListedShard]:
        """In order; a large group in pieces."""
        found, start = [], 0
        for group in self.groups:
            stop = start + group.rows
            found += [
                ListedShard(group.folder, group.part, begin, min(stop, begin + SHARD_ROWS))
                for begin in range(start, stop, SHARD_ROWS)
            ]
            start = stop
        return found

    @cached_property
    def class_names(self) -> list[str] | None:
        """The labels, sorted, where they are names; None: they are whole numbers."""
        texts = self.labels[1:]
        return None if all(whole_number(text) is not None for text in texts) else sorted(texts)


def whole_number(label: str) -> int | None:
    """A label as a whole number; None: it is none."""
    digits = label.removeprefix("-")
    return int(label) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def row_name(table: Path, number: int) -> str:
    """How a message names a row, from 1: in a CSV file by the line where it ends."""
    if table.suffix != ".csv":
        return f"'{table}', row {number}"
    with open(table, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        lines = (reader.line_num for row in reader if row)  # that of the columns is the first
        return f"'{table}', line {next(itertools.islice(lines, number, None))}"


class _Piece(NamedTuple):
    """Some rows. groups, labels: int32 [n], their numbers; names: of the files."""

    groups: np.ndarray
    labels: np.ndarray
    names: list[str]

    def encoded(self) -> tuple[np.ndarray, np.ndarray]:
        """The names' bytes one behind another, uint8, and how many each has, int64 [n]."""
        content = np.frombuffer(os.fsencode("/".join([*self.names, ""])), np.uint8)
        ends = np.flatnonzero(content == ord("/"))  # no name has one
        return content[content != ord("/")], np.diff(ends, prepend=-1) - 1


class _Numbers:
    """Numbers for the folders, parts and labels of a table, in the order in which they come."""

    def __init__(self, table: Path) -> None:
        self._table = table
        self.groups: dict[tuple[str, Part], int] = {}
        self.labels = {"": 0}
        self._as_written: dict[tuple[str, str], int] = {}  # group by folder and split as they stand in the table
        self._unlabelled: set[int] = set()

    def pieces(self, read: Read) -> Iterator[tuple[int, _Piece]]:
        """The table's rows, and the number of each piece's first one, from 1.

        Raises:
            ValueError: a row that cannot be meant, by its number.
        """
        first = 1
        for rows in filter(None, read(self._table)):
            yield first, self._numbered(rows, first)
            first += len(rows)

    def _numbered(self, rows: Sequence[Row], first: int) -> _Piece:
        groups, labels, names = array("i"), array("i"), []
        for number, (path, label, split) in enumerate(rows, first):
            folder, name = _cut(path)
            if name in ("", ".", ".."):
                folder, name = _cut(os.path.normpath(path or ".."))
            group = self._as_written.get((folder, split))
            if group is None or name in (".", "..") or "\0" in name:
                group = self._group(number, path, folder, name, split)
            groups.append(group)
            names.append(name)
            labels.append(0 if group in self._unlabelled else self.labels.setdefault(label, len(self.labels)))
        if len(self.labels) - 1 > MOST_CLASSES:
            raise ValueError(
                f"'{self._table}' has more than {MOST_CLASSES} labels; if its column 'label' does not hold classes, "
                "rename it"
            )
        return _Piece(np.frombuffer(groups, np.int32), np.frombuffer(labels, np.int32), names)

    def _group(self, number: int, path: str, folder: str, name: str, split: str) -> int:
        """The number of a folder and part. ValueError where there can be no such row."""
        normal = os.path.normpath(folder or ".")
        if normal.startswith("/") or ".." in (*normal.split("/"), name) or name == "." or "\0" in path:
            raise ValueError(
                f"{row_name(self._table, number)}: path '{path[:200]}' is not below the table's folder; put the table "
                "above it"
            )
        part = SPLITS.get(split.lower())
        if part is None:
            raise ValueError(
                f"{row_name(self._table, number)}: split '{split[:40]}' is none of {', '.join(filter(None, SPLITS))}; "
                "correct it"
            )
        group = self.groups.setdefault((normal, part), len(self.groups))
        self._as_written[folder, split] = group
        if part == "unlabelled":
            self._unlabelled.add(group)
        return group


def _cut(path: str) -> tuple[str, str]:
    """What is before the last part of a path, and that part."""
    cut = path.rfind("/") + 1
    return path[:cut], path[cut:]


def summarise(table: Path, read: Read) -> Summary:
    """What a table names.

    Raises:
        ValueError: it has no rows, or one that cannot be meant, by its number.
    """
    numbers = _Numbers(table)
    rows, size = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for _, piece in numbers.pieces(read):
        more = (0, len(numbers.groups) - len(rows))
        lengths = piece.encoded()[1]
        rows = np.pad(rows, more) + np.bincount(piece.groups, minlength=len(numbers.groups))
        size = np.pad(size, more) + np.bincount(piece.groups, lengths, len(numbers.groups)).astype(np.int64)
    if not rows.any():
        raise ValueError(f"'{table}' has no rows; list the images, one a row")
    order = sorted(numbers.groups, key=lambda group: (group[1] == "test", *group))
    read_as = [numbers.groups[group] for group in order]
    _refuse_numbers(table, list(numbers.labels)[1:])
    groups = [Group(*group, int(rows[at]), int(size[at])) for group, at in zip(order, read_as, strict=True)]
    return Summary(groups, read_as, list(numbers.labels))


def _refuse_numbers(table: Path, texts: Sequence[str]) -> None:
    """ValueError where labels are numbers, but not whole ones, or where two are one number."""
    others = [text for text in texts if whole_number(text) is None]
    if others and all(map(_NUMBER.fullmatch, texts)):
        raise ValueError(
            f"'{table}': its labels are numbers such as {min(others)}; write them as whole numbers, or names"
        )
    seen: dict[int | None, str] = {}
    twice = next((text for text in texts if seen.setdefault(whole_number(text), text) != text), None)
    if not others and twice is not None:
        raise ValueError(
            f"'{table}': labels '{seen[whole_number(twice)]}' and '{twice}' are one number; write it in one way, or "
            "names if they are two classes"
        )


def read_summary(folder: Path) -> Summary:
    """The summary that a Listing was written with."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return Summary([Group(*group) for group in about["groups"]], about["read_as"], about["labels"])


class Listing:
    """The rows of a table in the order of the index, on disk. labels: int32 [N], numbers of the summary's labels."""

    def __init__(self, folder: Path, summary: Summary) -> None:
        self.summary = summary
        self.labels, self._ends, self._names = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("labels", "ends", "names")
        )

    def names(self, start: int, stop: int) -> list[str]:
        """The names of the files of some rows, within their folders."""
        ends = [int(self._ends[start - 1]) if start else 0, *self._ends[start:stop].tolist()]
        content = self._names[ends[0] : ends[-1]].tobytes()
        return [os.fsdecode(content[begin - ends[0] : end - ends[0]]) for begin, end in itertools.pairwise(ends)]


def write_listing(
    folder: Path, table: Path, read: Read, summarised: Callable[[], Summary], *, unchanged: Callable[[], bool]
) -> None:
    """Write the Listing of a table, where there is none; several processes may ask for it at once.

    Args:
        folder: of the listing.
        table: the table.
        read: its rows.
        summarised: gives its summary.
        unchanged: whether the table still is what the summary was made of.

    Raises:
        ValueError: a path stands there twice, or the table has changed.
    """
    with lock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return
        summary = summarised()
        with replacing_folder(folder) as draft:
            try:
                _fill(draft, table, read, summary)
            except IndexError:
                if unchanged():
                    raise
            if not unchanged():
                raise ValueError(f"'{table}' has changed while it was read; run the same command again")
            about = {"groups": summary.groups, "read_as": summary.read_as, "labels": summary.labels}
            write_text(draft / "about.json", json.dumps(about))


def _fill(folder: Path, table: Path, read: Read, summary: Summary) -> None:
    count, size = sum(group.rows for group in summary.groups), sum(group.bytes for group in summary.groups)
    labels = create_array(folder / "labels.npy", dtype=np.dtype(np.int32), shape=(count,))
    ends = create_array(folder / "ends.npy", dtype=np.dtype(np.int64), shape=(count,))
    hashes = create_array(folder / "hashes.npy", dtype=np.dtype(np.int64), shape=(count,))
    names = create_array(folder / "names.npy", dtype=np.dtype(np.uint8), shape=(size,))
    next_row, next_byte = (np.zeros(len(summary.groups), np.int64) for _ in range(2))  # of each group as it is read
    next_row[summary.read_as] = _before(np.array([group.rows for group in summary.groups]))
    next_byte[summary.read_as] = _before(np.array([group.bytes for group in summary.groups]))
    numbers = _Numbers(table)
    for first, piece in numbers.pieces(read):
        order = np.argsort(piece.groups, kind="stable")
        groups = piece.groups[order]
        begins = np.flatnonzero(np.diff(groups, prepend=-1))
        runs = np.diff(begins, append=len(groups))
        content, lengths = piece.encoded()
        taken, lengths = _before(lengths)[order], lengths[order]
        before = _before(lengths)
        rows = next_row[groups] + np.arange(len(groups)) - np.repeat(begins, runs)
        places = next_byte[groups] + before - np.repeat(before[begins], runs)
        labels[rows], ends[rows] = piece.labels[order], places + lengths
        within = np.arange(len(content)) - np.repeat(before, lengths)
        names[np.repeat(places, lengths) + within] = content[np.repeat(taken, lengths) + within]
        next_row[groups[begins]] += runs
        next_byte[groups[begins]] += np.add.reduceat(lengths, begins)
        hashes[first - 1 : first - 1 + len(groups)] = _hashes(piece, list(numbers.groups))
    hashes.sort()
    _refuse_twice(hashes, table, read)
    for written in (labels, ends, names):
        written.flush()
    (folder / "hashes.npy").unlink()


def _before(counts: np.ndarray) -> np.ndarray:
    """The sum of what comes before each."""
    return np.cumsum(counts) - counts


def _hashes(piece: _Piece, groups: Sequence[tuple[str, Part]]) -> np.ndarray:
    """A number for each path, int64 [n]; the same for the same path within a process."""
    found = (hash((groups[group][0], name)) for group, name in zip(piece.groups.tolist(), piece.names, strict=True))
    return np.fromiter(found, np.int64, len(piece.names))


def _refuse_twice(hashes: np.ndarray, table: Path, read: Read) -> None:
    """ValueError where a path stands in the table twice; hashes: of all rows, sorted."""
    suspects: set[int] = set()
    for start in range(0, len(hashes), _BLOCK):
        block = np.asarray(hashes[start : start + _BLOCK + 1])
        suspects.update(block[1:][block[1:] == block[:-1]][: _SUSPECTS - len(suspects)].tolist())
    if not suspects:
        return
    numbers, seen, wanted = _Numbers(table), set[str](), np.array(sorted(suspects))
    for first, piece in numbers.pieces(read):
        groups = list(numbers.groups)
        for row in np.flatnonzero(np.isin(_hashes(piece, groups), wanted)).tolist():
            path = str(PurePosixPath(groups[piece.groups[row]][0], piece.names[row]))
            if path in seen:
                raise ValueError(f"{row_name(table, first + row)}: '{path}' stands there twice; remove one")
            seen.add(path)
