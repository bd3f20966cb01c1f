"""Whether a run can write its output folder, and resume as --resume says: judged before any data are read."""

from __future__ import annotations

from pathlib import Path

from mpl_scale.checkpoint import CheckpointError
from mpl_scale.checkpoint.format import INDEX_NAME
from mpl_scale.config.names import suggest
from mpl_scale.files import refuse_output
from mpl_scale.monitor import DONE_NAME, SUMMARY_NAME
from mpl_scale.trainer.lock import LOCK_NAME
from mpl_scale.trainer.watchdog import STACKS_NAME

CHECKPOINTS, SPLITS, METRICS, CONFIG = "checkpoints", "splits", "metrics.jsonl", "config.json"
FOLDERS, FILES = (CHECKPOINTS, SPLITS, STACKS_NAME), (METRICS, CONFIG, SUMMARY_NAME, DONE_NAME, LOCK_NAME)
"""What a run keeps in its output folder."""


def check_output(output: Path, *, resume: str) -> None:
    """The folder can be made and written to, what it holds is of the right kind, and `resume` can be obeyed.

    Raises:
        ValueError: names the file or the option, and the fix.
    """
    refuse_output(output, folder=True)
    for name in FOLDERS:
        if (output / name).exists() and not (output / name).is_dir():
            raise ValueError(f"{output / name} is a file, where a run keeps a folder; move it away")
    for name in FILES:
        if (output / name).is_dir():
            raise ValueError(f"{output / name} is a folder, where a run writes a file; move it away")
    check_resume(resume, output / CHECKPOINTS)


def check_resume(resume: str, checkpoints: Path) -> None:
    """`auto`, `never` where there are no checkpoints, or the folder of one. Raises CheckpointError."""
    if resume == "never" and checkpoints.is_dir() and any(checkpoints.glob("step_*")):
        raise CheckpointError(
            f"--resume never: {checkpoints} holds an earlier run's checkpoints; use --resume auto, another --output, "
            "or delete them"
        )
    if resume in ("auto", "never") or (Path(resume) / INDEX_NAME).is_file():
        return
    near = "" if Path(resume).exists() else f"; {suggest(resume, ('auto', 'never'))}"
    raise CheckpointError(
        f"--resume {resume}: no checkpoint there; give auto, never, or a folder step_... that has an {INDEX_NAME}{near}"
    )
