"""Source `tfrecord`: shards of tf.train.Example in Inception's layout, indexed without TensorFlow.

A record is: length (uint64), masked CRC-32C of the length, data, masked CRC-32C of the data. Of an example,
image/encoded and image/class/label are needed; the label of the first class is 1 by custom (0 is "background").
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.encoded.probe import probe
from mpl_scale.data.formats.example import Feature, read_example
from mpl_scale.data.index.format import (
    CLASSES_FILE,
    LOST_REST,
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

_HEADER = struct.Struct("<QI")
_NAMES = r".*(\.tfrecords?|-of-\d+)"  # train-00000-of-01024, data.tfrecord
_COMPRESSED = {b"\x1f\x8b": "GZIP", b"\x78\x01": "ZLIB", b"\x78\x5e": "ZLIB", b"\x78\x9c": "ZLIB", b"\x78\xda": "ZLIB"}
_DATA_CRC = "wrong checksum of the record's data"


@register_format("tfrecord")
class TFRecord:
    """Shards of tf.train.Example in Inception's layout."""

    layout: Layout = "encoded"
    first_label: int | None = 1
    checksums = True

    def sidecars(self, root: Path) -> Sequence[str]:
        return (CLASSES_FILE,)

    def shards(self, root: Path) -> Sequence[Shard]:
        found = find_shards(root, _NAMES, what="TFRecord file (train-00000-of-01024, *.tfrecord)")
        refuse_gaps(root, [shard.name for shard in found])
        return found

    def classes(self, root: Path) -> Sequence[str] | None:
        return classes_file(root)

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        builder = ScanBuilder(shard.name)
        with open(root / shard.name, "rb") as file:
            try:
                for offset, record, intact in read_records(file, check_data=options.check_data):
                    if intact:
                        _add(builder, offset, record, labels=options.labels)
                    else:
                        builder.refuse_sample(offset, len(record), _DATA_CRC)
            except MalformedShard as error:
                builder.refuse(error.offset, f"{LOST_REST}: {error}")
        return builder.scan()


def read_records(file: BinaryIO, *, check_data: bool = True) -> Iterator[tuple[int, bytes, bool]]:
    """Offset of the data, the data, and whether its checksum is right, for each record.

    Raises:
        MalformedShard: a header's checksum is wrong, or the file ends inside a record: nothing after it can be found;
            or the file is compressed.
    """
    size = os.fstat(file.fileno()).st_size
    position = 0
    if not size:
        raise MalformedShard("it is empty")
    while position < size:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise MalformedShard("it ends inside a record's header", offset=position)
        length, crc = _HEADER.unpack(header)
        if masked_crc32c(header[:8]) != crc:
            compression = _COMPRESSED.get(header[:2]) if position == 0 else None
            if compression is not None:
                raise MalformedShard(f"{compression}-compressed TFRecord: decompress it")
            raise MalformedShard("wrong checksum of a record's length", offset=position)
        start = position + _HEADER.size
        if start + length + 4 > size:
            raise MalformedShard(f"it ends inside a record of {length} bytes", offset=position)
        record, stored = file.read(length), file.read(4)
        if len(stored) < 4:
            raise MalformedShard("it became shorter while it was read", offset=position)
        yield start, record, not check_data or masked_crc32c(record) == int.from_bytes(stored, "little")
        position = start + length + 4


def masked_crc32c(data: bytes) -> int:
    """CRC-32C as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _add(builder: ScanBuilder, offset: int, record: bytes, *, labels: bool) -> None:
    """One example: its image's place in the file, its size and its label; or why not."""
    try:
        features = read_example(record)
        image = features.get("image/encoded")
        if image is None or image.span is None:
            raise MalformedShard(f"the example has no image/encoded{_others(features)}")
        if image.values > 1:
            if labels:
                raise BadLabel(f"{image.values} images in image/encoded: which one the label belongs to is unknown")
            raise MalformedShard(f"{image.values} images in image/encoded, where one is expected")
        label = _label(features) if labels else 0
        start, length = image.span
        header = probe(record[start : start + length])
        text = _text(record, features, "image/class/text")
        synset = _text(record, features, "image/class/synset")  # ImageNet has two classes of one text, "crane"
        if labels and (text or synset):
            builder.compare(label, f"{synset} {text}".strip())
    except (MalformedShard, UnreadableImage) as error:
        builder.refuse_sample(offset, len(record), error)
        return
    if text:
        builder.class_names.setdefault(label, text)
    builder.add(offset + start, length, label=label, header=header)


def _text(record: bytes, features: Mapping[str, Feature], name: str) -> str:
    """The first 200 bytes of a feature of text; empty where there is none."""
    start, length = features.get(name, Feature()).span or (0, 0)
    return record[start : start + min(length, 200)].decode(errors="replace").strip()


def _label(features: Mapping[str, Feature]) -> int:
    """The label as it stands in the example. Raises MalformedShard where it has none; BadLabel where not one number."""
    label = features.get("image/class/label")
    if label is None or label.kind is None:
        raise MalformedShard(f"the example has no image/class/label{_others(features)}")
    if label.integer is None:
        raise BadLabel(f"image/class/label holds {label.kind}, not a whole number")
    if label.values > 1:
        raise BadLabel(f"{label.values} labels in image/class/label: an image with several labels cannot be used")
    return label.integer


def _others(features: Mapping[str, Feature]) -> str:
    """A hint where the names are those of TensorFlow Datasets."""
    if "image" not in features:
        return ""
    return ", only 'image' (a name of TensorFlow Datasets); name the features image/encoded and image/class/label"
