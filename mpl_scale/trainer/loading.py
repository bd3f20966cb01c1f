"""Where a phase's batches come from."""

from __future__ import annotations

from mpl_scale.augment import StrongView
from mpl_scale.config import Config
from mpl_scale.data import Quarantine, Splits, StrongViewFunction, TrainLoader
from mpl_scale.data.prefetch import Prefetcher
from mpl_scale.data.resident_parts import ResidentParts
from mpl_scale.data.vectors import Jitter, VectorSet
from mpl_scale.mesh import Mesh
from mpl_scale.resolve import choose_layout
from mpl_scale.spatial import input_columns
from mpl_scale.trainer.phases import Phase


def load_batches(
    phase: Phase,
    config: Config,
    *,
    splits: Splits,
    mesh: Mesh,
    start_step: int,
    quarantine: Quarantine,
    resident: ResidentParts,
) -> Prefetcher:
    """The global batches of a phase, this rank's rows of them, from a step on."""
    loader = TrainLoader(
        config=config.data,
        splits=splits,
        image_size=config.model.image_size,
        labelled_batch=phase.labelled,
        unlabelled_batch=phase.unlabelled,
        mesh=mesh,
        seed=config.seed,
        stream=phase.index,
        start_step=start_step,
        strong_view=strong_view(phase, config, splits),
        columns=input_columns(config.model.image_size, mesh.width),
        channels_last=choose_layout(config.parallel, mesh.device.type)[0],
        quarantine=quarantine,
        resident=resident.train,
    )
    return Prefetcher(loader, mesh.device)


def strong_view(phase: Phase, config: Config, splits: Splits) -> StrongViewFunction:
    """What makes the strong view of a phase."""
    if isinstance(splits.images, VectorSet):
        return Jitter(seed=config.seed, stream=phase.index, deviation=config.data.jitter)
    return StrongView(config.data.strong, seed=config.seed, stream=phase.index, candidates=splits.unlabelled)
