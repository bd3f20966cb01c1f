"""Non-finite values: a loss, a metric or a weight that is NaN or infinite ends the run before it is kept.

Looked at where device values are read anyway: metrics at logging steps, and weights before each checkpoint, so that no
good checkpoint is ever followed, and pruned, by a bad one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from mpl_scale.checkpoint import CheckpointError
from mpl_scale.config.schema import GuardConfig
from mpl_scale.mesh import Mesh
from mpl_scale.monitor import Writers
from mpl_scale.mpl import State
from mpl_scale.mpl.skipping import IN_A_ROW
from mpl_scale.trainer.phase_run import PhaseRun, Record
from mpl_scale.trainer.snapshots import Snapshots
from mpl_scale.trainer.vitals import Vitals


def nonfinite_metrics(values: Mapping[str, float]) -> list[str]:
    """ "name = nan", of those that are no finite numbers."""
    return [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]


def nonfinite_weights(state: State, *, mesh: Mesh) -> list[str]:
    """The networks ("teacher", "student", "ema") with a master weight that is no finite number. Collective."""
    networks = {"teacher": state.teacher, "student": state.student}
    held = {name: network.master for name, network in networks.items() if network is not None}
    if state.student_average is not None:
        held["ema"] = state.student_average.shards
    bad = torch.zeros(len(held), device=mesh.device)
    for index, tensors in enumerate(held.values()):
        for tensor in tensors:
            bad[index] += torch.logical_not(tensor.isfinite().all())
    if mesh.world_group is not None:
        dist.all_reduce(bad, group=mesh.world_group)
    return [f"the weights of {name}" for name, count in zip(held, bad.tolist(), strict=True) if count]


@dataclass
class Guard:
    """What a run does about non-finite values, as `mpl_scale.guard` says; all of it is the same on every rank."""

    settings: GuardConfig
    mesh: Mesh
    snapshots: Snapshots
    writers: Writers
    vitals: Vitals
    record: Record

    def check_metrics(self, run: PhaseRun, values: Mapping[str, float]) -> None:
        """Stop the run over a metric (`nonfinite: stop`), or over too many skipped steps in a row (`skip`)."""
        if run.skipping is not None:
            self._tell_skipped(run, run.skipping.news(), in_a_row=values[IN_A_ROW])
        elif self.settings.nonfinite == "stop" and (found := nonfinite_metrics(values)):
            self.refuse(run, found)

    def check_weights(self, run: PhaseRun) -> None:
        """Stop the run over a weight, before it is saved."""
        if self.settings.nonfinite == "stop" and (found := nonfinite_weights(run.state, mesh=self.mesh)):
            self.refuse(run, found)

    def refuse(
        self,
        run: PhaseRun,
        found: Sequence[str],
        *,
        otherwise: str = "continue with mpl_scale.guard.nonfinite = off",
    ) -> NoReturn:
        """Set the state aside and end the run with a ValueError that names the batch."""
        self.vitals.tell("save", run)
        try:
            folder = self.snapshots.set_aside(run.phase, run.state, step=run.step, global_step=self.record.global_step)
            saved = f"the state is in {folder}"
        except CheckpointError as error:
            saved = f"the state could not be saved ({error})"
        raise ValueError(
            f"{', '.join(found)} after step {run.step} of {run.phase.name}, whose batch was {run.batch_ids(run.step)}; "
            f"{saved}, it will not be used for resuming; lower the learning rate, look at these images, or {otherwise}"
        )

    def _tell_skipped(self, run: PhaseRun, numbers: Sequence[int], *, in_a_row: float) -> None:
        for number in numbers:
            self.writers.note(
                f"step {number + 1} of {run.phase.name} is skipped: it has NaN or infinity; its batch was "
                f"{run.batch_ids(number + 1)}"
            )
        if in_a_row >= self.settings.max_skipped:
            most = f"mpl_scale.guard.max_skipped = {self.settings.max_skipped}"
            self.refuse(run, [f"{in_a_row:.0f} steps in a row had NaN or infinity ({most})"])
