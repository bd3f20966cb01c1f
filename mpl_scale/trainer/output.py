"""Whether a run can write its output folder, and resume as --resume says: judged before any data are read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mpl_scale.checkpoint import CheckpointError
from mpl_scale.checkpoint.format import INDEX_NAME
from mpl_scale.config.names import suggest
from mpl_scale.config.schema import DataConfig
from mpl_scale.data.index.reader import read_meta
from mpl_scale.files import expanded, refuse_inside, refuse_output
from mpl_scale.monitor import DONE_NAME, SUMMARY_NAME
from mpl_scale.trainer.lock import LOCK_NAME
from mpl_scale.trainer.views import VIEWS
from mpl_scale.trainer.watchdog import STACKS_NAME

CHECKPOINTS, SPLITS, METRICS, CONFIG = "checkpoints", "splits", "metrics.jsonl", "config.json"
FOLDERS, FILES = (CHECKPOINTS, SPLITS, VIEWS, STACKS_NAME), (METRICS, CONFIG, SUMMARY_NAME, DONE_NAME, LOCK_NAME)
"""What a run keeps in its output folder."""


def check_output(output: Path, *, resume: str, data: DataConfig) -> None:
    """The folder can be made and written to, holds what it should, and lies in no data set; `resume` can be obeyed.

    Raises:
        ValueError: names the file or the option, and the fix.
    """
    refuse_output(output, folder=True)
    for root in _roots(data):
        refuse_inside(output, root)
    for name in FOLDERS:
        if (output / name).exists() and not (output / name).is_dir():
            raise ValueError(f"{output / name} is a file, where a run keeps a folder; move it away")
    for name in FILES:
        if (output / name).is_dir():
            raise ValueError(f"{output / name} is a folder, where a run writes a file; move it away")
    check_resume(resume, output / CHECKPOINTS)


def _roots(data: DataConfig) -> list[Path]:
    """The folders of the images; an index that cannot be read is refused when the data are loaded."""
    found = [] if data.root is None else [expanded(data.root)]
    for index in (data.index, data.unlabelled_index):
        with suppress(ValueError):
            found += [] if index is None else [Path(read_meta(expanded(index))["root"])]
    return found


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
