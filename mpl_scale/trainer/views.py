"""Every few steps a picture of what the networks saw: weak and strong views of unlabelled images, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from mpl_scale.data.samples.truth import UNKNOWN
from mpl_scale.files import replacing
from mpl_scale.mesh import Mesh
from mpl_scale.monitor import Writers
from mpl_scale.monitor.grid import Labelled, draw_grid
from mpl_scale.trainer.phase_run import PhaseRun, Record
from mpl_scale.types import Batch

VIEWS = "views"
"""The folder of the pictures."""
SHOWN = 16
"""Images of a picture: the first ones of the main rank."""


@dataclass(frozen=True)
class ViewGrid:
    """Draws a picture every `every` steps of all phases, those with unlabelled images; 0: none.

    folder: of the run. classes: names by label.
    """

    every: int
    folder: Path
    classes: Sequence[str]
    mesh: Mesh
    writers: Writers
    record: Record

    def show(self, run: PhaseRun, batch: Batch) -> None:
        """After a step on a batch: views/step_000100.png, by its global step, and the same for TensorBoard.

        Collective over the main rank's width group. A picture that cannot be written is said, and no reason to stop.
        """
        step = self.record.global_step
        if not self.every or step % self.every or run.tally is None or self.mesh.data_index:
            return
        weak, strong = (self._whole(views[:SHOWN]) for views in (batch.weak, batch.strong))
        if not self.mesh.is_main:
            return
        page = draw_grid(
            self._labelled(run, batch, weak, strong), title=f"{run.phase.name}, step {run.step}: weak, strong"
        )
        path = self.folder / VIEWS / f"step_{step:06d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path, durable=False) as draft:
                page.save(draft, format="PNG")
        except OSError as error:
            self.writers.note(f"{path} cannot be written: {error.strerror}; training continues without this picture")
        self.writers.picture("views", np.asarray(page), phase=run.phase.name, global_step=step)

    def _labelled(self, run: PhaseRun, batch: Batch, weak: np.ndarray, strong: np.ndarray) -> list[Labelled]:
        assert run.tally is not None
        assert run.state.noted is not None
        noted, truth = run.state.noted, run.tally.truth(batch).tolist()
        labels, confidence = noted.labels[:SHOWN].tolist(), noted.confidence[:SHOWN].tolist()
        names = dict(enumerate(self.classes)) | {UNKNOWN: None}
        rows = zip(weak, strong, labels, confidence, truth, strict=False)
        return [
            Labelled(x_u, x_s, self.classes[label], sure, names[true], true == label)
            for x_u, x_s, label, sure, true in rows
        ]

    def _whole(self, views: torch.Tensor) -> np.ndarray:
        """Whole images uint8 [n, C, H, W] of this width group's columns [n, C, H, own columns]."""
        own = views.cpu()
        if self.mesh.width_group is None or self.mesh.width == 1:
            return own.numpy()
        parts: list[torch.Tensor] = [own] * self.mesh.width
        dist.all_gather_object(parts, own, group=self.mesh.width_group)
        return torch.cat(parts, -1).numpy()
