"""Save: every rank writes its pieces, rank 0 writes the index and publishes the folder by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mpl_scale.checkpoint.agree import on_main, together
from mpl_scale.checkpoint.entries import Entry
from mpl_scale.checkpoint.folders import open_draft, prune, publish_draft
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
    parse_table,
    tensor_name,
)
from mpl_scale.files import sync, write_text
from mpl_scale.mesh import Mesh


@dataclass(frozen=True)
class Written:
    """What one rank put in its file; no file where it has nothing to write."""

    files: dict[str, FileRecord]
    table: dict[str, Stored]


def parse_written(plain: Mapping[str, Any]) -> Written:
    """What `asdict` made of it, back from JSON."""
    return Written(
        files={name: FileRecord(**record) for name, record in plain["files"].items()},
        table=parse_table(
            {key: {**stored["kind"], "pieces": stored["pieces"]} for key, stored in plain["table"].items()}
        ),
    )


def save(
    root: str | os.PathLike[str],
    *,
    step: int,
    entries: Sequence[Entry],
    metadata: dict[str, Any],
    mesh: Mesh,
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write the checkpoint of a step, make it the latest, delete old ones. Collective over the world.

    Args:
        root: folder of the run's checkpoints, on a file system all ranks share.
        step: counted over all phases; names the folder.
        entries: this rank's pieces; those with `write` cover each key exactly once over the ranks.
        metadata: plain JSON that `load` hands back (counters, the phase, a hash of the config, ...).
        keep: newest checkpoints that stay.
        keep_every: those of steps that it divides stay too; 0: none.

    Returns the checkpoint's folder. Raises, on all ranks alike, WriteFailed where the file system does not take it,
    another CheckpointError where it must not be written; the checkpoints before it and `latest` are then as they were.
    """
    root = Path(root)

    @writing(root)
    def begin() -> Path:
        return open_draft(root, step)

    @writing(root)
    def write() -> Written:
        return write_shard(draft, entries, mesh.rank)

    @writing(root)
    def finish(written: list[Written]) -> Path:
        return publish(draft, written, step=step, metadata=metadata, keep=keep, keep_every=keep_every)

    draft = on_main(mesh, begin)
    try:
        return together(mesh, write, finish)
    except CheckpointError:
        if mesh.is_main:  # every rank has ended its work here
            shutil.rmtree(draft, ignore_errors=True)
        raise


def publish(
    draft: Path, written: Sequence[Written], *, step: int, metadata: dict[str, Any], keep: int, keep_every: int
) -> Path:
    """On rank 0, once every rank has written: write the index, rename, set `latest`, delete old checkpoints."""
    index = _merge(written, step=step, metadata=metadata)
    _check_visible(draft, index)
    write_text(draft / INDEX_NAME, dump_index(index))
    folder = publish_draft(draft, step)
    prune(folder.parent, keep, keep_every=keep_every)
    return folder


def write_shard(draft: Path, entries: Sequence[Entry], rank: int) -> Written:
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


def _merge(written: Sequence[Written], *, step: int, metadata: dict[str, Any]) -> Index:
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
def writing(root: Path) -> Iterator[None]:
    """Errors of the file system as one that names the folder and the fix."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteFailed(
            f"cannot write a checkpoint to {root}: {error}; free space there or choose another output folder "
            "(the checkpoints before it are untouched)"
        ) from error
