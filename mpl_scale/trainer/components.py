"""The parts of a run, made from its configuration and put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpl_scale.config import RunConfig
from mpl_scale.data import Quarantine, Splits
from mpl_scale.data.resident_parts import ResidentParts
from mpl_scale.mesh import Mesh
from mpl_scale.monitor import ControlFiles, Heartbeat, Writers
from mpl_scale.resolve import Resolved
from mpl_scale.trainer.checkpointer import Checkpointer
from mpl_scale.trainer.data_source import DataSource
from mpl_scale.trainer.evaluation import Evaluator
from mpl_scale.trainer.gauge import Gauge
from mpl_scale.trainer.guard import Guard
from mpl_scale.trainer.logger import MetricsLogger
from mpl_scale.trainer.phase_run import Record
from mpl_scale.trainer.phases import plan_phases
from mpl_scale.trainer.requests import Requests
from mpl_scale.trainer.rewind import Rewinder
from mpl_scale.trainer.run import Trainer
from mpl_scale.trainer.snapshots import Snapshots
from mpl_scale.trainer.validator import Validator
from mpl_scale.trainer.views import ViewGrid
from mpl_scale.trainer.vitals import Vitals
from mpl_scale.trainer.watchdog import Watchdog


@dataclass(frozen=True)
class Options:
    """The command line beside the config.

    resume: auto, never, or a checkpoint's folder. calibration: a file of measured rates, to plan the time of a step.
    """

    output: Path
    resume: str = "auto"
    max_steps: int | None = None
    calibration: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A run whose input is good: what its settings mean here, its data, its ranks, where it writes."""

    config: RunConfig
    options: Options
    resolved: Resolved
    splits: Splits
    mesh: Mesh
    writers: Writers


def build_trainer(prepared: Prepared, *, stop_requested: Callable[[], bool]) -> Trainer:
    """A trainer at its first step. stop_requested: asked on every rank at step boundaries."""
    config, options, mesh, writers = prepared.config, prepared.options, prepared.mesh, prepared.writers
    settings, output = config.mpl, options.output
    phases = plan_phases(settings, prepared.resolved.batches, max_steps=options.max_steps)
    quarantine = Quarantine(
        max_fraction=settings.data.max_bad_fraction,
        path=output / f"quarantine-rank{mesh.rank}.jsonl",
        warn=writers.note,
    )
    resident = ResidentParts(
        settings.data,
        prepared.splits,
        image_size=settings.model.image_size,
        device=mesh.device,
        quarantine=quarantine,
        unlabelled=any(phase.unlabelled for phase in phases),
        tell=writers.note,
    )
    if options.calibration is not None and not prepared.resolved.cost:
        writers.note("--calibration is ignored: set mpl_scale.logging.cost = on to plan the time of a step")
    record = Record()
    seconds = settings.guard.hang_seconds
    vitals = Vitals(
        record,
        heartbeat=Heartbeat(output) if mesh.is_main else None,
        watchdog=None if seconds is None else Watchdog(output, seconds=seconds, mesh=mesh),
    )
    snapshots = Snapshots(output / "checkpoints", settings.checkpoint, mesh, warn=writers.note)
    guard = Guard(settings.guard, mesh, snapshots, writers, vitals, record)
    checkpointer = Checkpointer(config, snapshots, guard, vitals, record, last_phase=phases[-1].name)
    evaluator = Evaluator(settings, splits=prepared.splits, mesh=mesh, quarantine=quarantine, resident=resident)
    control = ControlFiles(output) if mesh.is_main else None
    return Trainer(
        config=config,
        resolved=prepared.resolved,
        mesh=mesh,
        phases=phases,
        source=DataSource(
            settings, prepared.splits, mesh, resident, quarantine, channels_last=prepared.resolved.channels_last
        ),
        writers=writers,
        snapshots=snapshots,
        record=record,
        vitals=vitals,
        gauge=Gauge(config, prepared.resolved, mesh, options.calibration),
        logger=MetricsLogger(settings.logging.every, mesh, writers, vitals, guard, quarantine, record),
        validator=Validator(evaluator, settings.phases.train.evaluate_every, mesh, writers, vitals, record),
        checkpointer=checkpointer,
        rewinder=Rewinder(settings.guard.rewind, snapshots, checkpointer, guard, writers, vitals, record),
        views=ViewGrid(settings.logging.view_grid_every, output, prepared.splits.images.classes, mesh, writers, record),
        requests=Requests(mesh, stop_requested, control, every=settings.logging.every),
    )
