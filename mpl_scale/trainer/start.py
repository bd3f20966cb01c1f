"""Where a run starts: at its first step, after a checkpoint, or nowhere because it is done.

Nothing is written before what the folder holds has been compared with what is asked for (identity.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpl_scale.data.samples.manifest import read_manifest
from mpl_scale.files import read_object
from mpl_scale.monitor import DONE_NAME, SUMMARY_NAME
from mpl_scale.trainer.bad_input import value_on_main
from mpl_scale.trainer.identity import Verdict, describe, judge, refusal
from mpl_scale.trainer.preflight import check_resumed
from mpl_scale.trainer.run import Trainer
from mpl_scale.trainer.snapshots import Snapshot


@dataclass(frozen=True)
class Start:
    """snapshot: to start after; None: at the first step. kept: what checkpoints keep of the run from now on.

    reopens: the checkpoints after the snapshot are no longer of this run. finished: the summary of the run, where
    nothing is left to do.
    """

    snapshot: Snapshot | None
    kept: Mapping[str, Any]
    reopens: bool = False
    finished: dict[str, Any] | None = None


def find_start(trainer: Trainer, output: Path, *, resume: str, max_steps: int | None) -> Start:
    """Compare the run in the folder with the one asked for. Each changed field is a note. Collective over the world.

    Args:
        trainer: not started.
        output: the run's folder.
        resume: auto, never, or a checkpoint's folder.
        max_steps: as given.

    Raises:
        ValueError: the run there cannot continue so; CheckpointError as of Snapshots.find. Nothing is written.
    """
    mesh, snapshots, note = trainer.mesh, trainer.snapshots, trainer.writers.note
    wanted = value_on_main(mesh, partial(describe, trainer, max_steps=max_steps))
    summary = value_on_main(mesh, partial(finished_summary, output))
    snapshot = snapshots.find(resume)
    if snapshot is None:
        if summary is not None and resume == "auto":
            raise refusal(output, ["its checkpoints are gone"])
        return Start(None, {**wanted, "history": []})
    value_on_main(mesh, partial(check_resumed, trainer.source.splits, snapshot.folder))
    verdict = _judged(trainer, snapshot, wanted)
    phase = verdict.reopened
    if phase is not None:
        if resume != "auto":
            raise ValueError(
                f"--resume {resume} is of phase {snapshot.phase}, and mpl_scale.phases.{phase}.steps has more steps "
                f"than that run trained: give a checkpoint of phase {phase}"
            )
        earlier = snapshots.last_of(phase)
        if earlier is None:
            raise ValueError(
                f"mpl_scale.phases.{phase}.steps = {wanted['identity']['steps'][phase]} (or --max_steps) is more than "
                f"the run in {output} trained, and no checkpoint of phase {phase} is kept; "
                "begin a new run under another --output, with mpl_scale.checkpoint.keep_every to keep some for good"
            )
        snapshot = earlier
        verdict = _judged(trainer, snapshot, wanted)
    for line in verdict.notes():
        note(line)
    if summary is not None and verdict.done and resume == "auto":
        note(f"the run in {output} is finished: nothing is trained, and its files stay as they are")
        return Start(None, wanted, finished=summary)
    entry = {"phase": snapshot.phase, "step": snapshot.step, "changed": verdict.changed}
    if summary is not None and resume == "auto":
        entry["results"] = summary["results"]
    history = [*snapshot.metadata.get("history", []), *([entry] if verdict.changed else [])]
    return Start(snapshot, {**wanted, "history": history}, reopens=phase is not None)


def _judged(trainer: Trainer, snapshot: Snapshot, wanted: Mapping[str, Any]) -> Verdict:
    """The verdict; where something is refused, all that is changed is noted, and the refusal raised on every rank."""
    verdict = value_on_main(trainer.mesh, partial(_judge, snapshot, wanted))
    if verdict.refused:
        for line in verdict.notes():
            trainer.writers.note(line)
        raise refusal(snapshot.folder.absolute().parents[1], verdict.refused)
    return verdict


def _judge(snapshot: Snapshot, wanted: Mapping[str, Any]) -> Verdict:
    """A checkpoint of an earlier version keeps no identity: its run's manifest stands in for it."""
    stored = dict(snapshot.metadata)
    if "identity" not in stored:
        manifest = read_manifest(snapshot.folder.absolute().parents[1] / "splits")
        stored["identity"] = {} if manifest is None else {"manifest": manifest}
    stored.setdefault("config", wanted["config"])  # a state that was set aside over a fault has none
    return judge(stored, wanted)


def finished_summary(output: Path) -> dict[str, Any] | None:
    """The summary of a run that is done; None: it is not. ValueError: summary.json is damaged."""
    summary = output / SUMMARY_NAME
    if not (output / DONE_NAME).exists() or not summary.exists():
        return None
    fix = f"delete {DONE_NAME} beside it to continue from the last checkpoint"
    found = read_object(summary, fix=fix)
    if not isinstance(found.get("results"), dict):
        raise ValueError(f"{summary}: it has no results; {fix}")
    return found
