"""What a run is asked for while it trains, by signals and by control files: agreed over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mpl_scale.mesh import Mesh
from mpl_scale.monitor import ControlFiles, Request
from mpl_scale.trainer.phase_run import PhaseRun


@dataclass
class Requests:
    """stop_requested: asked on every rank. control: on rank 0 only. every: steps between questions on a GPU."""

    mesh: Mesh
    stop_requested: Callable[[], bool]
    control: ControlFiles | None
    every: int

    def agreed(self, run: PhaseRun) -> Request:
        """The most that any rank is asked for. On GPUs only now and then, because their answer waits for the device."""
        stop = self.stop_requested()  # at every step: it learns from this that there is something to save
        together = self.mesh.world_group is not None
        if together and self.mesh.device.type == "cuda" and run.step % self.every:
            return Request.NONE
        own = Request.STOP if stop else self.control() if self.control is not None else Request.NONE
        if not together:
            return own
        asked = torch.tensor(float(own), device=self.mesh.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.mesh.world_group)
        return Request(int(asked.item()))

    def answered(self, request: Request) -> None:
        """Delete the file of a request once the state is saved."""
        if self.control is not None and request:
            self.control.answered(request)
