"""A checkpoint on the command line: its own folder, a run's, or the folder of a run's checkpoints."""

from __future__ import annotations

from pathlib import Path


def choose_checkpoint(path: Path) -> Path:
    """The checkpoint's folder; of a run the one that `latest` names, or else the newest.

    Raises ValueError where there is none.
    """
    from mpl_scale.checkpoint.folders import find, read_latest
    from mpl_scale.checkpoint.format import INDEX_NAME

    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a checkpoint's folder step_... or a run's output folder")
    if (path / INDEX_NAME).exists():
        return path
    for root in (path / "checkpoints", path):
        latest, folders = read_latest(root), find(root)
        if latest is not None and (root / latest).is_dir():
            return root / latest
        if folders:
            return folders[0]
    if path.name.startswith("step_"):
        return path  # its index is missing: reading it says so
    raise ValueError(f"{path}: no checkpoint there; give a checkpoint's folder step_... or a run's output folder")
