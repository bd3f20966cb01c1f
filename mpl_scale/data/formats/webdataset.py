"""Source `webdataset`: tar files whose neighbouring members with one key make a sample; also .tar.gz and .tgz.

A key ends at the first dot of the base name (WebDataset's rule): `a/0001.jpg` and `a/0001.cls` are sample a/0001.
Where that leaves a pair apart, the last dot decides: `photo_v1.040.png` and `photo_v1.040.cls` are a sample, too. The
label is .cls (digits) or the "label" of .json. Members that belong to no sample are counted.
"""

from __future__ import annotations

import gzip
import json
import os
import posixpath
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.encoded.probe import probe_at
from mpl_scale.data.formats.tar import Member, read_members
from mpl_scale.data.index.format import (
    CLASSES_FILE,
    LOST_REST,
    LOST_WHOLE,
    BadLabel,
    Layout,
    MalformedShard,
    Scan,
    ScanBuilder,
    ScanOptions,
    Shard,
    classes_file,
    register_format,
)
from mpl_scale.data.index.numbering import refuse_gaps
from mpl_scale.data.index.parts import find_shards

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jfif", "jpe")
_LABELS = ("cls", "json")
_NAMES = ("class_name", "classname", "label_name", "label_text", "class_text")
"""What a .json member may call the class's name."""
_COMPRESSED = (".gz", ".tgz")
_LONGEST_LABEL = 1 << 20  # bytes of a .cls or .json member


@register_format("webdataset")
class WebDataset:
    """Tar files of images and labels."""

    layout: Layout = "encoded"
    first_label: int | None = 0
    checksums = False

    def sidecars(self, root: Path) -> Sequence[str]:
        return (CLASSES_FILE,)

    def shards(self, root: Path) -> Sequence[Shard]:
        found = find_shards(root, r".*\.(tar|tar\.gz|tgz)", what=".tar file")
        by_stem: dict[str, str] = {}
        for shard in found:
            other = by_stem.setdefault(re.sub(r"\.(tar|tar\.gz|tgz)$", "", shard.name), shard.name)
            if other != shard.name:
                raise ValueError(
                    f"mpl_scale.data.root = '{root}' holds both '{other}' and '{shard.name}': its images would be seen "
                    "twice; remove one"
                )
        refuse_gaps(root, [shard.name for shard in found])
        return found

    def classes(self, root: Path) -> Sequence[str] | None:
        return classes_file(root)

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        builder, path = ScanBuilder(shard.name), root / shard.name
        if path.name.endswith(_COMPRESSED):
            try:
                with gzip.open(path) as packed, open(unpacked, "wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                unpacked.unlink(missing_ok=True)
                builder.refuse(0, f"{LOST_WHOLE}: it cannot be decompressed: {error}")
                return builder.scan()
            path = unpacked
        keys: set[str] = set()
        with open(path, "rb") as file:
            for _, members in groupby(_whole(file, builder), key=lambda member: _key(member.name)):
                for sample in _samples(list(members), builder, labels=options.labels):
                    _add(builder, file, sample, again=sample.key in keys, labels=options.labels)
                    keys.add(sample.key)
        scan = builder.scan()
        if not len(builder) and not scan.refusals:
            builder.refuse(0, f"{LOST_WHOLE}: it holds no sample")
        return scan


def _whole(file: BinaryIO, builder: ScanBuilder) -> Iterator[Member]:
    """The members that can be read; the others are refused."""
    try:
        for member in read_members(file):
            if member.refused is None:
                yield member
            else:
                builder.refuse(member.offset, f"member '{member.name[:200]}': {member.refused}")
    except MalformedShard as error:
        builder.refuse(error.offset, f"{LOST_REST}: {error}")


def _key(name: str) -> str:
    """The key by WebDataset's rule: "a/1.x.PNG" has the key "a/1"."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


class _Sample(NamedTuple):
    """The key, members by ending, and what there is twice, or ""."""

    key: str
    by_ending: dict[str, Member]
    doubled: str


def _samples(members: list[Member], builder: ScanBuilder, *, labels: bool) -> Iterator[_Sample]:
    """The samples among the members of one key; what belongs to none is counted.

    Members are told apart by all that stands before the last dot. "1.png", "1.cls", "1.depth.png" are one sample, with
    a second image that is not used; "1.040.png", "1.040.cls", "1.041.png" are two, the second one without its label.
    """
    by_stem: dict[str, dict[str, Member]] = {}
    doubled: set[str] = set()
    for member in members:
        stem, _, ending = (
            member.name.rpartition(".") if "." in member.name.rpartition("/")[2] else (member.name, "", "")
        )
        own = by_stem.setdefault(stem, {})
        if ending.lower() in own:
            doubled.add(stem)
            builder.census.leave_out(member.name[:200])
        else:
            own[ending.lower()] = member
    shortest = by_stem.get(_key(members[0].name), {})
    main = _is_sample(shortest) or (not labels and not shortest.keys().isdisjoint(_IMAGES))
    for stem, sample in by_stem.items():
        has_image = not sample.keys().isdisjoint(_IMAGES)
        has_label = not sample.keys().isdisjoint(_LABELS)
        images = [ending for ending in _IMAGES if ending in sample]
        used = [*images[:1], *[ending for ending in _LABELS if ending in sample][:1]]
        extra = main and sample is not shortest and not (has_image and has_label)
        for ending, member in sample.items():
            if extra or ending not in used:
                builder.census.leave_out(member.name[:200])
        if not extra and (has_image or has_label):
            twice = "two members of one name" if stem in doubled else "two images" if len(images) > 1 else ""
            yield _Sample(posixpath.normpath(stem), sample, twice)


def _is_sample(by_ending: dict[str, Member]) -> bool:
    return not by_ending.keys().isdisjoint(_IMAGES) and not by_ending.keys().isdisjoint(_LABELS)


def _add(builder: ScanBuilder, file: BinaryIO, sample: _Sample, *, again: bool, labels: bool) -> None:
    """again: the shard has had a sample of this key. labels: whether they are read."""
    by_ending = sample.by_ending
    image = next((by_ending[ending] for ending in _IMAGES if ending in by_ending), None)
    if image is None:
        label_only = next(by_ending[ending] for ending in _LABELS if ending in by_ending)
        builder.refuse(label_only.offset, f"member '{label_only.name[:200]}' has no image beside it")
        return
    try:
        label, name = 0, ""
        if labels:
            twice = sample.doubled or ("two samples" if again else "")
            if twice:
                raise BadLabel(f"{twice} of key '{sample.key[:200]}': which image the label belongs to is unknown")
            label, name = _label(file, by_ending)
        header = probe_at(file.fileno(), offset=image.offset, length=image.length)
        if name:
            builder.compare(label, name)
    except (MalformedShard, UnreadableImage) as error:
        builder.refuse_sample(image.offset, image.length, error)
        return
    builder.add(image.offset, image.length, label=label, header=header)


def _label(file: BinaryIO, by_ending: dict[str, Member]) -> tuple[int, str]:
    """The label, and the class that the .json member names beside it, or "".

    A .json beside a .cls may be anything, but must not say another label.
    """
    cls, json_member = by_ending.get("cls"), by_ending.get("json")
    if cls is None and json_member is None:
        others = ", ".join(f".{ending}" for ending in by_ending if ending not in _IMAGES)
        raise MalformedShard(f"no .cls or .json member beside the image{others and ', only ' + others}")
    label, document = None, {}
    if cls is not None:
        text = _text(file, cls)
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise BadLabel(f"the label {text[:20]!r} is no number")
        label = int(text)
    if json_member is not None:
        document = _document(_text(file, json_member))
    if "label" in document:
        other = document["label"]
        if type(other) is not int or abs(other) >= 10**18:
            raise BadLabel(f"the .json member has {json.dumps(other)[:20]} as 'label', not a whole number")
        if label not in (None, other):
            raise BadLabel(f"the .cls member says {label}, the .json member {other}")
        label = other
    if label is None:
        raise MalformedShard("the .json member has no whole number 'label'")
    return label, next((name.strip() for key in _NAMES if type(name := document.get(key)) is str), "")[:200]


def _text(file: BinaryIO, member: Member) -> str:
    if member.length > _LONGEST_LABEL:
        raise MalformedShard(f"a label of {member.length} bytes")
    return os.pread(file.fileno(), member.length, member.offset).decode("utf-8", errors="replace").strip()


def _document(text: str) -> dict[str, object]:
    """The object of a .json member; empty where it is none. BadLabel where it says "label" twice."""
    try:
        found = json.loads(text, object_pairs_hook=_one_label)
    except BadLabel:
        raise
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _one_label(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if sum(key == "label" for key, _ in pairs) > 1:
        raise BadLabel("the .json member has several 'label'")
    return dict(pairs)
