"""Source `arrow`: a folder that `save_to_disk` of Hugging Face's `datasets` wrote.

Each file is a stream of Arrow record batches, which are not compressed: images are read where they lie.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_scale.data.formats.columns import TableFormat
from mpl_scale.data.index.format import MalformedShard, register_format

if TYPE_CHECKING:
    import pyarrow

_END = b"\xff\xff\xff\xff\0\0\0\0"


@register_format("arrow")
class Arrow(TableFormat):
    """Streams of record batches with images and labels."""

    source = "arrow"
    names = r"(?!cache-).*\.arrow"  # `datasets` keeps results of map() in cache-*.arrow

    @contextlib.contextmanager
    def open(self, path: Path, unpacked: Path | None) -> Iterator[_ArrowTable]:
        import pyarrow

        with pyarrow.memory_map(str(path)) as file:
            yield _ArrowTable(file.read_buffer())


class _ArrowTable:
    def __init__(self, mapped: pyarrow.Buffer) -> None:
        """mapped: the file."""
        import pyarrow

        self._mapped, self._input = mapped, pyarrow.BufferReader(mapped)
        self._reader = pyarrow.ipc.open_stream(self._input)
        self.schema: pyarrow.Schema = self._reader.schema

    def batches(self, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
        yield from self._reader
        if self._input.tell() != self._mapped.size or self._mapped[-len(_END) :].to_pybytes() != _END:
            raise MalformedShard("it does not end with the stream's end marker")

    def place(self, data: pyarrow.Buffer | None, start: int, stop: int) -> int:
        if data is None or start == stop:
            return 0
        offset = data.address - self._mapped.address
        if not 0 <= offset + start <= offset + stop <= self._mapped.size:
            raise MalformedShard("its batches are compressed; write it with save_to_disk of `datasets`")
        return int(offset + start)
