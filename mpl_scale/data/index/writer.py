"""The files of an index and of its parts: written aside, made durable, published by one rename."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpl_scale.data.index.census import Census
from mpl_scale.data.index.format import FORMATS, GivenClasses, Refusal, Scan, ScanOptions, Shard, named_classes
from mpl_scale.data.index.labels import LabelCensus, first_label, set_offset
from mpl_scale.data.index.parts import left_over
from mpl_scale.data.index.reader import ARRAYS, FORMAT, VERSION, pixels_name, sha256_of
from mpl_scale.files import create_array, naming, replace_text, replacing_folder, save_array, write_text


class _Part(NamedTuple):
    """A scanned shard, read back."""

    entries: np.ndarray  # ENTRY [n]
    about: dict[str, Any]
    files: PartFiles


class Identity(NamedTuple):
    """Of a shard: bytes, modification time, and what tells its content (contents.py); None: it could not be read."""

    size: int
    mtime_ns: int
    digest: str | None = None


class PartFiles:
    """What the scan of one shard leaves in the folder of a build."""

    def __init__(self, folder: Path, number: int) -> None:
        stem = folder / f"{number:06d}"
        self.entries, self.names, self.ends, self.pixels, self.about = (
            stem.with_suffix(suffix) for suffix in (".npy", ".names", ".ends.npy", ".pixels", ".json")
        )

    def write(self, scan: Scan, shard: Shard, identity: Identity, *, labels: tuple[int, int] | None = None) -> None:
        """Write a scan; the .json comes last, by a rename: with it the part is complete.

        labels: the smallest and the largest one, as they stand in the shard.
        """
        save_array(self.entries, scan.entries)
        if scan.names:
            with naming(self.names):
                self.names.write_bytes(scan.names)
            save_array(self.ends, scan.name_ends)
        about = {
            "name": shard.name,
            "bytes": identity.size,
            "mtime_ns": identity.mtime_ns,
            "digest": identity.digest,
            "images": len(scan.entries),
            "unpacked": self.pixels.exists(),
            "refusals": scan.refusals,
            "class_names": scan.class_names,
            "given": scan.given,
            "labels": labels,
            "census": scan.census.to_json(),
        }
        replace_text(self.about, json.dumps(about), durable=False)

    def images_of(self, shard: Shard, size: int, mtime_ns: int) -> int | None:
        """Images of the part, if it is complete and of this very shard; otherwise None, and its files are removed."""
        try:
            about = json.loads(self.about.read_text(encoding="utf-8"))
            same = (about["name"], about["bytes"], about["mtime_ns"]) == (shard.name, size, mtime_ns)
            if same and about["unpacked"] == self.pixels.exists():
                return int(about["images"])
        except (OSError, ValueError, KeyError):
            pass
        for path in (self.about, self.entries, self.names, self.ends, self.pixels):
            path.unlink(missing_ok=True)
        return None

    def read(self) -> _Part:
        """The part of the data set it belongs to."""
        about = json.loads(self.about.read_text(encoding="utf-8"))
        return _Part(np.load(self.entries, mmap_mode="r" if about["images"] else None), about, self)


def write_index(
    output: Path, *, partial: Path, shards: Sequence[Shard], identity: dict[str, Any]
) -> tuple[int, int, Counter[str]]:
    """Lay the parts of all shards behind one another and publish them as an index; memory holds one shard at a time.

    identity: source, root, options and sidecars, as they go into meta.json.

    Returns the images, how many were refused, and the refusals by kind of reason.

    Raises:
        ValueError: no shard holds a usable image.
    """
    with replacing_folder(output) as folder:
        (folder / "pixels").mkdir()
        return _fill(folder, partial, shards, identity)


def _fill(
    folder: Path, partial: Path, shards: Sequence[Shard], identity: dict[str, Any]
) -> tuple[int, int, Counter[str]]:
    parts = [PartFiles(partial, number) for number in range(len(shards))]
    count = sum(len(part.read().entries) for part in parts)
    source, root, options = identity["source"], Path(identity["root"]), ScanOptions(**identity["options"])
    adjustable = FORMATS[source].first_label is not None
    label_census = LabelCensus(first_label(source, options), adjustable=adjustable)
    refused, reasons, highest, class_names, first = _write_arrays(folder, parts, shards, label_census)
    classes = FORMATS[source].classes(root) if options.labels else None
    _compare_names(folder, parts, shards, classes, label_census, reasons)
    labels = label_census.finding(
        named=None if classes is None else len(classes), assumed=adjustable and options.label_offset is None
    )
    if count == len(refused):
        if labels["suspicion"] is not None:
            first.append(labels["suspicion"])
        if labels["offset"] is not None:
            first.append(set_offset(labels["offset"]))
        raise ValueError(f"'{root}' holds no usable image: {'; '.join(first) or 'its shards are empty'}")
    classes = classes or named_classes(class_names, highest=highest)
    census = left_over(root, shards, layout=FORMATS[source].layout, sidecars=FORMATS[source].sidecars(root))
    described, contents = [], []
    for number, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        about = part.read().about
        census.update(Census.from_json(about["census"]))
        if about["unpacked"]:
            part.pixels.rename(folder / pixels_name(number))
        contents.append(about.get("digest"))
        described.append([shard.name, shard.part, about["bytes"], about["mtime_ns"], about["unpacked"]])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    meta = {
        "format": FORMAT,
        "version": VERSION,
        **identity,
        "layout": FORMATS[source].layout,
        "classes": list(classes),
        "count": count,
        "refused": len(refused),
        "refusals": sum(reasons.values()),
        "reasons": dict(reasons),
        "labels": labels,
        "untrained": label_census.absent(len(classes)),
        "census": census.to_json(),
        "sha256": {path.relative_to(folder).as_posix(): sha256_of(path) for path in files},
        "shards": described,
        "contents": contents,
    }
    write_text(folder / "meta.json", json.dumps(meta))
    return count, sum(reasons.values()), reasons


def _write_arrays(
    folder: Path, parts: Sequence[PartFiles], shards: Sequence[Shard], census: LabelCensus
) -> tuple[np.ndarray, Counter[str], int, dict[int, str], list[str]]:
    """Refused ids int64 [R], refusals by kind, the highest label, names by label, a reason of each kind."""
    count = sum(len(part.read().entries) for part in parts)
    arrays = {name: _create(folder / f"{name}.npy", dtype=dtype, count=count) for name, dtype in ARRAYS.items()}
    named = any(part.names.exists() for part in parts)
    ends = _create(folder / "name_end.npy", dtype=np.dtype("<i8"), count=count) if named else None
    refused: list[int] = []
    reasons: Counter[str] = Counter()
    first: list[str] = []
    class_names: dict[int, str] = {}
    start, name_bytes, highest = 0, 0, 0
    with open(folder / "refused.jsonl", "w", encoding="utf-8") as lines, open(folder / "name.bin", "wb") as names:
        for number, part in enumerate(map(PartFiles.read, parts)):
            rows = slice(start, start + len(part.entries))
            arrays["shard"][rows] = number
            for name in ("offset", "length", "label"):
                arrays[name][rows] = part.entries[name]
            arrays["size"][rows, 0], arrays["size"][rows, 1] = part.entries["height"], part.entries["width"]
            if ends is not None and len(part.entries):
                ends[rows] = name_bytes + np.load(part.files.ends)
                name_bytes += names.write(part.files.names.read_bytes())
            usable = np.ones(len(part.entries), bool)
            for refusal in _refusals(part):
                sample = None if refusal.entry is None else start + refusal.entry
                if sample is not None:
                    refused.append(sample)
                    usable[refusal.entry] = False
                kind, said = kind_of(refusal.reason), f"{refusal.file}: {refusal.reason}"
                line = {"file": refusal.file, "offset": refusal.offset, "sample": sample, "reason": refusal.reason}
                if refusal.label:
                    line["kind"] = "label"
                    census.add_fault(said, first=kind not in reasons)
                lines.write(json.dumps(line) + "\n")
                if kind not in reasons and len(first) < 5:
                    first.append(said)
                reasons[kind] += 1
            class_names = {int(label): text for label, text in part.about["class_names"].items()} | class_names
            highest = max(highest, int(part.entries["label"].max(initial=0)))
            census.add(shards[number].part, part.about["labels"], part.entries["label"][usable])
            start = rows.stop
    if ends is None:
        (folder / "name.bin").unlink()
    ids = np.unique(np.array(refused, np.int64))
    save_array(folder / "refused.npy", ids)
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()
    return ids, reasons, highest, class_names, first


def _compare_names(
    folder: Path,
    parts: Sequence[PartFiles],
    shards: Sequence[Shard],
    classes: Sequence[str] | None,
    census: LabelCensus,
    reasons: Counter[str],
) -> None:
    """Note as faults where the classes that samples name contradict those of other shards, or the list of names."""
    given = GivenClasses()
    with open(folder / "refused.jsonl", "a", encoding="utf-8") as lines:
        for shard, part in zip(shards, map(PartFiles.read, parts), strict=True):
            for label, name in part.about.get("given", {}).items():
                found = given.conflict(int(label) + census.first, name)
                if found is None and classes is not None and name in classes and classes[int(label)] != name:
                    found = (
                        f"label {int(label) + census.first} stands beside class {name!r}, not {classes[int(label)]!r}"
                    )
                if found is not None:
                    line = {"file": shard.name, "offset": None, "sample": None, "reason": found, "kind": "label"}
                    lines.write(json.dumps(line) + "\n")
                    census.add_fault(f"{shard.name}: {found}", first=kind_of(found) not in reasons)
                    reasons[kind_of(found)] += 1


def kind_of(reason: str) -> str:
    """A reason without the values that differ from sample to sample: "label 7 is ..." and "label 8 is ..." are one."""
    return re.sub(r"'.*?'", "'...'", re.sub(r"\d+", "N", reason))


def _refusals(part: _Part) -> Iterator[Refusal]:
    """The refusals of a shard, by offset."""
    return iter(sorted((Refusal(*entry) for entry in part.about["refusals"]), key=lambda refusal: refusal.offset or 0))


def _create(path: Path, *, dtype: np.dtype, count: int) -> np.ndarray:
    """A new array on disk, zeros, [count] or [count, 2]."""
    shape = (count, 2) if path.stem == "size" else (count,)
    if not count:
        save_array(path, np.zeros(shape, dtype))
        return np.zeros(shape, dtype)
    return create_array(path, dtype=dtype, shape=shape)
