"""What of a run goes into a checkpoint, and how a state is filled from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpl_scale.checkpoint import (
    CheckpointError,
    Entry,
    Index,
    load,
    network_entries,
    newest_good,
    replicated_entries,
    save,
    shard_entries,
)
from mpl_scale.mesh import Mesh
from mpl_scale.mpl import State
from mpl_scale.trainer.phases import Phase


@dataclass(frozen=True)
class Snapshot:
    """A verified checkpoint to go on from."""

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


@dataclass(frozen=True)
class Snapshots:
    """The checkpoints of one run, under `root`; `warn` is called on rank 0."""

    root: Path
    keep: int
    mesh: Mesh
    warn: Callable[[str], None]

    def save(self, phase: Phase, state: State, *, step: int, global_step: int, metadata: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps of a phase. Collective."""
        return save(
            self.root,
            step=global_step,
            entries=_entries(state, self.mesh),
            metadata={**metadata, "phase": phase.name, "phase_step": step},
            mesh=self.mesh,
            keep=self.keep,
        )

    def find(self, resume: str) -> Snapshot | None:
        """The checkpoint that --resume means: auto, never, or a folder. Collective.

        Raises CheckpointError for `never` over an earlier run's checkpoints, for a folder that is none, and where
        checkpoints exist but all are damaged.
        """
        if resume == "auto":
            found = newest_good(self.root, mesh=self.mesh, warn=self.warn)
            return None if found is None else Snapshot(*found)
        if resume == "never":
            if self.root.is_dir() and any(self.root.glob("step_*")):
                raise CheckpointError(
                    f"--resume never: {self.root} holds an earlier run's checkpoints; use --resume auto, another "
                    "--output, or delete them"
                )
            return None
        folder = Path(resume)
        if not (folder / "index.json").is_file():
            raise CheckpointError(
                f"--resume {resume}: no checkpoint there; give a folder step_... that has an index.json"
            )
        found = newest_good(folder.parent, mesh=self.mesh, warn=self.warn, only=folder.name)
        assert found is not None
        return Snapshot(*found)

    def restore(self, snapshot: Snapshot, state: State) -> None:
        """Fill the state. Collective; CheckpointError, with names, where it is of another model."""
        load(snapshot.folder, _entries(state, self.mesh), mesh=self.mesh, index=snapshot.index)
        for network in (state.teacher, state.student):
            if network is not None:
                network.refresh_weights()


def _entries(state: State, mesh: Mesh) -> list[Entry]:
    entries = replicated_entries(
        "state",
        {"step": state.step, "baseline": state.baseline.average, "baseline_steps": state.baseline.steps},
        mesh=mesh,
    )
    for name, network in (("teacher", state.teacher), ("student", state.student)):
        if network is not None:
            entries += network_entries(name, network, mesh=mesh)
    average, student = state.student_average, state.student
    if average is not None and student is not None:
        entries += shard_entries("ema/master", student.layout, tensors=average.shards, write=student.owns_shard)
        entries += replicated_entries("ema/buffer", average.buffers, mesh=mesh)
    return entries
