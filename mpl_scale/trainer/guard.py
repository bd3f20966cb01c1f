"""Non-finite values: a loss, a metric or a weight that is NaN or infinite ends the run before it is kept.

Looked at where device values are read anyway: metrics at logging steps, and weights before each checkpoint, so that no
good checkpoint is ever followed, and pruned, by a bad one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from mpl_scale.config import Config
from mpl_scale.data import Splits
from mpl_scale.data.samples.plan import SamplePlan
from mpl_scale.data.samples.streams import Purpose, stream_of
from mpl_scale.mesh import Mesh
from mpl_scale.mpl import State
from mpl_scale.trainer.phases import Phase

_SHOWN_IDS = 8


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


def batch_ids(phase: Phase, *, config: Config, splits: Splits, step: int) -> str:
    """The global batch after which `step` steps of the phase were done: "labelled 5, 9, ...; unlabelled ...".

    Sample ids as the source numbers them, before a file that cannot be read is replaced by another.
    """
    kinds = (
        ("labelled", splits.labelled, phase.labelled, Purpose.LABELLED_ORDER),
        ("unlabelled", splits.unlabelled, phase.unlabelled, Purpose.UNLABELLED_ORDER),
    )
    said = []
    for kind, ids, batch, purpose in kinds:
        if not batch:
            continue
        stream = stream_of(purpose, phase.index)
        plan = SamplePlan(
            ids,
            batch=batch,
            rows=np.arange(batch, dtype=np.int64),
            columns=0,  # the views do not matter here
            seed=config.seed,
            order_stream=stream,
            view_stream=stream,
        )
        drawn = plan.draw(step - 1).ids
        more = f" and {len(drawn) - _SHOWN_IDS} more" if len(drawn) > _SHOWN_IDS else ""
        said.append(f"{kind} {', '.join(map(str, drawn[:_SHOWN_IDS]))}{more}")
    return "; ".join(said)
