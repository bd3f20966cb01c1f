"""Tables of images as Hugging Face's `datasets` writes them: what the sources `parquet` and `arrow` share.

Column `image` is a struct of `bytes` and `path`, or the bytes themselves; column `label` holds whole numbers. Names of
the classes are in the schema's metadata. Columns are read batch by batch, as offsets and bytes.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.encoded.many import KINDS, probe_many
from mpl_scale.data.encoded.probe import probe
from mpl_scale.data.index.format import (
    CLASSES_FILE,
    ENTRY,
    LOST_REST,
    BadLabel,
    Layout,
    MalformedShard,
    Scan,
    ScanBuilder,
    ScanOptions,
    Shard,
    classes_file,
)
from mpl_scale.data.index.numbering import refuse_gaps
from mpl_scale.data.index.parts import find_shards
from mpl_scale.packages import require_packages

if TYPE_CHECKING:
    import pyarrow

_SHOWN = 10  # columns that a message names


class Table(Protocol):
    """An open file of rows."""

    @property
    def schema(self) -> pyarrow.Schema: ...

    def batches(self, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
        """All rows in order, with at least these columns ("image.bytes": a struct's member)."""

    def place(self, data: pyarrow.Buffer | None, start: int, stop: int) -> int:
        """Where a reader of the index finds the bytes [start, stop) of a batch's buffer: the offset of the first."""


class TableFormat(ABC):
    """A Format of files that hold one table each. Subclasses set `source` and `names`, and open a file."""

    layout: Layout = "encoded"
    first_label: int | None = 0
    checksums = False
    source: str
    names: str
    """A regular expression."""

    @abstractmethod
    def open(self, path: Path, unpacked: Path | None) -> contextlib.AbstractContextManager[Table]:
        """The table of a file; unpacked: where images go that cannot be read in place, None: only its schema is read.

        Errors of pyarrow are turned into MalformedShard by the caller.
        """

    def sidecars(self, root: Path) -> Sequence[str]:
        return (CLASSES_FILE,)

    def shards(self, root: Path) -> Sequence[Shard]:
        found = find_shards(root, self.names, what=f".{self.source} file")
        require_packages([(f"mpl_scale.data.source = '{self.source}'", "pyarrow")])
        refuse_gaps(root, [shard.name for shard in found])
        return found

    def classes(self, root: Path) -> Sequence[str] | None:
        """The names that the first readable shard gives, else those of classes.txt."""
        for shard in find_shards(root, self.names, what=f".{self.source} file"):
            with (
                contextlib.suppress(MalformedShard, OSError),
                _readable(),
                self.open(root / shard.name, None) as table,
            ):
                names, listed = class_names(table.schema), classes_file(root)
                places = {name: place for place, name in enumerate(listed or ())}
                moved = [name for place, name in enumerate(names or ()) if places.get(name, place) != place]
                if moved:
                    raise ValueError(
                        f"'{root / CLASSES_FILE}' and '{shard.name}' name the same classes in another order, such as "
                        f"'{moved[0]}'; remove or correct the first"
                    )
                return names or listed
        return classes_file(root)

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        builder = ScanBuilder(shard.name)
        try:
            with _readable(), self.open(root / shard.name, unpacked) as table:
                columns = image_and_label(table.schema, label=options.labels)
                names = class_names(table.schema) if options.labels else None
                if names is not None and len(set(names)) < len(names):
                    raise BadLabel("its schema gives two classes one name")
                if names is not None and names != self.classes(root):
                    raise BadLabel("the classes that its schema names are not those of the first shard")
                for batch in table.batches(columns):
                    _add_rows(builder, batch, table, labelled=options.labels)
        except MalformedShard as error:
            if not len(builder):
                unpacked.unlink(missing_ok=True)
                return Scan.lost(shard, error)
            builder.refuse(error.offset, f"{LOST_REST}: {error}")
        return builder.scan()


def class_names(schema: pyarrow.Schema) -> list[str] | None:
    """The names of the ClassLabel `label`, where `datasets` has noted them in the schema."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return names if type(names) is list and names and all(type(name) is str for name in names) else None


def image_and_label(schema: pyarrow.Schema, *, label: bool = True) -> list[str]:
    """The columns to read: that of the images and, with `label`, that of the labels.

    Raises:
        MalformedShard: there is no column `image` of bytes; BadLabel: no column `label` of whole numbers.
    """
    from pyarrow import types

    image = _type_of(schema, "image", MalformedShard)
    column, content = "image", image
    if types.is_struct(image) and image.get_field_index("bytes") >= 0:
        column, content = "image.bytes", image.field(image.get_field_index("bytes")).type
    if not (types.is_binary(content) or types.is_large_binary(content)):
        raise MalformedShard(f"column 'image' is {str(image)[:200]}, neither binary nor a struct with binary 'bytes'")
    if not label:
        return [column]
    kind = _type_of(schema, "label", BadLabel)
    if not types.is_integer(kind) or types.is_uint64(kind):
        raise BadLabel(f"column 'label' is {str(kind)[:200]}, not int64")
    return [column, "label"]


def _type_of(schema: pyarrow.Schema, name: str, error: type[MalformedShard]) -> Any:
    row = schema.get_field_index(name)  # -1 also where there are several
    if row < 0:
        more = f" and {len(schema.names) - _SHOWN} more" if len(schema.names) > _SHOWN else ""
        there = ", ".join(repr(name[:40]) for name in schema.names[:_SHOWN])
        raise error(f"it has no column '{name}', or several, but {there}{more}; rename the one to be used")
    return schema.field(row).type


def _add_rows(builder: ScanBuilder, batch: pyarrow.RecordBatch, table: Table, *, labelled: bool) -> None:
    """Append the rows of a batch to the builder, those that cannot be used as refused ones."""
    if not len(batch):
        return
    images = batch.column("image")
    images.validate(full=True)  # the offsets below are in order, and inside the buffer
    if images.type.num_fields:
        images = images.flatten()[images.type.get_field_index("bytes")]  # null where the struct is, too
    _, ends, data = images.buffers()  # row r is data[ends[r]:ends[r + 1]]
    kind = np.dtype(np.int64 if images.type == "large_binary" else np.int32)
    offsets = np.frombuffer(ends, kind, len(images) + 1, images.offset * kind.itemsize).astype(np.int64)
    first = table.place(data, int(offsets[0]), int(offsets[-1]))
    content = np.frombuffer(b"" if data is None else data, np.uint8)[offsets[0] : offsets[-1]]
    starts, ends = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    entries, no_label = np.zeros(len(batch), ENTRY), np.zeros(len(batch), bool)
    entries["offset"], entries["length"] = first + starts, ends - starts
    if labelled:
        labels = batch.column("label")
        labels.validate(full=True)
        entries["label"] = labels.fill_null(0).to_numpy(zero_copy_only=False)
        no_label = labels.is_null().to_numpy(zero_copy_only=False)
    no_image = images.is_null().to_numpy(zero_copy_only=False)
    kinds, sizes = probe_many(content, starts, ends)
    kinds[no_image | no_label] = 0
    entries["height"], entries["width"] = sizes.T
    census = Counter(KINDS[kind] for kind in kinds[kinds > 0].tolist())
    refused: dict[int, ValueError] = {}
    for row in np.flatnonzero(kinds == 0).tolist():
        try:
            if no_label[row]:
                raise BadLabel(f"the label of row {len(builder) + row} is null")
            if no_image[row]:
                raise MalformedShard(f"row {len(builder) + row} has no image, or only the path of one")
            header = probe(content[starts[row] : ends[row]].data)
        except (MalformedShard, UnreadableImage) as error:
            refused[row] = error
        else:
            entries["height"][row], entries["width"][row] = header.stored
            census[header.label] += 1
    builder.add_many(entries, census=census, refused=refused)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turn pyarrow's errors into MalformedShard; those of the file system stay."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        # pyarrow says OSError of damaged bytes, too, then without a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise MalformedShard(f"it cannot be read: {str(error).partition(chr(10))[0][:200]}") from error
