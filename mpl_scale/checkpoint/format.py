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
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
CHUNK_BYTES = 16 << 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or cannot be read into this model."""


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
    """The content of index.json."""

    step: int
    world: int
    metadata: dict[str, Any]
    files: dict[str, FileRecord]
    table: dict[str, Stored]


def file_name(rank: int) -> str:
    """The file a rank writes."""
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
    return Index(
        step=content["step"],
        world=content["world"],
        metadata=content["metadata"],
        files={name: FileRecord(**record) for name, record in content["files"].items()},
        table={
            key: Stored(
                Kind(tuple(stored["shape"]), stored["dtype"]), tuple(Piece(**piece) for piece in stored["pieces"])
            )
            for key, stored in content["entries"].items()
        },
    )


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
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                problem = f"has {size} bytes, its index says {expected.size}"
            elif (found := measure(path)) != expected:
                problem = f"has CRC-32 {found.crc32:08x}, its index says {expected.crc32:08x}"
            else:
                continue
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {name} {problem}")


def _checksum(content: Any) -> str:
    """CRC-32 of the canonical JSON of a plain value, 8 hex digits."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
