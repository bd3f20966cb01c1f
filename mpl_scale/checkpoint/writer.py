"""Save: every rank writes its pieces, rank 0 writes the index and publishes the folder by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mpl_scale.checkpoint.agree import on_main, together
from mpl_scale.checkpoint.entries import Entry
from mpl_scale.checkpoint.folders import open_draft, prune, publish_draft, sync, write_text
from mpl_scale.checkpoint.format import (
    INDEX_NAME,
    CheckpointError,
    FileRecord,
    Index,
    Piece,
    Stored,
    WriteFailed,
    covers,
    dump_index,
    file_name,
    measure,
    tensor_name,
)
from mpl_scale.mesh import Mesh


@dataclass(frozen=True)
class Written:
    """What one rank put in its file; no file where it has nothing to write."""

    files: dict[str, FileRecord]
    table: dict[str, Stored]


def save(
    root: str | os.PathLike[str],
    *,
    step: int,
    entries: Sequence[Entry],
    metadata: dict[str, Any],
    mesh: Mesh,
    keep: int,
) -> Path:
    """Write the checkpoint of a step, make it the latest, delete all but the `keep` newest. Collective over the world.

    Args:
        root: folder of the run's checkpoints, on a file system all ranks share.
        step: counted over all phases; names the folder.
        entries: this rank's pieces; those with `write` cover each key exactly once over the ranks.
        metadata: plain JSON that `load` hands back (counters, the phase, a hash of the config, ...).

    Returns the checkpoint's folder. Raises CheckpointError, on all ranks alike, where it cannot be written; the
    checkpoints before it and `latest` are then as they were.
    """
    root = Path(root)

    @_writing(root)
    def begin() -> Path:
        return open_draft(root, step)

    @_writing(root)
    def write() -> Written:
        return _write_shard(draft, entries, mesh.rank)

    @_writing(root)
    def publish(written: list[Written]) -> Path:
        index = _merge(written, step=step, metadata=metadata)
        _check_visible(draft, index)
        write_text(draft / INDEX_NAME, dump_index(index))
        folder = publish_draft(draft, step)
        prune(root, keep)
        return folder

    draft = on_main(mesh, begin)
    try:
        return together(mesh, write, publish)
    except CheckpointError:
        if mesh.is_main:  # every rank has ended its work here
            shutil.rmtree(draft, ignore_errors=True)
        raise


def _write_shard(draft: Path, entries: Sequence[Entry], rank: int) -> Written:
    """Write and sync this rank's file."""
    name = file_name(rank)
    tensors: dict[str, torch.Tensor] = {}
    table: dict[str, Stored] = {}
    for entry in entries:
        if not entry.write:
            continue
        pieces: tuple[Piece, ...] = ()
        if entry.end > entry.start:
            tensors[tensor_name(entry.key, entry.start)] = entry.flat
            pieces = (Piece(name, entry.start, entry.end - entry.start),)
        earlier = table.get(entry.key, Stored(entry.kind, ()))
        table[entry.key] = replace(earlier, pieces=earlier.pieces + pieces)
    if not tensors:
        return Written({}, table)
    path = draft / name
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)  # safetensors makes the file private; the user's umask decides instead
    sync(path)
    return Written({name: measure(path)}, table)


def _merge(written: list[Written], *, step: int, metadata: dict[str, Any]) -> Index:
    """One index of all ranks' tables. CheckpointError where the pieces do not cover an entry exactly once."""
    files: dict[str, FileRecord] = {}
    table: dict[str, Stored] = {}
    for shard in written:
        files |= shard.files
        for key, stored in shard.table.items():
            earlier = table.get(key, Stored(stored.kind, ()))
            if earlier.kind != stored.kind:
                raise CheckpointError(
                    f"checkpoint entry {key} is {earlier.kind} on one rank and {stored.kind} on another"
                )
            table[key] = replace(earlier, pieces=earlier.pieces + stored.pieces)
    for key, stored in table.items():
        pieces = tuple(sorted(stored.pieces, key=lambda piece: piece.start))
        table[key] = Stored(stored.kind, pieces)
        if not covers(table[key]):
            raise CheckpointError(
                f"checkpoint entry {key} of shape {list(stored.kind.shape)} is not covered exactly once by the pieces "
                f"{[(piece.start, piece.start + piece.length) for piece in pieces]}: check `write` on each rank"
            )
    return Index(step=step, world=len(written), metadata=metadata, files=files, table=table)


def _check_visible(draft: Path, index: Index) -> None:
    """CheckpointError where rank 0 does not see another rank's file: the folder is local to a node."""
    for name, record in index.files.items():
        path = draft / name
        if not path.is_file() or path.stat().st_size != record.size:
            raise CheckpointError(
                f"{name} was written but rank 0 does not see it in {draft}: "
                "put the checkpoints on a file system that all nodes share"
            )


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Errors of the file system as one that names the folder and the fix."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteFailed(
            f"cannot write a checkpoint to {root}: {error}; free space there or choose another output folder "
            "(the checkpoints before it are untouched)"
        ) from error
