"""Where the batches of every phase come from: files or the resident set, through one loader."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mpl_scale.augment import StrongView
from mpl_scale.config import Config
from mpl_scale.data import BatchSpec, Quarantine, Splits, StrongViewFunction, TrainLoader
from mpl_scale.data.batch_spec import Kind
from mpl_scale.data.prefetch import Prefetcher
from mpl_scale.data.resident_parts import ResidentParts
from mpl_scale.data.vectors import Jitter, VectorSet
from mpl_scale.mesh import Mesh
from mpl_scale.mpl import LOSSES
from mpl_scale.spatial import input_columns
from mpl_scale.trainer.phases import Phase

_SHOWN_IDS = 8


@dataclass(frozen=True)
class DataSource:
    """The data of a run on this rank. channels_last: memory layout of the images."""

    config: Config
    splits: Splits
    mesh: Mesh
    resident: ResidentParts
    quarantine: Quarantine = field(default_factory=Quarantine)
    channels_last: bool = False

    def batches(self, phase: Phase, *, start_step: int) -> Prefetcher:
        """The global batches of a phase from a step on, this rank's rows of them."""
        loader = TrainLoader(
            self.config.data,
            self.splits,
            batch=batch_spec(phase, self.config, self.splits, width=self.mesh.width, channels_last=self.channels_last),
            mesh=self.mesh,
            start_step=start_step,
            quarantine=self.quarantine,
            resident=self.resident.train,
        )
        return Prefetcher(loader, self.mesh.device)


def batch_spec(
    phase: Phase, config: Config, splits: Splits, *, width: int = 1, channels_last: bool = False
) -> BatchSpec:
    """The global batches of a phase, for `width` ranks to an image."""
    size, loss = config.model.image_size, phase.method.training_loss(phase.settings)
    return BatchSpec(
        image_size=size,
        columns=input_columns(size, width),
        channels_last=channels_last,
        labelled=phase.labelled,
        unlabelled=phase.unlabelled,
        seed=config.seed,
        stream=phase.index,
        strong_view=strong_view(phase, config, splits),
        ids=loss is not None and LOSSES[loss].per_image,
    )


def strong_view(phase: Phase, config: Config, splits: Splits) -> StrongViewFunction:
    """What makes the strong view of a phase."""
    if isinstance(splits.images, VectorSet):
        return Jitter(seed=config.seed, stream=phase.index, deviation=config.data.jitter)
    return StrongView(config.data.strong, seed=config.seed, stream=phase.index, candidates=splits.unlabelled)


def batch_ids(phase: Phase, *, config: Config, splits: Splits, step: int) -> str:
    """The global batch after which `step` steps of the phase were done: "labelled 5, 9, ...; unlabelled ...".

    Sample ids as the source numbers them, before a file that cannot be read is replaced by another.
    """
    spec, said = batch_spec(phase, config, splits), []
    kinds: tuple[Kind, ...] = ("labelled", "unlabelled")
    for kind in kinds:
        if not (count := getattr(spec, kind)):
            continue
        plan = spec.plan(kind, splits, rows=np.arange(count, dtype=np.int64), columns=0)  # the views do not matter here
        drawn = plan.draw(step - 1).ids
        more = f" and {len(drawn) - _SHOWN_IDS} more" if len(drawn) > _SHOWN_IDS else ""
        said.append(f"{kind} {', '.join(map(str, drawn[:_SHOWN_IDS]))}{more}")
    return "; ".join(said)
