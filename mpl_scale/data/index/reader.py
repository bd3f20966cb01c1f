"""The index of a data set: flat arrays on disk, opened memory-mapped; nothing in memory grows with the samples.

A folder of

    meta.json         version, source, root, options, classes, shards with size and time, files beside them
                      (sidecars.py), counts, what is wrong with the labels (labels.py), sha256 of the arrays
    shard.npy         uint32 [N], of each sample            offset.npy   int64 [N], bytes
    length.npy        int64 [N], bytes                      label.npy    int64 [N], from 0
    size.npy          int32 [N, 2], height and width        refused.npy  int64 [R], ids that cannot be used
    name.bin, name_end.npy    layout "file" only: file names, and where each ends
    pixels/NNNNNN     what a shard's compressed pixels unpack to, where the format needs it
    refused.jsonl     file, offset, sample id and reason of everything that was refused

Ranks of a node share its pages; opening it reads meta.json and looks at each shard's size and time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.encoded.probe import pam, ppm
from mpl_scale.data.index import sidecars
from mpl_scale.data.index.census import Census
from mpl_scale.data.index.descriptors import Descriptors, read_file
from mpl_scale.data.index.format import LOST_REST, LOST_WHOLE, Layout, Part, alike, untrained
from mpl_scale.data.index.numbering import late_starts
from mpl_scale.data.index.parts import parts_line

FORMAT, VERSION = "mpl_scale.index", 2
READ_VERSIONS = (1, 2)
"""Version 1 records no sidecars, no finding about the labels and no census."""
ARRAYS: dict[str, np.dtype] = {
    "shard": np.dtype("<u4"),
    "offset": np.dtype("<i8"),
    "length": np.dtype("<i8"),
    "label": np.dtype("<i8"),
    "size": np.dtype("<i4"),
}
"""Type by array; `size` has two columns."""


class StaleIndex(ValueError):
    """The shards, or files beside them, are not what they were when they were indexed.

    reason: without what to do about it.
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason, fix)
        self.reason, self.fix = reason, fix

    def __str__(self) -> str:
        return f"{self.reason}; {self.fix}"


class IndexedShard(NamedTuple):
    """A shard as it was indexed: bytes and modification time, and whether its pixels lie in the index."""

    name: str
    part: Part
    bytes: int
    mtime_ns: int
    unpacked: bool


class IndexedImages:
    """An ImageSet (registry.py) read through an index. `read` may be called from several threads."""

    def __init__(
        self, folder: Path, *, root: Path | None = None, root_setting: str | None = "mpl_scale.data.root"
    ) -> None:
        """Args:
        folder: the index.
        root: where the shards are; None: where they were when they were indexed.
        root_setting: what users change `root` with, for messages; None: nothing.

        Raises:
            ValueError: no index, one of another version, a damaged one; StaleIndex where a shard has changed.
        """
        self.folder = folder
        self.meta = read_meta(folder)
        self.root = Path(self.meta["root"]) if root is None else root
        self.source: str = self.meta["source"]
        self.classes: tuple[str, ...] = tuple(self.meta["classes"])
        self.shards = tuple(IndexedShard(*shard) for shard in self.meta["shards"])
        self._layout: Layout = self.meta["layout"]
        count = self.meta["count"]
        for shard in self.shards:
            confined(shard.name)
        self._shard, self._offset, self._length, self.labels, self.sizes = (
            _open(folder, name, count=count) for name in ARRAYS
        )
        self.refused = _open(folder, "refused", count=self.meta["refused"])
        self._name_end = _open(folder, "name_end", count=count) if self._layout == "file" else None
        self._descriptors = Descriptors()
        self._refuse_changes(root_setting)

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], bytes of each image where it is stored."""
        return self._length

    @property
    def bad(self) -> int:
        """What was refused, with an id or without (the rest of a damaged shard counts once)."""
        return int(self.meta["refusals"])

    def refusals(self, most: int) -> dict[str, str]:
        """The first ones: reason by name."""
        found = {}
        with open(self.folder / "refused.jsonl", encoding="utf-8") as file:
            for line in itertools.islice(file, most):
                entry = json.loads(line)
                where = f"{self.root / entry['file']}"
                found[where if entry["offset"] is None else f"{where}, byte {entry['offset']}"] = str(entry["reason"])
        return found

    def lost(self) -> list[str]:
        """The shards that are cut short or damaged, each with the reason: how many images are missing is unknown."""
        if not any(kind.startswith((LOST_WHOLE, LOST_REST)) for kind in self.meta.get("reasons", {})):
            return []
        with open(self.folder / "refused.jsonl", encoding="utf-8") as file:
            found = [entry for entry in map(json.loads, file) if entry["reason"].startswith((LOST_WHOLE, LOST_REST))]
        return [f"'{entry['file']}': {entry['reason']}" for entry in found]

    def twins(self) -> list[tuple[IndexedShard, IndexedShard]]:
        """Shards of the same content as an earlier one, in pairs with that one."""
        first: dict[str, IndexedShard] = {}
        pairs = []
        for shard, digest in zip(self.shards, self.meta.get("contents", [None] * len(self.shards)), strict=True):
            if digest is not None and self._layout != "file":
                other = first.setdefault(digest, shard)
                pairs += [(other, shard)] if other is not shard else []
        return pairs

    def contents(self) -> list[str]:
        """For people: images by part and by format, and what was seen and is not used."""
        ends = np.searchsorted(self._shard, np.arange(len(self.shards) + 1, dtype=self._shard.dtype))
        counts = [(shard.name, shard.part, int(n)) for shard, n in zip(self.shards, np.diff(ends), strict=True)]
        lines = parts_line(counts) + Census.from_json(self.meta.get("census", {})).lines()
        twins = [f"'{other.name}' is '{one.name}' again, byte for byte" for one, other in self.twins()]
        lines += [*twins[:5], *([f"{len(twins) - 5} more shards are others again"] if len(twins) > 5 else [])]
        if self._layout == "encoded":
            lines += late_starts([shard.name for shard in self.shards])
            empty = [name for name, _, images in counts if not images]
            lines += [f"shards without an image: {len(empty)}, as '{empty[0]}'"] if empty else []
        labelled = any(shard.part != "unlabelled" for shard in self.shards)
        return lines + alike(self.classes) + untrained(self.classes, self.meta.get("untrained", []) if labelled else [])

    @property
    def fingerprint(self) -> str:
        """Stands for every sample's place, label and size, and for the content of the shards."""
        known = [self.meta["sha256"], self.meta["classes"], *([c] if (c := self.meta.get("contents")) else [])]
        joined = json.dumps(known, sort_keys=True)
        return hashlib.sha256(joined.encode()).hexdigest()

    def ids_of(self, part: Part) -> np.ndarray:
        """The samples of the data set's own parts, int64, sorted."""
        return self.ids_of_shards([number for number, shard in enumerate(self.shards) if shard.part == part])

    def ids_of_shards(self, numbers: Sequence[int]) -> np.ndarray:
        """The samples of some shards, given in ascending order: int64, sorted."""
        ranges: list[tuple[int, int]] = []
        for number in numbers:
            first, last = np.searchsorted(self._shard, np.array([number, number + 1], self._shard.dtype)).tolist()
            if ranges and ranges[-1][1] == first:
                first = ranges.pop()[0]  # one array, not one per shard to be joined: half the memory
            ranges.append((first, last))
        return concatenate([np.arange(first, last, dtype=np.int64) for first, last in ranges])

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """The number of each sample's shard, int64 [n]; samples: int64 [n]."""
        return np.asarray(self._shard[samples], np.int64)

    def read(self, sample: int) -> np.ndarray:
        """The encoded image, uint8 [bytes]; raw pixels as a PPM or PAM file. Raises UnreadableImage with the reason."""
        path, offset, length = self._place(sample)
        try:
            content = (
                read_file(path)
                if self._layout == "file"
                else self._descriptors.read(path, offset=offset, length=length)
            )
        except OSError as error:
            raise UnreadableImage(f"cannot be read: {error.strerror}") from error
        if len(content) != length:
            raise UnreadableImage(f"{len(content)} bytes where {length} were indexed: the file has changed")
        if self._layout in _RAW:
            height, width = (int(side) for side in self.sizes[sample])
            channels = length // (height * width)
            if self._layout == "rows" and channels not in (1, 3):
                content = pam(content, height=height, width=width, channels=channels)
            else:
                content = ppm(_RAW[self._layout](content, height, width), height=height, width=width)
        return np.frombuffer(content, np.uint8)

    @property
    def of_rows(self) -> bool:
        """Whether images are raw pixels [H, W, C], of any number of channels."""
        return self._layout == "rows"

    @property
    def of_files(self) -> bool:
        """Whether each image is a file of its own."""
        return self._layout == "file"

    def name(self, sample: int) -> str:
        """The file, and the byte its image begins at where it holds several."""
        path, offset, _ = self._place(sample)
        return path if self._layout == "file" else f"{path}, byte {offset}"

    def _place(self, sample: int) -> tuple[str, int, int]:
        number = int(self._shard[sample])
        offset, length = int(self._offset[sample]), int(self._length[sample])
        shard = self.shards[number]
        if shard.unpacked:
            return str(self.folder / pixels_name(number)), offset, length
        path = str(self.root / shard.name)
        if self._name_end is not None:
            begin = int(self._name_end[sample - 1]) if sample else 0
            raw = self._descriptors.read(
                str(self.folder / "name.bin"), offset=begin, length=int(self._name_end[sample]) - begin
            )
            if b"/" in raw or raw in (b"", b".", b".."):
                raise ValueError(
                    f"'{self.folder}': a file name that leaves its folder; {rebuild(self.meta, self.folder)}"
                )
            return f"{path}/{os.fsdecode(raw)}", 0, length
        return path, offset, length

    def _refuse_changes(self, root_setting: str | None) -> None:
        moved = "" if root_setting is None else f"set {root_setting} to where the shards are, "
        for shard in self.shards:
            path = self.root / shard.name
            try:
                status = path.stat()
            except OSError as error:
                raise StaleIndex(
                    f"shard '{path}' of index '{self.folder}' cannot be read: {error.strerror}",
                    f"bring it back, {moved}or {rebuild(self.meta, self.folder)}",
                ) from error
            changed = status.st_mtime_ns != shard.mtime_ns
            if path.is_file():  # a folder's size says nothing
                changed |= status.st_size != shard.bytes
            if changed:
                raise StaleIndex(
                    f"shard '{path}' has changed since index '{self.folder}' was built",
                    rebuild(self.meta, self.folder),
                )
        for name in sidecars.changed(self.root, self.meta.get("sidecars", {})):
            raise StaleIndex(
                f"'{self.root / confined(name)}' has changed since index '{self.folder}' was built",
                rebuild(self.meta, self.folder),
            )


def concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The parts one behind another, int64; the part itself where there is only one that holds anything."""
    parts = [part for part in parts if len(part)]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])


def is_index(folder: Path) -> bool:
    """Whether a folder's meta.json says that it is an index, of whatever version."""
    try:
        return bool(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    """An index's meta.json.

    Raises:
        ValueError: there is none, or it is of another kind or version.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        ours = meta["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"'{folder}' is no index: {error}; build one with mpl-scale index") from error
    if not ours or meta.get("version") not in READ_VERSIONS:
        raise ValueError(
            f"'{folder}' is an index of format {meta['format']} version {meta.get('version')}, not {FORMAT} {VERSION}; "
            "build it again with mpl-scale index"
        )
    missing = {
        "source",
        "root",
        "options",
        "layout",
        "classes",
        "shards",
        "count",
        "refused",
        "refusals",
        "sha256",
    } - meta.keys()
    if missing or meta["layout"] not in get_args(Layout):
        raise ValueError(f"'{path}' is damaged; build the index again with mpl-scale index")
    return dict(meta)


def verify(folder: Path) -> None:
    """Compare every file of an index with its checksum.

    Raises:
        ValueError: one differs.
    """
    meta = read_meta(folder)
    for name, expected in meta["sha256"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise ValueError(f"'{folder / confined(name)}' is damaged; {rebuild(meta, folder)}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixels_name(number: int) -> str:
    """The file of a shard's unpacked pixels, relative to the index."""
    return f"pixels/{number:06d}"


def confined(name: str) -> str:
    """The relative path itself; ValueError where it leaves its folder."""
    if name.startswith("/") or not name or ".." in name.split("/"):
        raise ValueError(f"an index names '{name}', which leaves its folder; build it again with mpl-scale index")
    return name


def _open(folder: Path, name: str, *, count: int) -> np.ndarray:
    """A read-only view of an array on disk."""
    try:
        # A plain view: numpy's memmap class costs microseconds per access. An array of no elements is not mapped.
        array = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r" if count else None, allow_pickle=False))
        fits = array.shape == ((count, 2) if name == "size" else (count,)) and array.dtype == ARRAYS.get(name, "<i8")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"'{folder}/{name}.npy' is damaged: {error}; build the index again") from error
    if not fits:
        raise ValueError(f"'{folder}/{name}.npy' is damaged: {array.dtype} {list(array.shape)}; build the index again")
    return array


def rebuild(meta: dict[str, Any], folder: Path, *, label_offset: int | None = None) -> str:
    """The command that builds an index again with its own settings, or with another label_offset."""
    source = meta.get("selected_from_index")
    if source is not None:  # index_subset.py
        return (
            f"select it again: mpl-scale select --index '{source}' --output '{folder}', with the checkpoint and the "
            f"rule of '{folder / 'selection.json'}'"
        )
    command = f"mpl-scale index '{meta['root']}' --source {meta['source']} --output '{folder}'"
    offset = meta["options"].get("label_offset") if label_offset is None else label_offset
    if offset is not None:
        command += f" --label_offset {offset}"
    if not meta["options"].get("check_data", True):
        command += " --skip_data_crc"
    if not meta["options"].get("labels", True):
        command += " --unlabelled"
    return f"rebuild it: {command}"


def _planes(content: bytes, height: int, width: int) -> bytes:
    return np.frombuffer(content, np.uint8).reshape(3, height, width).transpose(1, 2, 0).tobytes()


def _grey(content: bytes) -> bytes:
    return np.frombuffer(content, np.uint8).repeat(3).tobytes()


def _columns(content: bytes, height: int, width: int) -> bytes:
    return np.frombuffer(content, np.uint8).reshape(3, width, height).T.tobytes()


_RAW: dict[str, Callable[[bytes, int, int], bytes]] = {
    "rows": lambda content, height, width: content if len(content) == 3 * height * width else _grey(content),
    "planes": _planes,
    "columns": _columns,
    "grey": lambda content, height, width: _grey(content),
}
"""Raw pixels as [H, W, 3]."""
