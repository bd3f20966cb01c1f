"""Save while training continues: the state is copied at a step boundary, a thread of each rank writes its copy.

Collectives from a second thread are unsafe, so the threads agree through the folder: each leaves a note, of what it
wrote or of why it could not; rank 0's thread waits for all notes and publishes, as `save` does. Only the constructor
and `finish`, in the main threads, are collective.
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
from mpl_scale.config.schema import CheckpointConfig
from mpl_scale.files import replace_text
from mpl_scale.mesh import Mesh

T = TypeVar("T")
POLL_SECONDS = 0.05
"""Between rank 0's looks for the others' notes."""


class BackgroundSave:
    """One save in flight. Daemon threads: a process that ends early leaves a draft, which the next save deletes."""

    def __init__(
        self,
        root: Path,
        settings: CheckpointConfig,
        *,
        step: int,
        entries: Sequence[Entry],
        metadata: dict[str, Any],
        mesh: Mesh,
    ) -> None:
        """Copy what this rank writes into the host's memory, then write it in a thread. Collective over the world.

        settings: what is kept, and how long rank 0 waits for the others' notes. The rest: see `save`. Raises
        WriteFailed, on all ranks alike, where not even the folder can be made.
        """
        self._root, self._settings, self._step, self._metadata, self._mesh = root, settings, step, metadata, mesh
        self._draft = on_main(mesh, self._open)
        self._copy = [replace(entry, tensor=entry.flat.to("cpu", copy=True)) for entry in entries if entry.write]
        self._outcome: Path | CheckpointError | None = None  # on rank 0, once the thread has ended
        self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self._thread.start()

    def finish(self) -> Path:
        """Wait for it: the published folder. Collective; raises, on all ranks alike, why there is none."""
        self._thread.join()
        return on_main(self._mesh, self._published)

    def _open(self) -> Path:
        with writing(self._root):
            return open_draft(self._root, self._step)

    def _write(self) -> None:
        """In the thread: this rank's file; on rank 0 the others' notes, and the checkpoint published."""
        draft, rank = self._draft, self._mesh.rank
        mine = _once_more(self._root, lambda: write_shard(draft, self._copy, rank))
        self._copy.clear()  # not in memory until the next save
        if isinstance(mine, CheckpointError):
            (draft / file_name(rank)).unlink(missing_ok=True)  # room for the note
        if not self._mesh.is_main:
            _leave_note(draft, rank, mine)
            return
        seconds = self._settings.timeout_seconds
        notes = [mine, *_others_notes(self._root, draft, world=self._mesh.world, timeout_seconds=seconds)]
        failures = [note for note in notes if isinstance(note, CheckpointError)]
        shards = [note for note in notes if isinstance(note, Written)]
        self._outcome = failures[0] if failures else _once_more(self._root, lambda: self._publish(shards))
        if isinstance(self._outcome, CheckpointError):
            shutil.rmtree(draft, ignore_errors=True)

    def _publish(self, shards: list[Written]) -> Path:
        keep, keep_every = self._settings.keep, self._settings.keep_every
        return publish(self._draft, shards, step=self._step, metadata=self._metadata, keep=keep, keep_every=keep_every)

    def _published(self) -> Path:
        assert self._outcome is not None, "the thread that writes the checkpoint has died"
        if isinstance(self._outcome, CheckpointError):
            raise self._outcome
        return self._outcome


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
