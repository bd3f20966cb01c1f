"""What a data set made of shards looks like to the index: which files, and what is in each.

A format lists its shards in order and scans one of them into arrays; the index (index.py) is these arrays, one behind
another. A sample's id is its place in that order, so it does not depend on who scanned what when.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from mpl_scale.config.names import Registry
from mpl_scale.data.encoded.header import Header
from mpl_scale.data.index.census import Census

Part = Literal["train", "extra", "unlabelled", "test"]
"""extra: more images for training, that no split of C.1 takes labels of; unlabelled: images without labels, whose
entries have the first class's."""
Layout = Literal["file", "encoded", "rows", "planes", "columns", "grey"]
"""How a sample is stored: a file of its own in the shard's folder; an image file inside the shard; raw RGB pixels
[H, W, 3], or grey ones [H, W] ("rows"); raw RGB planes [3, H, W], or [3, W, H] (each column by column); raw grey pixels
[H, W]."""
ENTRY = np.dtype([("offset", "<i8"), ("length", "<i8"), ("label", "<i8"), ("height", "<i4"), ("width", "<i4")])
_COLUMNS = ENTRY.names or ()
MOST_CLASSES = 1 << 20
"""Without a list of names, labels from here on are taken for damage."""
CLASSES_FILE = "classes.txt"


LOST_WHOLE, LOST_REST = "the whole shard is lost", "the rest of the shard is lost"
"""How the reason begins for which an unknown number of images is missing."""


class NoShards(ValueError):
    """The folder holds nothing of a format; other ValueErrors of `Format.shards` say that something of it is wrong."""


class MalformedShard(ValueError):
    """Why a shard's bytes cannot be read on, and at which byte. The only error a parser raises for bad bytes."""

    def __init__(self, reason: str, *, offset: int = 0) -> None:
        super().__init__(reason)
        self.offset = offset


class BadLabel(MalformedShard):
    """Why a label cannot be used. Never skipped as an unreadable image is: a wrong label means others may be wrong."""


class Shard(NamedTuple):
    """A file of samples, or a folder of files.

    name: relative to the root, with slashes. part: what it is for, of the data set's own parts. label: of all its
    samples, where a folder stands for a class; or what else tells the format which of its samples they are.
    """

    name: str
    part: Part = "train"
    label: int = 0


class Refusal(NamedTuple):
    """What was not taken.

    entry: its row in the shard's entries, or None where it has none. label: the label is at fault, not the image.
    """

    file: str
    offset: int | None
    reason: str
    entry: int | None = None
    label: bool = False


@dataclass
class Scan:
    """What one shard holds.

    entries: ENTRY [n], in the shard's order, with labels as they stand in the files; build.py then counts them from 0.
        A refused one keeps its row, with label 0 and size 0 x 0.
    names: layout "file": the samples' file names, encoded, one behind another; name_ends: int64 [n], where each ends.
    class_names: names that the shard itself gives for some labels, as they stand in the files.
    given: what the samples themselves say of the classes of some labels, to be compared between shards.
    census: the images by file format, and what the shard holds and is not used.
    """

    entries: np.ndarray
    refusals: list[Refusal] = field(default_factory=list)
    names: bytes = b""
    name_ends: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    class_names: dict[int, str] = field(default_factory=dict)
    given: dict[int, str] = field(default_factory=dict)
    census: Census = field(default_factory=Census)

    @classmethod
    def of_pixels(
        cls, labels: np.ndarray, *, size: tuple[int, int], length: int, first: int = 0, stride: int | None = None
    ) -> Scan:
        """Raw images of one size.

        Args:
            labels: one per image, whole numbers [n].
            size: height and width, pixels.
            length: of an image, bytes.
            first: the byte that the first one begins at.
            stride: bytes from one to the next; None: they lie one behind another.
        """
        entries = np.zeros(len(labels), ENTRY)
        entries["offset"] = first + np.arange(len(labels)) * (length if stride is None else stride)
        entries["length"] = length
        entries["label"] = labels
        entries["height"], entries["width"] = size
        return cls(entries)

    @classmethod
    def lost(cls, shard: Shard, error: MalformedShard) -> Scan:
        """Nothing of the shard can be used."""
        reason = f"{LOST_WHOLE}: {error}"
        return cls(np.zeros(0, ENTRY), [Refusal(shard.name, error.offset, reason, label=isinstance(error, BadLabel))])


@dataclass(frozen=True)
class ScanOptions:
    """Settings that change what a scan finds; part of an index's identity."""

    label_offset: int | None = None
    """The first class's label in the files; None: the format's custom."""
    check_data: bool = True
    """Whether checksums of the data are computed, where the format has any."""
    labels: bool = True
    """Whether labels are read. False: the images are unlabelled ones, but for those of the test part."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in meta.json; `labels` only where it is not as it always was in earlier versions."""
        return {name: value for name, value in asdict(self).items() if name != "labels" or not value}


class Format(Protocol):
    """A kind of data set that can be indexed."""

    @property
    def layout(self) -> Layout: ...

    @property
    def first_label(self) -> int | None:
        """The first class's label where `label_offset` is not set; None: labels are the format's, it has no effect."""

    @property
    def checksums(self) -> bool:
        """Whether `check_data` has an effect."""

    def sidecars(self, root: Path) -> Sequence[str]:
        """Files beside the shards that labels or names are read from, present or not, relative to the root."""

    def shards(self, root: Path) -> Sequence[Shard]:
        """All shards, in order. Raises NoShards where the folder holds none, with the fix."""

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        """What the shard holds. What cannot be read is refused, not raised. Without `options.labels`, labels may be
        missing, and are ignored.

        Pixels that cannot be read where they are (compressed ones) are written to the file `unpacked`, one image
        behind another; the offsets then refer to it.
        """

    def classes(self, root: Path) -> Sequence[str] | None:
        """Names, where the format or a file beside the shards has them; None: taken from the labels found."""


class PlainFormat:
    """Defaults of a Format: labels are the format's, there are no checksums and no files beside the shards."""

    first_label: int | None = None
    checksums = False

    def sidecars(self, root: Path) -> Sequence[str]:
        return ()


FORMATS: Registry[Format] = Registry("data format")


def register_format(name: str) -> Callable[[type], type]:
    """Make a class with the methods of Format, built without arguments, available as `mpl_scale.data.source`."""

    def add(cls: type) -> type:
        FORMATS[name] = cls()
        return cls

    return add


class GivenClasses:
    """The classes that samples name beside their labels: each label has one name, and each name one label."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self._labels: dict[str, int] = {}

    def conflict(self, label: int, name: str) -> str | None:
        """Why this pair contradicts an earlier one; None: it does not, and is kept."""
        known, other = self.names.get(label, name), self._labels.get(name, label)
        if known != name:
            return f"label {label} stands beside class {name!r} here, beside {known!r} elsewhere"
        if other != label:
            return f"class {name!r} has label {label} here, {other} elsewhere"
        self.names[label] = name
        self._labels[name] = label
        return None


class ScanBuilder:
    """Collects a shard's samples one by one."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._values = array("q")  # those of ENTRY, row after row: 40 bytes, and no object that stays
        self._refusals: list[Refusal] = []
        self.class_names: dict[int, str] = {}
        self.census = Census()
        self._given = GivenClasses()

    def __len__(self) -> int:
        """Samples so far, with the refused ones."""
        return len(self._values) // len(_COLUMNS)

    def add(self, offset: int, length: int, *, label: int, header: Header) -> None:
        """A sample; label: as it stands in the file; header: what its image says of itself."""
        self._values.extend((offset, length, label, *header.stored))
        self.census.kinds[header.label] += 1

    def add_many(self, entries: np.ndarray, *, census: Mapping[str, int], refused: Mapping[int, ValueError]) -> None:
        """Samples one behind another.

        Args:
            entries: ENTRY [n].
            census: how many of them there are of each file format, but for the refused ones.
            refused: those that cannot be used, by row, and why.
        """
        for row, reason in refused.items():
            entries["label"][row] = entries["height"][row] = entries["width"][row] = 0
            label = isinstance(reason, BadLabel)
            offset = int(entries["offset"][row])
            self._refusals.append(Refusal(self._file, offset, str(reason), len(self) + row, label))
        self._values.frombytes(np.stack([entries[name].astype(np.int64) for name in _COLUMNS], axis=1).tobytes())
        self.census.kinds.update(census)

    def compare(self, label: int, name: str) -> None:
        """A label, and the class that its sample names itself. Raises BadLabel where an earlier sample contradicts."""
        conflict = self._given.conflict(label, name)
        if conflict is not None:
            raise BadLabel(f"{conflict}: one of them is wrong")

    def refuse_sample(self, offset: int, length: int, reason: str | ValueError) -> None:
        """A sample that keeps its place in the order, but cannot be used."""
        label = isinstance(reason, BadLabel)
        self._refusals.append(Refusal(self._file, offset, str(reason), len(self), label))
        self._values.extend((offset, length, 0, 0, 0))

    def refuse(self, offset: int, reason: str) -> None:
        """Record something that is not a sample."""
        self._refusals.append(Refusal(self._file, offset, reason))

    def scan(self) -> Scan:
        """Everything added so far as a Scan."""
        values = np.frombuffer(self._values, np.int64).reshape(-1, len(_COLUMNS))
        entries = np.empty(len(values), ENTRY)
        for column, name in enumerate(_COLUMNS):
            entries[name] = values[:, column]
        return Scan(entries, self._refusals, class_names=self.class_names, given=self._given.names, census=self.census)


def classes_file(root: Path) -> list[str] | None:
    """The lines of root/classes.txt, one name per class; None where there is no such file.

    Raises:
        ValueError: it cannot be read as text, or holds fewer than two names.
    """
    path = root / CLASSES_FILE
    if not path.exists():
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' cannot be read: {error}; write one class name a line, in UTF-8") from error
    if "" in names and names != [""]:
        raise ValueError(f"'{path}': line {names.index('') + 1} is blank, which shifts the labels after it; remove it")
    doubled = next((name for row, name in enumerate(names) if name in names[:row]), None)
    if doubled is not None:
        raise ValueError(f"'{path}' names class '{doubled}' twice; give each class a name of its own")
    if len(names) < 2:
        raise ValueError(f"'{path}' holds fewer than two names; write one class name a line, or remove it")
    return names


def named_classes(names: dict[int, str], *, highest: int) -> list[str]:
    """A name for each label up to `highest`: the given one, or "class N"."""
    return [names.get(label, f"class {label}") for label in range(highest + 1)]


def alike(classes: Sequence[str]) -> list[str]:
    """For people: names of classes that look the same, as "Cat" and "cat", or an accent in two encodings."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        if len(name) > 1:  # EMNIST's letters
            groups.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), []).append(repr(name))
    return [
        f"classes that are told apart by capitals, blanks or encoding alone: {', '.join(names)}"
        for names in groups.values()
        if len(names) > 1
    ]


def untrained(classes: Sequence[str], absent: Sequence[int]) -> list[str]:
    """For people: the classes, by label, of which the training files hold no image."""
    names = ", ".join(repr(classes[label]) for label in absent[:5])
    more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
    return [f"classes without an image for training: {names}{more}"] if absent else []


def shards_of(source: str, root: Path, options: ScanOptions) -> list[Shard]:
    """The shards of a data set of a format, in order, as an index with these options takes them.

    Raises:
        ValueError: as Format.shards.
    """
    found = FORMATS[source].shards(root)
    if options.labels:
        return list(found)
    return [shard if shard.part == "test" else shard._replace(part="unlabelled") for shard in found]


def existing(root: Path, names: Sequence[tuple[str, Part]], *, folders: Sequence[str] = ("",)) -> list[Shard]:
    """Those of the named files that are there, in the given order; of the one folder ("": the root) that has any.

    Raises:
        ValueError: several folders have some.
    """
    by_folder = [
        [Shard(f"{folder}{name}", part) for name, part in names if (root / folder / name).is_file()]
        for folder in folders
    ]
    found = [shards for shards in by_folder if shards]
    if len(found) > 1:
        raise ValueError(
            f"mpl_scale.data.root = '{root}' holds both '{found[0][0].name}' and '{found[1][0].name}': which data "
            "set is meant? Keep one, or name its folder"
        )
    return found[0] if found else []


def refuse_other_names(path: Path, found: Sequence[str], expected: Sequence[str]) -> None:
    """ValueError where the names that a data set's own file gives its classes are not those of its format."""
    if found and list(found) != list(expected):
        row = next((row for row, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
        which = f"{len(found)} classes" if row < 0 else f"class {row} {found[row]!r}, not {expected[row]!r}"
        raise ValueError(
            f"'{path}' names {which}: this is another data set than the source's; use source arrays or idx"
        )
