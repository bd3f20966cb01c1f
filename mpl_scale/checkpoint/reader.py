"""Load: fill this rank's pieces from a checkpoint written by any number of ranks, or refuse with the reason.

Every file is verified once, by one rank, before any tensor is touched; then each rank reads only the bytes it needs.
Ranks agree on every outcome, so a damaged file found by one is found by all, and they fall back together.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mpl_scale.checkpoint.agree import on_main, together
from mpl_scale.checkpoint.entries import Entry
from mpl_scale.checkpoint.folders import find, read_latest
from mpl_scale.checkpoint.format import (
    CheckpointError,
    DamagedCheckpoint,
    Index,
    Kind,
    Piece,
    read_index,
    signature,
    tensor_name,
    verify,
)
from mpl_scale.mesh import Mesh

NAMES_SHOWN = 3


def load(path: str | os.PathLike[str], entries: Sequence[Entry], *, mesh: Mesh, index: Index | None = None) -> Index:
    """Fill each entry's tensor in place. Collective over the world; the ranks' entries together are the whole model.

    index: what `newest_good` returned with the path, whose files are then not verified again.

    Returns the index (step, metadata). Raises, on all ranks alike, DamagedCheckpoint where a file is missing,
    truncated or altered and CheckpointError where keys, shapes or dtypes differ; tensors are then as they were.
    """
    folder = Path(path)
    index = index or _verified(folder, mesh)
    together(
        mesh,
        lambda: {entry.key: entry.kind for entry in entries},
        lambda tables: _check_same_model(folder, index, tables),
    )
    together(mesh, lambda: _fill(folder, index, entries), lambda _: None)
    return index


def newest_good(
    root: str | os.PathLike[str], *, mesh: Mesh, warn: Callable[[str], None], only: str | None = None
) -> tuple[Path, Index] | None:
    """The checkpoint `latest` names or, where it is damaged, the newest good one. Collective over the world.

    Every file of the one returned is verified. Falling back is said in one line by `warn`, on rank 0. `only` names the
    one folder that will do. Returns the folder and its index; None where root holds no checkpoint. Raises
    DamagedCheckpoint if there are some but none is good.
    """
    root = Path(root)
    latest, folders = on_main(mesh, lambda: (read_latest(root), find(root)))
    folders.sort(key=lambda folder: folder.name != latest)  # stable: latest first, then newest first
    problems = []
    if only is not None:
        folders = [root / only]
    elif latest and latest not in [folder.name for folder in folders]:
        problems.append(f"checkpoint {root / latest}, which `latest` names, is missing")
    for folder in folders:
        try:
            index = _verified(folder, mesh)
        except DamagedCheckpoint as error:
            problems.append(str(error))
            continue
        if problems and mesh.is_main:
            warn("; ".join(problems) + f"; resuming from {folder.name} instead")
        return folder, index
    if problems:
        raise DamagedCheckpoint(
            f"no usable checkpoint in {root}: {'; '.join(problems)}; restore one, or start in another output folder"
        )
    return None


def _verified(folder: Path, mesh: Mesh) -> Index:
    """The index, once the ranks have checked all files between them."""
    index = on_main(mesh, lambda: read_index(folder))
    share = {name: index.files[name] for name in sorted(index.files)[mesh.rank :: mesh.world]}
    together(mesh, lambda: verify(folder, share), lambda _: None)
    return index


def read_prefix(path: str | os.PathLike[str], prefix: str) -> dict[str, torch.Tensor]:
    """The whole tensors under `prefix/` by the rest of their key, on the CPU: for export and inspection, one process.

    Raises DamagedCheckpoint as `load` does, CheckpointError where no key has the prefix.
    """
    folder = Path(path)
    index = read_index(folder)
    keys = [key for key in index.table if key.startswith(f"{prefix}/")]
    if not keys:
        prefixes = sorted({key.rsplit("/", 1)[0] for key in index.table})
        raise CheckpointError(f"checkpoint {folder} holds nothing under {prefix!r}; it holds {prefixes}")
    files = {piece.file for key in keys for piece in index.table[key].pieces}
    verify(folder, {name: index.files[name] for name in files})
    tensors = {}
    for key in keys:
        kind = index.table[key].kind
        tensors[key] = torch.empty(kind.shape, dtype=getattr(torch, kind.dtype))
    _fill(folder, index, [Entry(key, tensor, 0, tuple(tensor.shape), False) for key, tensor in tensors.items()])
    return {key.removeprefix(f"{prefix}/"): tensor for key, tensor in tensors.items()}


def _check_same_model(folder: Path, index: Index, tables: Sequence[Mapping[str, Kind]]) -> None:
    """CheckpointError, with names, unless the ranks' entries are together those of the index."""
    model: dict[str, Kind] = {}
    for table in tables:
        model |= table
    stored = {key: entry.kind for key, entry in index.table.items()}
    if signature(model) == signature(stored):
        return
    problems = []
    for word, keys in (("missing", model.keys() - stored.keys()), ("unexpected", stored.keys() - model.keys())):
        if keys:
            more = f" and {len(keys) - NAMES_SHOWN} more" if len(keys) > NAMES_SHOWN else ""
            problems.append(f"{word} {sorted(keys)[:NAMES_SHOWN]}{more}")
    different = sorted(key for key in model.keys() & stored.keys() if model[key] != stored[key])
    for key in different[:NAMES_SHOWN]:
        there, here = stored[key], model[key]
        if there.shape != here.shape:
            problems.append(f"shape of {key} is {list(there.shape)}, the model has {list(here.shape)}")
        else:
            problems.append(f"dtype of {key} is {there.dtype}, the model has {here.dtype}")
    if len(different) > NAMES_SHOWN:
        problems.append(f"and {len(different) - NAMES_SHOWN} more that differ")
    raise CheckpointError(
        f"checkpoint {folder} is of another model: {', '.join(problems)}; "
        "use the config it was written with, or start in another output folder"
    )


def _fill(folder: Path, index: Index, entries: Sequence[Entry]) -> None:
    """Copy what overlaps, one file at a time: of each piece only the bytes an entry needs are read."""
    reads: dict[str, list[tuple[Entry, Piece]]] = defaultdict(list)
    for entry in entries:
        for piece in index.table[entry.key].pieces:
            if piece.start < entry.end and entry.start < piece.start + piece.length:
                reads[piece.file].append((entry, piece))
    for name, overlaps in sorted(reads.items()):
        try:
            with safe_open(folder / name, framework="pt") as file:
                for entry, piece in overlaps:
                    begin, end = max(entry.start, piece.start), min(entry.end, piece.start + piece.length)
                    stored = file.get_slice(tensor_name(entry.key, piece.start))
                    values = stored[begin - piece.start : end - piece.start]
                    entry.flat[begin - entry.start : end - entry.start].copy_(values)
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {name}: {error}") from error
