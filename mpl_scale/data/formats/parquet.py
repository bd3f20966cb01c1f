"""Source `parquet`: image data sets as they are downloaded from Hugging Face, train-00000-of-00004.parquet and so on.

The values of a column lie in compressed pages. So the images' bytes are written out once, beside the index.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mpl_scale.data.formats.columns import TableFormat
from mpl_scale.data.index.format import MalformedShard, register_format

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_BATCH_BYTES, _BATCH_ROWS = 1 << 24, 1024
"""The most that is read at a time, bytes by the file's mean."""
_READ_BYTES = 1 << 20


@register_format("parquet")
class Parquet(TableFormat):
    """Files of images and labels in Apache's Parquet format."""

    source = "parquet"
    names = r".*\.parquet"

    @contextlib.contextmanager
    def open(self, path: Path, unpacked: Path | None) -> Iterator[_ParquetTable]:
        from pyarrow.parquet import ParquetFile

        with contextlib.ExitStack() as stack:
            # Without pre_buffer and with a buffer, a row group is not held as a whole.
            file = stack.enter_context(
                ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True)
            )
            out = None if unpacked is None else stack.enter_context(open(unpacked, "wb"))
            yield _ParquetTable(file, out, mean=path.stat().st_size // max(1, file.metadata.num_rows))


class _ParquetTable:
    def __init__(self, file: ParquetFile, out: BinaryIO | None, *, mean: int) -> None:
        """mean: bytes of a row."""
        self._file, self._out, self._mean = file, out, mean
        self.schema: pyarrow.Schema = file.schema_arrow

    def batches(self, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, self._mean)))
        found = 0
        for group in range(self._file.num_row_groups):  # a batch of several would be lost with a damaged one
            for batch in self._file.iter_batches(rows, [group], list(columns), use_threads=False):
                yield batch
                found += len(batch)
        if found != self._file.metadata.num_rows:
            raise MalformedShard(f"{found} rows, where its footer says {self._file.metadata.num_rows}")

    def place(self, data: pyarrow.Buffer | None, start: int, stop: int) -> int:
        assert self._out is not None
        offset = self._out.tell()
        if data is not None:
            self._out.write(memoryview(data)[start:stop])
        return offset
