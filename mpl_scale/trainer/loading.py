"""Where a phase's batches come from."""

from __future__ import annotations

from typing import Any

from mpl_scale.augment import StrongView
from mpl_scale.config import Config
from mpl_scale.data import Quarantine, Splits, TrainLoader
from mpl_scale.data.prefetch import Prefetcher
from mpl_scale.data.vectors import VectorLoader, VectorSet
from mpl_scale.mesh import Mesh
from mpl_scale.spatial import input_columns
from mpl_scale.trainer.phases import Phase, channels_last


def load_batches(
    phase: Phase, config: Config, *, splits: Splits, mesh: Mesh, start_step: int, quarantine: Quarantine
) -> Prefetcher:
    """The global batches of a phase, this rank's rows of them, from a step on."""
    data, seed = config.data, config.seed
    common: dict[str, Any] = {
        "config": data,
        "splits": splits,
        "labelled_batch": phase.labelled,
        "unlabelled_batch": phase.unlabelled,
        "mesh": mesh,
        "seed": seed,
        "stream": phase.index,
        "start_step": start_step,
    }
    if isinstance(splits.images, VectorSet):
        return Prefetcher(VectorLoader(**common), mesh.device)
    loader = TrainLoader(
        image_size=config.model.image_size,
        strong_view=StrongView(data.strong, seed=seed, stream=phase.index, candidates=splits.unlabelled),
        columns=input_columns(config.model.image_size, mesh.width),
        channels_last=channels_last(config.parallel),
        quarantine=quarantine,
        **common,
    )
    return Prefetcher(loader, mesh.device)
