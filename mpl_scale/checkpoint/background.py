"""Save while training continues: the state is copied at a step boundary, a thread of each rank writes its copy.

Collectives from a second thread are unsafe, so the threads agree through the folder: each leaves a note, of what it
wrote or of why it could not; rank 0's thread waits for all notes and publishes, as `save` does. Only `start` and
`finish`, in the main threads, are collective.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from mpl_scale.checkpoint.agree import on_main
from mpl_scale.checkpoint.entries import Entry
from mpl_scale.checkpoint.folders import open_draft
from mpl_scale.checkpoint.format import CheckpointError, WriteFailed, file_name
from mpl_scale.checkpoint.writer import Written, parse_written, publish, write_shard, writing
from mpl_scale.files import replace_text
from mpl_scale.mesh import Mesh

T = TypeVar("T")
POLL_SECONDS = 0.05
"""Between rank 0's looks for the others' notes."""


class BackgroundSave:
    """One save in flight. Daemon threads: a process that ends early leaves a draft, which the next save deletes."""

    def __init__(self, result: list[Path | CheckpointError], thread: threading.Thread, mesh: Mesh) -> None:
        self._result, self._thread, self._mesh = result, thread, mesh

    @classmethod
    def start(
        cls,
        root: Path,
        *,
        step: int,
        entries: Sequence[Entry],
        metadata: dict[str, Any],
        mesh: Mesh,
        keep: int,
        keep_every: int = 0,
        timeout_seconds: float,
    ) -> BackgroundSave:
        """Copy what this rank writes into the host's memory, then write it in a thread. Collective over the world.

        timeout_seconds: rank 0 gives the save up where a note is missing for so long. The rest: see `save`. Raises
        WriteFailed, on all ranks alike, where not even the folder can be made.
        """

        @writing(root)
        def begin() -> Path:
            return open_draft(root, step)

        draft = on_main(mesh, begin)
        written = [replace(entry, tensor=entry.flat.to("cpu", copy=True)) for entry in entries if entry.write]
        result: list[Path | CheckpointError] = []

        def work() -> None:
            mine = _once_more(root, lambda: write_shard(draft, written, mesh.rank))
            if isinstance(mine, CheckpointError):
                (draft / file_name(mesh.rank)).unlink(missing_ok=True)  # room for the note
            if not mesh.is_main:
                _leave_note(draft, mesh.rank, mine)
                return
            notes = [mine, *_others_notes(root, draft, world=mesh.world, timeout_seconds=timeout_seconds)]
            failures = [note for note in notes if isinstance(note, CheckpointError)]
            shards = [note for note in notes if isinstance(note, Written)]
            outcome = (
                failures[0]
                if failures
                else _once_more(
                    root,
                    lambda: publish(draft, shards, step=step, metadata=metadata, keep=keep, keep_every=keep_every),
                )
            )
            if isinstance(outcome, CheckpointError):
                shutil.rmtree(draft, ignore_errors=True)
            result.append(outcome)

        thread = threading.Thread(target=work, name="checkpoint writer", daemon=True)
        thread.start()
        return cls(result, thread, mesh)

    def finish(self) -> Path:
        """Wait for it: the published folder. Collective; raises, on all ranks alike, why there is none."""
        self._thread.join()

        def outcome() -> Path:
            assert self._result, "the thread that writes the checkpoint has died"
            if isinstance(self._result[0], CheckpointError):
                raise self._result[0]
            return self._result[0]

        return on_main(self._mesh, outcome)


def _once_more(root: Path, work: Callable[[], T]) -> T | CheckpointError:
    """The result of work, tried twice where the file system refuses it; its exception as a value."""
    failure = CheckpointError("")
    for _ in range(2):
        try:
            with writing(root):
                return work()
        except WriteFailed as error:
            failure = error
        except CheckpointError as error:
            return error
        except Exception as error:
            return CheckpointError(f"{type(error).__name__}: {error}")
    return failure


def _leave_note(draft: Path, rank: int, found: Written | CheckpointError) -> None:
    """Say to rank 0 what this rank wrote. A full disk may take no note: then an empty file says that there is none."""
    if isinstance(found, Written):
        note: dict[str, Any] = {"written": asdict(found)}
    else:
        note = {"error": str(found), "write_failed": isinstance(found, WriteFailed)}
    try:
        replace_text(_note(draft, rank), json.dumps(note))
    except OSError:
        with suppress(OSError):  # rank 0 then waits in vain, and gives up
            _no_note(draft, rank).touch()


def _others_notes(
    root: Path, draft: Path, *, world: int, timeout_seconds: float
) -> Iterator[Written | CheckpointError]:
    """What the ranks after 0 say, each note removed once read; WriteFailed in place of one that does not come."""
    deadline = time.monotonic() + timeout_seconds
    for rank in range(1, world):
        path = _note(draft, rank)
        while not path.exists() and not _no_note(draft, rank).exists():
            if time.monotonic() > deadline:
                yield WriteFailed(
                    f"cannot write a checkpoint to {root}: rank {rank} has not written its file within "
                    f"mpl_scale.checkpoint.timeout_seconds = {timeout_seconds:g}; look at its node's disk, or raise it "
                    "(the checkpoints before it are untouched)"
                )
                return
            time.sleep(POLL_SECONDS)
        if not path.exists():
            yield WriteFailed(
                f"cannot write a checkpoint to {root}: rank {rank} has no room for its file; free space there "
                "(the checkpoints before it are untouched)"
            )
            return
        note = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        if "written" in note:
            yield parse_written(note["written"])
        else:
            yield (WriteFailed if note["write_failed"] else CheckpointError)(f"rank {rank}: {note['error']}")


def _note(draft: Path, rank: int) -> Path:
    return draft / f"note_{rank:05d}.json"


def _no_note(draft: Path, rank: int) -> Path:
    return draft / f"note_{rank:05d}.failed"
