"""The format of a checkpoint: a folder of safetensors files and one index that says what lies where.

    step_00000120/
        rank_00000.safetensors    1-D tensors named "{key}@{start}": elements [start, start + length) of flattened `key`
        rank_00001.safetensors
        index.json                step, world, signature, metadata, sizes and checksums of the files, table of entries

The index refers to global parameters, never to ranks: any number of ranks can read what any other number wrote. There
is no pickle in it. Checksums are CRC-32 (2 GiB/s on one core, twice as fast as SHA-256): they find damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
CHUNK_BYTES = 16 << 20
_FILE_NAME = re.compile(r"rank_\d{5,}\.safetensors")
_DTYPE_NAME = re.compile(r"float\d+|bfloat16|u?int\d+|bool")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or cannot be read into this model."""


class WriteFailed(CheckpointError):
    """A checkpoint that the file system did not take; those before it are as they were."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are missing, truncated or altered: another one may still be good."""


@dataclass(frozen=True)
class Kind:
    """Full shape and dtype ("float32") of an entry."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of an entry lie in `file`."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """What the table says of one entry; the pieces cover it once, in order of `start`."""

    kind: Kind
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 of a file."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """The content of index.json; see the top of this file."""

    step: int
    world: int
    metadata: dict[str, Any]
    files: dict[str, FileRecord]
    table: dict[str, Stored]


def file_name(rank: int) -> str:
    """Name of the file with a rank's tensors."""
    return f"rank_{rank:05d}.safetensors"


def tensor_name(key: str, start: int) -> str:
    """The name, inside a file, of the piece of `key` that begins at element `start`."""
    return f"{key}@{start}"


def signature(kinds: Mapping[str, Kind]) -> str:
    """12 hex digits that name a model: equal if and only if keys, shapes and dtypes are (SHA-256)."""
    rows = sorted((key, list(kind.shape), kind.dtype) for key, kind in kinds.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def dump_index(index: Index) -> str:
    """index.json's text. CheckpointError where the metadata are not plain JSON (NaN is not)."""
    entries = {
        key: {**asdict(stored.kind), "pieces": [asdict(piece) for piece in stored.pieces]}
        for key, stored in index.table.items()
    }
    content = {
        "format_version": FORMAT_VERSION,
        "step": index.step,
        "world": index.world,
        "signature": signature({key: stored.kind for key, stored in index.table.items()}),
        "metadata": index.metadata,
        "files": {name: asdict(record) for name, record in index.files.items()},
        "entries": entries,
    }
    try:
        plain = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"metadata of the checkpoint of step {index.step} are not JSON ({error}): "
            "give str, int, finite float, bool, None, lists and dicts of them"
        ) from error
    return json.dumps({**plain, "checksum": _checksum(plain)}, indent=1) + "\n"


def read_index(folder: Path) -> Index:
    """The index of a checkpoint folder.

    Raises DamagedCheckpoint if it is missing, unreadable or altered, CheckpointError if it is of another version.
    """
    try:
        content = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
        version = content["format_version"]
    except FileNotFoundError:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {INDEX_NAME} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {INDEX_NAME} is unreadable ({error})") from error
    if checksum != _checksum(content):
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {INDEX_NAME} does not match its own checksum")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {folder} has format_version {version}, this program reads {FORMAT_VERSION}: "
            "use the version of mpl_scale that wrote it"
        )
    try:
        return _confined(_parse(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {INDEX_NAME} is not one: {error!r}") from error


def _parse(content: Mapping[str, Any]) -> Index:
    return Index(
        step=content["step"],
        world=content["world"],
        metadata=content["metadata"],
        files={name: FileRecord(**record) for name, record in content["files"].items()},
        table=parse_table(content["entries"]),
    )


def parse_table(entries: Mapping[str, Any]) -> dict[str, Stored]:
    """The table as JSON has it: shape, dtype and pieces by key."""
    return {
        key: Stored(Kind(tuple(stored["shape"]), stored["dtype"]), tuple(Piece(**piece) for piece in stored["pieces"]))
        for key, stored in entries.items()
    }


def _confined(index: Index) -> Index:
    """The index, if it names nothing but files of ranks in its own folder, and tensors that they hold in full.

    A checksum finds damage, not forgery: a name such as "../other" must not lead a reader out of the folder.
    """
    for name in index.files:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a rank's file")
    for key, stored in index.table.items():
        if not _DTYPE_NAME.fullmatch(stored.kind.dtype):
            raise ValueError(f"entry {key} has dtype {stored.kind.dtype!r}")
        if not covers(stored):
            raise ValueError(f"entry {key} is not covered exactly once by its pieces")
        for piece in stored.pieces:
            if piece.file not in index.files:
                raise ValueError(f"entry {key} lies in {piece.file!r}, which is not among the files")
    return index


def covers(stored: Stored) -> bool:
    """Whether the pieces, in the order they stand in, hold every element exactly once."""
    end = 0
    for piece in stored.pieces:
        if piece.start != end or piece.length < 1:
            return False
        end += piece.length
    return end == prod(stored.kind.shape) and all(size >= 0 for size in stored.kind.shape)


def measure(path: Path) -> FileRecord:
    """Size and CRC-32 of a file, read in chunks."""
    size = crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size += len(chunk)
            crc32 = zlib.crc32(chunk, crc32)
    return FileRecord(size, crc32)


def verify(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """DamagedCheckpoint unless these files are those the index describes, byte for byte."""
    for problem in problems(folder, files):
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {problem}")


def problems(folder: Path, files: Mapping[str, FileRecord], *, checksums: bool = True) -> Iterator[str]:
    """One line per file that is not the one the index describes; without `checksums` only sizes are compared."""
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                yield f"{name} has {size} bytes, its index says {expected.size}"
            elif checksums and (found := measure(path)) != expected:
                yield f"{name} has CRC-32 {found.crc32:08x}, its index says {expected.crc32:08x}"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"


def _checksum(content: Any) -> str:
    """CRC-32 of the canonical JSON of a plain value, 8 hex digits."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
