"""Data sources by name: each turns `mpl_scale.data.root` into an ImageSet."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from mpl_scale.config.names import Registry, require_known
from mpl_scale.config.schema import DataConfig, PlaceConfig
from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.encoded.probe import unreadable_error
from mpl_scale.data.index.build import open_or_build
from mpl_scale.data.index.descriptors import read_file
from mpl_scale.data.index.detect import find_format
from mpl_scale.data.index.format import FORMATS, Part, ScanOptions
from mpl_scale.data.index.labels import first_label, label_problem, refuse_unused, set_offset
from mpl_scale.data.index.numbering import gaps
from mpl_scale.data.index.progress import IndexProgress
from mpl_scale.data.index.reader import VERSION, IndexedImages, is_index, read_meta, rebuild
from mpl_scale.files import expanded, refuse_inside

MOST_WORKERS = 16
WORKER_BYTES = 1 << 28
"""Processes that index a data set on the way to a run: one per WORKER_BYTES, since each takes seconds to start, and at
most MOST_WORKERS; `mpl-scale index --workers` decides otherwise."""


class ImageSet(Protocol):
    """Labelled, encoded images; a sample id is an index into the arrays, which may lie on disk (memory-mapped)."""

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], in [0, len(classes))."""

    @property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2], height and width of the encoded image, pixels."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by label."""

    @property
    def refused(self) -> np.ndarray:
        """int64 [R], sorted ids that cannot be used: label 0, size 0 x 0, and in no split."""

    @property
    def bad(self) -> int:
        """How much was refused: the ids, and what never got one (the rest of a damaged shard counts once)."""

    def __len__(self) -> int: ...

    def read(self, sample: int) -> np.ndarray:
        """The encoded image, uint8 [bytes]; from any thread. Raises UnreadableImage with the reason."""

    def name(self, sample: int) -> str:
        """Where it is, for people: a path, or a path and an offset."""

    def refusals(self, most: int) -> Mapping[str, str]:
        """The first things refused: reason by name."""


@dataclass(frozen=True)
class ImageFiles:
    """An ImageSet of one file per image."""

    paths: np.ndarray  # str [N]
    labels: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int32 [N, 2]
    classes: tuple[str, ...]
    reasons: Mapping[int, str] = field(default_factory=dict)  # of the refused ones, by id
    tests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # ids of the data set's own test part
    notes: tuple[str, ...] = ()  # what people should know about the files

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def refused(self) -> np.ndarray:
        """Sample ids of the refused files, int64 [R], sorted."""
        return np.array(sorted(self.reasons), np.int64)

    @property
    def bad(self) -> int:
        """Number of refused files."""
        return len(self.reasons)

    def read(self, sample: int) -> np.ndarray:
        """The content of a file, uint8; UnreadableImage where it cannot be read."""
        try:
            encoded = read_file(str(self.paths[sample]))
        except OSError as error:
            raise UnreadableImage(f"cannot be read: {error.strerror}") from error
        return np.frombuffer(encoded, np.uint8)

    def contents(self) -> list[str]:
        """For people: images by part and by format, and what was seen and is not used."""
        return list(self.notes)

    def ids_of(self, part: Part) -> np.ndarray:
        """The samples of the data set's own parts, int64, sorted."""
        if part == "test":
            return self.tests
        ids = np.arange(len(self), dtype=np.int64)
        return np.setdiff1d(ids, self.tests) if part == "train" else ids[:0]

    def name(self, sample: int) -> str:
        """Path of the file."""
        return str(self.paths[sample])

    def refusals(self, most: int) -> dict[str, str]:
        """The first ones: reason by path."""
        return {self.name(sample): self.reasons[sample] for sample in self.refused[:most].tolist()}


Source = Callable[[Path | None], ImageSet]
SOURCES: Registry[Source] = Registry("data source")
register_source = SOURCES.register
"""Make a function `(root or None) -> ImageSet` available as `mpl_scale.data.source`; formats.register_format adds one
that is read through an index."""


def load_source(config: DataConfig) -> ImageSet:
    """The images of the configured source, every header checked, now or when they were indexed.

    A format without `mpl_scale.data.index` is indexed the first time, once per machine: below $MPL_SCALE_DATA, or
    ~/.cache/mpl_scale.

    Raises:
        ValueError: unknown source, missing root, a stale index, or more unreadable images than
            `max_bad_fraction`; each says how to mend it.
    """
    if config.is_synthetic:
        raise ValueError("mpl_scale.data.source = 'synthetic' has no data set to be read; name another source")
    refuse_options(config)
    options = ScanOptions(label_offset=config.label_offset, check_data=config.check_data is not False)
    root = None if config.root is None else expanded(config.root)
    if config.index is not None:
        images: ImageSet = _indexed(config, expanded(config.index), root)
    elif config.source in SOURCES:
        images = SOURCES[config.source](root)
    else:
        images = _cached(config.source, root, options, allow_damaged=config.allow_damaged_shards)
    if not isinstance(images, IndexedImages):
        _refuse_outside(images, config.source)
    else:
        refuse_bad_labels(images, built=config.index is not None)
        refuse_damaged(images, allowed=config.allow_damaged_shards)
        refuse_twins(images)
    _refuse_unreadable(images, config)
    return images


def load_place(place: PlaceConfig, config: DataConfig, *, field: str, labels: bool) -> IndexedImages:
    """The images of one place: an index, or the files of a format, indexed the first time.

    Args:
        place: a folder.
        config: what else is set for the data.
        field: that the place is given by, for messages.
        labels: whether the labels are used; without, files need none.

    Raises:
        ValueError: as load_source, or the format cannot be told.
    """
    try:
        images = _open_place(place, config, labels=labels)
        refuse_damaged(images, allowed=config.allow_damaged_shards)
        if labels:
            refuse_bad_labels(images, built=is_index(expanded(place.root)))
            refuse_twins(images)
        _refuse_unreadable(images, config)
    except ValueError as error:
        text = str(error).replace("mpl_scale.data.root", field).replace("mpl_scale.data.index", field)
        for name in ("source", "label_offset"):
            text = text.replace(f"mpl_scale.data.{name}", f"{field}.{name}")
        raise ValueError(text if field in text else f"{field}: {text}") from error
    return images


def _open_place(place: PlaceConfig, config: DataConfig, *, labels: bool) -> IndexedImages:
    root = expanded(place.root)
    if is_index(root):
        source = place.source or read_meta(root)["source"]
        own = {"source": source, "label_offset": place.label_offset, "check_data": None}
        return _indexed(config.model_copy(update=own), root, None, root_setting=None)
    fix = 'say which: {"root": "...", "source": "..."}'
    source = place.source or find_format(root, labels=labels, fix=fix)
    require_known("mpl_scale.data.source", source, FORMATS)
    refuse_unused(source, label_offset=place.label_offset, check_data=None)
    check = config.check_data is not False or not FORMATS[source].checksums
    options = ScanOptions(label_offset=place.label_offset, check_data=check, labels=labels)
    return _cached(source, root, options, allow_damaged=config.allow_damaged_shards)


def _refuse_unreadable(images: ImageSet, config: DataConfig) -> None:
    if images.bad > config.max_bad_fraction * max(1, len(images)):
        raise ValueError(
            f"{images.bad} of {len(images)} images are more than mpl_scale.data.max_bad_fraction = "
            f"{config.max_bad_fraction:g}: {unreadable_error(images.refusals(6), count=images.bad)}"
        )


def refuse_options(config: DataConfig) -> None:
    """ValueError for an unknown source, or a setting that has no effect with the source; reads no data."""
    require_known("mpl_scale.data.source", config.source, {*SOURCES, *FORMATS, "synthetic"})
    if config.is_synthetic:
        return
    refuse_unused(config.source, label_offset=config.label_offset, check_data=config.check_data)
    if config.index is not None and config.source not in FORMATS:
        raise ValueError(
            f"mpl_scale.data.index = '{config.index}' is for sources that are indexed, and source {config.source} is "
            "not; leave it out, or set the source that it was built from"
        )


def _refuse_outside(images: ImageSet, source: str) -> None:
    """ValueError where a label is no class; an index has been checked when it was built."""
    outside = np.flatnonzero((images.labels < 0) | (images.labels >= len(images.classes)))
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"mpl_scale.data.source = '{source}': {len(outside)} label(s) are outside 0 to {len(images.classes) - 1}, "
            f"the first one {int(images.labels[first])} of {images.name(first)}; count the classes from 0"
        )


def refuse_damaged(images: IndexedImages, *, allowed: bool = False) -> None:
    """Refuse an index of shards that are cut short or missing, unless that is wanted; `max_bad_fraction` is for images.

    Raises:
        ValueError: with the first shards, and why each is damaged, or the first missing number.
    """
    lost = [] if allowed else images.lost()
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(
            f"{len(lost)} shard(s) of '{images.root}' are damaged or not complete: {'; '.join(lost[:3])}{more}; fetch "
            "them again, or set mpl_scale.data.allow_damaged_shards = true to train on what can be read of them"
        )
    if not allowed and images.meta["layout"] == "encoded" and "selected_from_index" not in images.meta:
        _refuse_missing(images.root, [shard.name for shard in images.shards])


def _refuse_missing(root: Path, names: Sequence[str]) -> None:
    """ValueError where a number is missing among those of the shards."""
    missing = gaps(names)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"shards of '{root}' are missing: {'; '.join(missing[:3])}{more}; fetch them, or set "
            "mpl_scale.data.allow_damaged_shards = true to train on those that are there"
        )


def refuse_twins(images: IndexedImages) -> None:
    """ValueError where a shard of the test part is, byte for byte, one that is trained on."""
    for one, other in images.twins():
        if (one.part == "test") != (other.part == "test"):
            raise ValueError(
                f"'{images.root}': '{other.name}' is '{one.name}' again, byte for byte, and only one of them is test "
                "data: images would be tested on that were trained on; remove one"
            )


def data_folder() -> Path:
    """Where data that can be made again are kept: $MPL_SCALE_DATA, or ~/.cache/mpl_scale."""
    return expanded(os.environ.get("MPL_SCALE_DATA") or "~/.cache/mpl_scale")


def _indexed(
    config: DataConfig, folder: Path, root: Path | None, *, root_setting: str | None = "mpl_scale.data.root"
) -> IndexedImages:
    images = IndexedImages(folder, root=root, root_setting=root_setting)
    if images.source != config.source:
        raise ValueError(
            f"mpl_scale.data.index = '{folder}' was built from source {images.source}, not mpl_scale.data.source = "
            f"'{config.source}'; set '{images.source}'"
        )
    options = ScanOptions(**images.meta["options"])
    built_with = first_label(images.source, options)
    if config.label_offset not in (None, built_with):
        raise ValueError(
            f"mpl_scale.data.label_offset = {config.label_offset}, but mpl_scale.data.index = '{folder}' was built "
            f"with {built_with}; leave it out, or {rebuild(images.meta, folder, label_offset=config.label_offset)}"
        )
    if config.check_data not in (None, options.check_data):
        how = "without --skip_data_crc" if config.check_data else "with --skip_data_crc"
        raise ValueError(
            f"mpl_scale.data.check_data = {str(config.check_data).lower()}, but mpl_scale.data.index = '{folder}' was "
            f"built with {str(options.check_data).lower()}; leave it out, or build the index again {how}"
        )
    return images


def refuse_bad_labels(images: IndexedImages, *, built: bool) -> None:
    """Refuse an index whose labels cannot be right; `max_bad_fraction` is for images.

    Args:
        images: the index.
        built: whether it is `mpl_scale.data.index`, which does not obey `mpl_scale.data.label_offset`.

    Raises:
        ValueError: with the label_offset that would mend it, where one would.
    """
    problem = label_problem(images.meta)
    if problem is None:
        return

    def use(offset: int) -> str:
        return rebuild(images.meta, images.folder, label_offset=offset) if built else set_offset(offset)

    fixes = []
    if problem.offset is not None:
        fixes.append(use(problem.offset))
    if problem.confirm is not None:
        fixes.append(f"{use(problem.confirm)} if they are right")
    if not fixes and images.meta["version"] < VERSION:
        fixes.append(rebuild(images.meta, images.folder))
    if not fixes:
        fixes.append(f"correct them; each is listed in '{images.folder / 'refused.jsonl'}'")
    raise ValueError(f"labels of '{images.root}': {problem.what}; {'; or '.join(fixes)}")


def _cached(source: str, root: Path | None, options: ScanOptions, *, allow_damaged: bool) -> IndexedImages:
    """The index of this data set with these options, built the first time."""
    if root is None:
        raise ValueError(f"mpl_scale.data.root = null; source {source} needs the folder that holds its files")
    if not root.is_dir():
        raise ValueError(f"mpl_scale.data.root = '{root}' is no folder; give the one that holds the data set")
    names = [shard.name for shard in FORMATS[source].shards(root)]  # one more or less is another data set
    if FORMATS[source].layout == "encoded":
        refuse_inside(data_folder(), root, option="MPL_SCALE_DATA =")
        if not allow_damaged:
            _refuse_missing(root, names)  # before they are read
    size = sum((root / name).stat().st_size for name in names)
    key = json.dumps([VERSION, source, str(root.resolve()), options.to_json(), names])
    progress = IndexProgress()
    try:
        return open_or_build(
            source,
            root,
            output=data_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.index",
            workers=min(MOST_WORKERS, os.cpu_count() or 1, 1 + size // WORKER_BYTES),
            options=options,
            report=progress,
        )
    except OSError as error:
        raise ValueError(
            f"no index of '{root}' could be written: {error}; set MPL_SCALE_DATA to a folder with room, or build one "
            "with mpl-scale index and set mpl_scale.data.index"
        ) from error
    finally:
        progress.close()
