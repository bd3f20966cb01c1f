"""The library: what a script or a notebook calls, by `import mpl_scale as mpl`. docs/library.md shows it at work.

All that is not named in `mpl_scale.__all__` may change without notice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mpl_scale.cli.checkpoint_path import choose_checkpoint
from mpl_scale.config import RunConfig
from mpl_scale.data import Quarantine
from mpl_scale.data.resident_parts import ResidentParts
from mpl_scale.files import expanded, refuse_output, refuse_run
from mpl_scale.inference.predict import PredictOptions
from mpl_scale.inference.predict import predict as write_predictions
from mpl_scale.inference.scoring import StoredNetwork
from mpl_scale.mesh import Mesh, build_mesh, choose_device
from mpl_scale.mpl import LOSSES, METHODS, State
from mpl_scale.resolve import Resolved, resolve
from mpl_scale.trainer import preflight, prepare
from mpl_scale.trainer.data_source import DataSource
from mpl_scale.trainer.phases import Phase, plan_phases
from mpl_scale.trainer.phases import build_state as build_phase_state
from mpl_scale.types import Batch, StepMetrics


def train(
    config: RunConfig,
    *,
    output: str | Path,
    resume: str = "auto",
    max_steps: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Run a configuration, as `train.py` does, on the ranks that the launcher started.

    Args:
        config: of load_config.
        output: the run's folder; a run that is there is continued, or returned if it is finished.
        resume: auto, never, or a checkpoint's folder.
        max_steps: shortens every phase.
        stop_requested: asked after each step; True: save and stop.

    Returns:
        What summary.json holds, or None where the run was stopped.

    Raises:
        ValueError: bad input, named with its fix, before training begins.
    """
    options = prepare.Options(Path(output), resume, max_steps)
    return prepare.train(config, options, stop_requested=stop_requested)


class _Main(NamedTuple):
    """The phase `train` of a configuration on this rank."""

    resolved: Resolved
    mesh: Mesh
    phase: Phase


def _main_phase(config: RunConfig) -> _Main:
    preflight.check_names(config)
    device = choose_device(os.environ)
    resolved = resolve(config, world=int(os.environ.get("WORLD_SIZE", "1")), device=device.type)
    mesh = build_mesh(device=device, width=config.mpl.parallel.width, shard_size=resolved.shard_size)
    phases = plan_phases(config.mpl, resolved.batches, max_steps=None)
    return _Main(resolved, mesh, next(phase for phase in phases if phase.name == "train"))


def build_state(config: RunConfig) -> State:
    """Networks with their optimisers and schedules, before the first step of the phase `train`, for loops of one's own.

    In one process, or on a rank whose process group has been joined. Weights are those that a run would begin with; a
    teacher's warm-up has not been run.

    Raises:
        ValueError: as `train`.
    """
    resolved, mesh, phase = _main_phase(config)
    resolved.numerics.apply(mesh.device)
    preflight.check_models(config)
    loss = phase.method.training_loss(phase.settings)
    per_image = loss is not None and LOSSES[loss].per_image
    images = len(preflight.load_splits(config).unlabelled) if per_image else 0
    return build_phase_state(phase, config, mesh=mesh, weights={}, resolved=resolved, unlabelled_images=images)


class Loader:
    """The batches of the phase `train` on this rank, in the order in which a run sees them.

    Iterating gives mpl_scale.types.Batch: labelled images [B, C, H, W], their labels [B], and the weak and strong views
    of unlabelled ones [U, C, H, W], uint8, on the rank's device; each iteration begins at `start_step`, and ends with
    the phase.
    """

    def __init__(self, config: RunConfig, *, start_step: int = 0) -> None:
        """Opens the data set. Raises ValueError as `train`."""
        resolved, mesh, self._phase = _main_phase(config)
        data, quarantine = config.mpl.data, Quarantine()
        splits = preflight.load_splits(config)
        size = config.mpl.model.image_size
        resident = ResidentParts(data, splits, image_size=size, device=mesh.device, quarantine=quarantine)
        self._source = DataSource(config.mpl, splits, mesh, resident, quarantine, channels_last=resolved.channels_last)
        self._start = start_step

    def __len__(self) -> int:
        """Batches of an iteration."""
        return self._phase.steps - self._start

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._source.batches(self._phase, start_step=self._start))
        return (next(batches) for _ in range(len(self)))


def step(state: State, batch: Batch) -> StepMetrics:
    """One step of the state's method: both networks of Meta Pseudo Labels (Algorithm 1), or a baseline's one.

    Returns:
        Metrics by name, tensors [] on the device.
    """
    return METHODS[state.method.name].step(state, batch)


def predict(
    run: str | Path,
    images: str | Path,
    *,
    output: str | Path,
    network: str = "student",
    top: int = 1,
) -> dict[str, Any]:
    """Write what a trained network says of images as a table, as `mpl-scale predict` does.

    Args:
        run: a run's folder, or a checkpoint's.
        images: a folder, searched at any depth, or one file.
        output: .csv or .parquet.
        network: student, teacher, ema.
        top: classes of each image.

    Returns:
        images, unreadable, and notes on what else the folder holds.

    Raises:
        ValueError: bad input, named with its fix.
    """
    path = expanded(output)
    refuse_output(path, folder=False)
    refuse_run(path)
    stored = StoredNetwork(choose_checkpoint(expanded(run)), network)
    return write_predictions(PredictOptions(stored, expanded(images), path, top=top))
