"""Names under a checkpoint root: how a save is made all-or-nothing.

A folder gets its final name by one rename after everything in it is on disk, so a final name means complete. Steps of
a save that a kill may interrupt leave a name with `.tmp-` in it, which the next save deletes.

    root/latest                      the name of the newest checkpoint, replaced atomically
    root/step_00000120/              complete
    root/step_00000120.2/            the same step saved again (after a resume from an earlier one): supersedes it
    root/step_00000130.tmp-1f2e3d4c/ being written, or left by a killed run
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mpl_scale.files import draft_of, replace_text, sync

LATEST_NAME = "latest"
_FINAL_NAME = re.compile(r"step_(\d{8,})(?:\.(\d+))?")


def find(root: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints under root, newest first; [] where root does not exist."""
    root = Path(root)
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if _FINAL_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=_step_and_version, reverse=True)


def read_latest(root: Path) -> str | None:
    """The name `latest` holds; None where there is no such file or it holds no checkpoint's name."""
    try:
        name = (root / LATEST_NAME).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if _FINAL_NAME.fullmatch(name) else None


def open_draft(root: Path, step: int) -> Path:
    """Make the folder a checkpoint is written in, after deleting what killed runs left."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob("step_*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in root.glob(f"{LATEST_NAME}.tmp-*"):
        stale.unlink(missing_ok=True)
    draft = draft_of(root / f"step_{step:08d}")
    draft.mkdir()
    return draft


def publish_draft(draft: Path, step: int) -> Path:
    """Give a fully written draft its final name and point `latest` at it."""
    root = draft.parent
    sync(draft)
    folder, version = root / f"step_{step:08d}", 1
    while folder.exists():
        version += 1
        folder = root / f"step_{step:08d}.{version}"
    os.rename(draft, folder)
    sync(root)
    replace_text(root / LATEST_NAME, folder.name + "\n", shared=True)
    return folder


def prune(root: Path, keep: int, *, keep_every: int = 0) -> None:
    """Delete all but the `keep` newest steps, those that keep_every (0: none) divides, and the one `latest` names.

    Of a kept step the last version stays.
    """
    kept = {read_latest(root)}
    steps: set[int] = set()
    for folder in find(root):
        step, _ = _step_and_version(folder)
        if step not in steps and (len(steps) < keep or (keep_every and step % keep_every == 0)):
            kept.add(folder.name)
        steps.add(step)
        if folder.name not in kept:
            _delete(folder)


def withdraw(root: Path, newest: Path) -> None:
    """Make a checkpoint the newest one: `latest` names it, and those after it are deleted."""
    replace_text(root / LATEST_NAME, newest.name + "\n", shared=True)
    for folder in find(root):
        if _step_and_version(folder) > _step_and_version(newest):
            _delete(folder)


def _delete(folder: Path) -> None:
    doomed = draft_of(folder)
    os.rename(folder, doomed)  # a kill while deleting must not leave half a checkpoint under a final name
    shutil.rmtree(doomed, ignore_errors=True)


def _step_and_version(folder: Path) -> tuple[int, int]:
    match = _FINAL_NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)
