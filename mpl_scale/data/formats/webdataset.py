"""Source `webdataset`: tar files whose neighbouring members with one base name make a sample.

`a/0001.jpg` and `a/0001.cls` are sample a/0001: the image is .jpg, .jpeg or .png, the label .cls (digits) or the
"label" of .json. Members with other endings are passed over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from mpl_scale.data.encoded.probe import UnreadableImage, probe_at
from mpl_scale.data.formats.tar import Member, read_members
from mpl_scale.data.index.format import (
    CLASSES_FILE,
    BadLabel,
    Layout,
    MalformedShard,
    Scan,
    ScanBuilder,
    ScanOptions,
    Shard,
    classes_file,
    find_shards,
    register_format,
)

_IMAGES = ("jpg", "jpeg", "png")
_LONGEST_LABEL = 1 << 20  # bytes of a .cls or .json member


@register_format("webdataset")
class WebDataset:
    """Tar files."""

    layout: Layout = "encoded"
    first_label: int | None = 0
    checksums = False
    sidecars = (CLASSES_FILE,)

    def shards(self, root: Path) -> Sequence[Shard]:
        return find_shards(root, r".*\.tar", what=".tar file")

    def classes(self, root: Path) -> Sequence[str] | None:
        return classes_file(root)

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        builder = ScanBuilder(shard.name)
        with open(root / shard.name, "rb") as file:
            for _, members in groupby(_whole(file, builder), key=lambda member: _split(member.name)[0]):
                _add(builder, file, list(members))
        return builder.scan()


def _whole(file: BinaryIO, builder: ScanBuilder) -> Iterator[Member]:
    """The members that can be read; the others are refused."""
    try:
        for member in read_members(file):
            if member.refused is None:
                yield member
            else:
                builder.refuse(member.offset, f"member '{member.name[:200]}': {member.refused}")
    except MalformedShard as error:
        builder.refuse(error.offset, f"the rest of the shard is lost: {error}")


def _split(name: str) -> tuple[str, str]:
    """The sample's key and the ending, lower case: "a/1.x.PNG" is "a/1", "x.png"."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _add(builder: ScanBuilder, file: BinaryIO, members: list[Member]) -> None:
    by_ending = {_split(member.name)[1]: member for member in members}
    image = next((by_ending[ending] for ending in _IMAGES if ending in by_ending), None)
    if image is None:
        if "cls" in by_ending:
            builder.refuse(by_ending["cls"].offset, f"member '{by_ending['cls'].name[:200]}' has no image beside it")
        return
    try:
        if len(by_ending) < len(members):
            raise BadLabel("two members of one name: which image the label belongs to is unknown")
        label = _label(file, by_ending)
        size = probe_at(file.fileno(), offset=image.offset, length=image.length)
    except (MalformedShard, UnreadableImage) as error:
        builder.refuse_sample(image.offset, image.length, error)
        return
    builder.add(image.offset, image.length, label=label, size=size)


def _label(file: BinaryIO, by_ending: dict[str, Member]) -> int:
    member = by_ending.get("cls") or by_ending.get("json")
    if member is None:
        raise MalformedShard("no .cls or .json member beside the image")
    if member.length > _LONGEST_LABEL:
        raise MalformedShard(f"a label of {member.length} bytes")
    text = os.pread(file.fileno(), member.length, member.offset).decode("utf-8", errors="replace").strip()
    if member is by_ending.get("cls"):
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise BadLabel(f"the label {text[:20]!r} is no number")
        return int(text)
    try:
        label = json.loads(text)["label"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MalformedShard("the .json member has no whole number 'label'") from error
    if type(label) is not int or abs(label) >= 10**18:
        raise BadLabel(f"the .json member has {json.dumps(label)[:20]} as 'label', not a whole number")
    return label
