"""From a ds_config and options to a finished run, in the order in which things can go wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mpl_scale.checkpoint import CheckpointError
from mpl_scale.checkpoint.agree import on_main
from mpl_scale.config import RunConfig
from mpl_scale.data import Quarantine, Splits, check_batches
from mpl_scale.mesh import Mesh, adopt_slurm_environment, build_mesh, choose_device, start_process_group
from mpl_scale.monitor import (
    ControlFiles,
    Heartbeat,
    MetricsWriter,
    Progress,
    Writers,
    command,
    config_hash,
    mark_done,
    processor,
    versions,
    write_summary,
)
from mpl_scale.resolve import Resolved, resolve
from mpl_scale.trainer.agree import check_same_on_all_ranks, value_on_main
from mpl_scale.trainer.gauge import Gauge
from mpl_scale.trainer.input import (
    check_models,
    check_names,
    check_output,
    check_resumed,
    load_splits,
    record_splits,
)
from mpl_scale.trainer.lock import lock_output
from mpl_scale.trainer.phases import plan_phases
from mpl_scale.trainer.run import Trainer
from mpl_scale.trainer.snapshots import Snapshots
from mpl_scale.trainer.watchdog import Watchdog

SHOWN = (
    "student_loss",
    "teacher_supervised_loss",
    "cosine",
    "h",
    "test/student_top1",
    "test/teacher_top1",
    "test/ema_top1",
    "test/finetuned_top1",
    "teacher_uda_loss",
)
"""Metrics of the progress line."""
LOCK_PATIENCE = 300.0
"""Seconds to wait for another run to leave the output folder."""


@dataclass(frozen=True)
class Options:
    """The command line beside the config.

    resume: auto, never, or a checkpoint's folder. calibration: a file of measured rates, to plan the time of a step.
    """

    output: Path
    resume: str = "auto"
    max_steps: int | None = None
    calibration: str | None = None


def train(
    run: RunConfig, options: Options, *, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Run a configuration on the ranks the launcher started.

    Returns the summary, or None if it was asked to stop; the same call then resumes from the saved state.

    Raises:
        ValueError: bad input, before the ranks join where it does not depend on them.
    """
    adopt_slurm_environment(os.environ)
    device = choose_device(os.environ)
    resolved = resolve(run, world=int(os.environ.get("WORLD_SIZE", "1")), device=device.type)
    batches = resolved.batches
    check_names(run)
    if resolved.engine == "deepspeed":
        from mpl_scale.engine.deepspeed_setup import validate_ds_blocks  # imports deepspeed: 4 s and more

        validate_ds_blocks(run.deepspeed, device_type=device.type)
    splits = load_splits(run)
    check_batches(
        run.mpl.data,
        splits,
        labelled_batch=batches.labelled,
        unlabelled_batch=batches.unlabelled,
        data_ranks=batches.data_ranks,
    )
    check_models(run)
    check_output(options.output)
    _share_cores(os.environ)
    resolved.numerics.apply(device)
    owns_group = not dist.is_initialized()
    if owns_group:
        start_process_group(device, timeout_seconds=run.mpl.parallel.timeout_seconds)
    try:
        return _run(run, options, resolved, splits, device, stop_requested)
    except CheckpointError:  # the same on every rank
        raise
    except ValueError as error:
        error.add_note(f"rank {dist.get_rank()}")
        raise
    finally:
        if owns_group:
            dist.destroy_process_group()


def _run(
    run: RunConfig,
    options: Options,
    resolved: Resolved,
    splits: Splits,
    device: torch.device,
    stop_requested: Callable[[], bool],
) -> dict[str, Any] | None:
    """Take the output folder, then train, unless a finished run of this very configuration is found there."""
    wanted = {**run.resolved(), "max_steps": options.max_steps}
    fingerprint = config_hash(wanted)
    check_same_on_all_ranks({**wanted, "resume": options.resume})  # before groups are made as the config says
    mesh = build_mesh(device=device, width=run.mpl.parallel.width, shard_size=resolved.shard_size)
    writers = Writers(progress=Progress(run.mpl.logging.progress, show=SHOWN) if mesh.is_main else None)
    with ExitStack() as held:

        def enter() -> dict[str, Any] | None:
            held.enter_context(lock_output(options.output, patience=LOCK_PATIENCE, note=writers.note))
            return _summary_of_finished_run(options, fingerprint)

        held.callback(writers.close)
        finished = on_main(mesh, enter)
        if finished is not None:
            return finished
        trainer = _make_trainer(run, options, resolved, splits, mesh, writers, stop_requested)
        if trainer.watchdog is not None:
            held.callback(trainer.watchdog.close)
        if not trainer.train():
            return None
        summary = {"config_hash": fingerprint, **_summary(trainer), "cost": trainer.gauge.report()}
        if mesh.is_main:
            write_summary(options.output, summary)
            mark_done(options.output)
        return summary


def _make_trainer(
    run: RunConfig,
    options: Options,
    resolved: Resolved,
    splits: Splits,
    mesh: Mesh,
    writers: Writers,
    stop_requested: Callable[[], bool],
) -> Trainer:
    """A trainer at the start or at its newest checkpoint, and its files opened to continue from there."""
    phases = plan_phases(run.mpl, resolved.batches, max_steps=options.max_steps)
    for line in (resolved.batches.equation(), *resolved.notes()):
        writers.note(line)
    if run.mpl.phases.teacher_warmup.steps and phases[0].name != "teacher_warmup":
        writers.note(f"phases.teacher_warmup is ignored: method {run.mpl.method.name} has no teacher")
    snapshots = Snapshots(options.output / "checkpoints", run.mpl.checkpoint, mesh, warn=writers.note)
    trainer = Trainer(
        run=run,
        splits=splits,
        phases=phases,
        mesh=mesh,
        writers=writers,
        snapshots=snapshots,
        stop_requested=stop_requested,
        resolved=resolved,
        gauge=Gauge(run, resolved, mesh, options.calibration),
        control=ControlFiles(options.output) if mesh.is_main else None,
        heartbeat=Heartbeat(options.output) if mesh.is_main else None,
        watchdog=_watchdog(run, options, mesh),
        quarantine=Quarantine(
            max_fraction=run.mpl.data.max_bad_fraction,
            path=options.output / f"quarantine-rank{mesh.rank}.jsonl",
            warn=writers.note,
        ),
    )
    snapshot = snapshots.find(options.resume)
    if snapshot is not None:
        value_on_main(mesh, partial(check_resumed, splits, snapshot.folder))
        trainer.restore(snapshot)
        writers.note(f"resuming from {snapshot.folder}: {snapshot.phase}, step {snapshot.step}")
    if mesh.is_main:
        (options.output / "DONE").unlink(missing_ok=True)
        for line in record_splits(splits, options.output):
            writers.note(line)
        (options.output / "config.json").write_text(json.dumps(run.resolved(), indent=2) + "\n")
        resume_step = None if snapshot is None else trainer.global_step
        writers.metrics = MetricsWriter(options.output / "metrics.jsonl", resume_step=resume_step)
        writers.monitor = _deepspeed_monitor(run)
    return trainer


def _watchdog(run: RunConfig, options: Options, mesh: Mesh) -> Watchdog | None:
    seconds = run.mpl.guard.hang_seconds
    return None if seconds is None else Watchdog(options.output, seconds=seconds, mesh=mesh)


def _summary(trainer: Trainer) -> dict[str, Any]:
    run, device, resolved = trainer.run, trainer.mesh.device, trainer.resolved
    return {
        "command": command(),
        "config": str(run.path),
        "method": run.mpl.method.name,
        "seed": run.mpl.seed,
        "results": trainer.results,
        "steps": trainer.global_step,
        "seconds": round(trainer.elapsed(), 3),
        "ranks": trainer.mesh.world,
        "width": trainer.mesh.width,
        "zero_stage": resolved.stage,
        "engine": resolved.engine,
        "resolved": resolved.summary(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor(),
        "versions": versions(),
    }


def _share_cores(environment: Mapping[str, str]) -> None:
    """Divide the node's cores over its ranks, unless OMP_NUM_THREADS has decided."""
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or environment.get("WORLD_SIZE", "1")
    if "OMP_NUM_THREADS" not in environment:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(local)))


def _summary_of_finished_run(options: Options, fingerprint: str) -> dict[str, Any] | None:
    """The summary of a run of the same configuration that is DONE, for --resume auto; else None."""
    summary = options.output / "summary.json"
    if options.resume != "auto" or not (options.output / "DONE").exists() or not summary.exists():
        return None
    found: dict[str, Any] = json.loads(summary.read_text())
    return found if found.get("config_hash") == fingerprint else None


def _deepspeed_monitor(run: RunConfig) -> Any:
    """DeepSpeed's own writers for the tensorboard, csv_monitor, wandb and comet sections, if one is enabled."""
    sections = ("tensorboard", "csv_monitor", "wandb", "comet")
    if not any(run.deepspeed.get(section, {}).get("enabled", False) for section in sections):
        return None
    from mpl_scale.engine.deepspeed_setup import monitor_master  # imports deepspeed: 4 s and more

    return monitor_master(run.deepspeed)
