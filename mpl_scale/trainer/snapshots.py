"""What of a run goes into a checkpoint, and how a state is filled from one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpl_scale.checkpoint import (
    BackgroundSave,
    CheckpointError,
    Entry,
    Index,
    WriteFailed,
    find,
    load,
    network_entries,
    newest_good,
    replicated_entries,
    save,
    shard_entries,
)
from mpl_scale.checkpoint.agree import on_main, together
from mpl_scale.checkpoint.folders import LATEST_NAME, withdraw
from mpl_scale.checkpoint.format import read_index
from mpl_scale.checkpoint.writer import writing
from mpl_scale.config.schema import CheckpointConfig
from mpl_scale.files import write_text
from mpl_scale.mesh import Mesh
from mpl_scale.mpl import State
from mpl_scale.trainer.output import check_resume
from mpl_scale.trainer.phases import Phase


@dataclass(frozen=True)
class Snapshot:
    """A verified checkpoint to resume from."""

    folder: Path
    index: Index

    @property
    def phase(self) -> str:
        """The phase it was taken in."""
        return str(self.index.metadata["phase"])

    @property
    def step(self) -> int:
        """Steps of the phase that were done."""
        return int(self.index.metadata["phase_step"])

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Results and seconds so far, and the configuration."""
        return self.index.metadata


class Snapshots:
    """The checkpoints of one run. All methods are collective over the world.

    A save that the disk does not take is tried twice, then said by `warn` (on rank 0), and training continues: the
    checkpoints before it are as they were. A save that training must not continue without raises instead.
    """

    def __init__(self, root: Path, settings: CheckpointConfig, mesh: Mesh, *, warn: Callable[[str], None]) -> None:
        self.root, self._settings, self._mesh, self._warn = root, settings, mesh, warn
        self._in_flight: BackgroundSave | None = None

    def check_room(self, state: State) -> None:
        """At the start: every rank can write to `root`, and one checkpoint of the state fits there.

        Raises CheckpointError. Where one fits but not as many as will be kept, `warn` says so.
        """
        keep, mesh = self._settings.keep, self._mesh

        def probe() -> int:
            with writing(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                path = self.root / f"{LATEST_NAME}.tmp-probe-{mesh.rank}"  # a save deletes what a kill leaves of it
                write_text(path, "x" * 4096)
                path.unlink()
            return sum(entry.flat.nbytes for entry in state_entries(state, mesh=mesh) if entry.write)

        def judge(sizes: list[int]) -> str | None:
            size, free = sum(sizes), shutil.disk_usage(self.root).free
            room = f"a checkpoint is {size:,} bytes, {self.root} has {free:,} free"
            if free < size:
                raise CheckpointError(f"{room}: free space there, or choose another output folder")
            wanted = max(1, keep + 1 - len(find(self.root)))
            if free < wanted * size:
                return (
                    f"{room}, not room for the {wanted} more that mpl_scale.checkpoint.keep = {keep} takes; keep less"
                )
            return None

        if (warning := together(mesh, probe, judge)) and mesh.is_main:
            self._warn(warning)

    def save(
        self,
        phase: Phase,
        state: State,
        *,
        step: int,
        global_step: int,
        metadata: Mapping[str, Any],
        wait: bool = True,
        needed: bool = True,
    ) -> None:
        """Write the state after `step` steps of a phase.

        wait: return once it is written; else, if so configured, while it is being written. What becomes of it is said
        at the next save. needed: raise WriteFailed, instead of warning, where it cannot be written.
        """
        self.wait()
        metadata = {**metadata, "phase": phase.name, "phase_step": step}
        entries, settings = state_entries(state, mesh=self._mesh), self._settings
        try:
            if settings.asynchronous and not wait:
                self._in_flight = BackgroundSave(
                    self.root, settings, step=global_step, entries=entries, metadata=metadata, mesh=self._mesh
                )
            else:
                self._write(global_step, entries, metadata)
        except WriteFailed as error:
            if needed:
                raise
            self._say(error)

    def wait(self) -> None:
        """Wait until no background save is in flight."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            return
        try:
            in_flight.finish()
        except WriteFailed as error:
            self._say(error)

    def set_aside(self, phase: Phase, state: State, *, step: int, global_step: int) -> Path:
        """Write the state to bad-<step> beside `root`, where no resume looks. Raises CheckpointError; the folder."""
        self.wait()
        root = self.root.parent / f"bad-{global_step}"
        metadata = {"results": {}, "seconds": 0.0, "phase": phase.name, "phase_step": step}
        entries = state_entries(state, mesh=self._mesh)
        return save(root, step=global_step, entries=entries, metadata=metadata, mesh=self._mesh, keep=1).parent

    def _write(self, global_step: int, entries: Sequence[Entry], metadata: dict[str, Any]) -> None:
        def attempt() -> None:
            keep, keep_every = self._settings.keep, self._settings.keep_every
            save(
                self.root,
                step=global_step,
                entries=entries,
                metadata=metadata,
                mesh=self._mesh,
                keep=keep,
                keep_every=keep_every,
            )

        try:
            attempt()
        except WriteFailed:  # the same on every rank; what was written of it is deleted
            attempt()

    def _say(self, error: CheckpointError) -> None:
        if self._mesh.is_main:
            self._warn(f"{error}; training continues, the next checkpoint is tried as usual")

    def find(self, resume: str) -> Snapshot | None:
        """The checkpoint that --resume means: auto, never, or a folder.

        Raises CheckpointError for `never` over an earlier run's checkpoints, for a folder that is none, and where
        checkpoints exist but all are damaged.
        """
        if resume == "auto":
            found = newest_good(self.root, mesh=self._mesh, warn=self._warn)
            return None if found is None else Snapshot(*found)
        check_resume(resume, self.root)
        if resume == "never":
            return None
        folder = Path(resume)
        found = newest_good(folder.parent, mesh=self._mesh, warn=self._warn, only=folder.name)
        assert found is not None
        return Snapshot(*found)

    def go_back(self, phase: Phase, *, step: int) -> Snapshot | None:
        """The newest good checkpoint after at most `step` steps of a phase; those after it are deleted. None: no such.

        A resume would take the deleted ones, and with them what the run goes back from.
        """
        self.wait()
        found = self.last_of(phase.name, step=step)
        if found is not None:
            self.withdraw_later(found)
        return found

    def withdraw_later(self, snapshot: Snapshot) -> None:
        """Delete the checkpoints after this one, which becomes the newest."""
        on_main(self._mesh, partial(withdraw, self.root, snapshot.folder))

    def last_of(self, phase: str, *, step: float = math.inf) -> Snapshot | None:
        """The newest good checkpoint after at most `step` steps of a phase; None: no such."""

        def candidates() -> list[str]:
            found = []
            for folder in find(self.root):
                with suppress(CheckpointError):
                    metadata = read_index(folder).metadata
                    if metadata["phase"] == phase and metadata["phase_step"] <= step:
                        found.append(folder.name)
            return found

        for name in on_main(self._mesh, candidates):
            try:
                good = newest_good(self.root, mesh=self._mesh, warn=self._warn, only=name)
            except CheckpointError as error:  # the same on every rank
                self._say(error)
                continue
            assert good is not None
            return Snapshot(*good)
        return None

    def restore(self, snapshot: Snapshot, state: State) -> None:
        """Fill the state. CheckpointError, with names, where it is of another model."""
        load(snapshot.folder, state_entries(state, mesh=self._mesh), mesh=self._mesh, index=snapshot.index)
        for network in (state.teacher, state.student):
            if network is not None:
                network.refresh_weights()


def state_entries(state: State, *, mesh: Mesh) -> list[Entry]:
    """Everything of a state that a step reads and changes. Live: saving reads it, loading fills it."""
    entries = replicated_entries(
        "state",
        {"step": state.step, "baseline": state.baseline.average, "baseline_steps": state.baseline.steps},
        mesh=mesh,
    )
    entries += replicated_entries("loss", state.loss_buffers, mesh=mesh)
    for name, network in (("teacher", state.teacher), ("student", state.student)):
        if network is not None:
            entries += network_entries(name, network, mesh=mesh)
    average, student = state.student_average, state.student
    if average is not None and student is not None:
        entries += shard_entries("ema/master", student.layout, tensors=average.shards, write=student.owns_shard)
        entries += replicated_entries("ema/buffer", average.buffers, mesh=mesh)
    return entries
