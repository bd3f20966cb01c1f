"""From a ds_config and options to a finished run, in the order in which things can go wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mpl_scale.checkpoint import CheckpointError
from mpl_scale.checkpoint.agree import on_main
from mpl_scale.config import RunConfig
from mpl_scale.config.needs import MONITORS, needed_packages
from mpl_scale.data import Splits, check_batches
from mpl_scale.data.samples.manifest import describe_splits, read_manifest, same_samples
from mpl_scale.engine.graph import first_line
from mpl_scale.mesh import Mesh, adopt_slurm_environment, build_mesh, choose_device, start_process_group
from mpl_scale.monitor import (
    DONE_NAME,
    SUMMARY_NAME,
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
from mpl_scale.packages import require_packages
from mpl_scale.resolve import Resolved, resolve
from mpl_scale.trainer.bad_input import check_same_on_all_ranks, do_together, is_agreed
from mpl_scale.trainer.components import Options, Prepared, build_trainer
from mpl_scale.trainer.lock import lock_output
from mpl_scale.trainer.output import CONFIG, METRICS, SPLITS, check_output
from mpl_scale.trainer.preflight import (
    check_models,
    check_names,
    find_weights,
    load_splits,
    network_notes,
    record_splits,
    repeated,
)
from mpl_scale.trainer.run import Trainer
from mpl_scale.trainer.start import find_start, finished_summary

__all__ = ["Options", "train"]

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
    require_packages(needed_packages(run, engine=resolved.engine))
    batches = resolved.batches
    check_names(run)
    check_output(options.output, resume=options.resume, data=run.mpl.data)
    if resolved.engine == "deepspeed":
        from mpl_scale.engine.deepspeed_setup import validate_ds_blocks  # imports deepspeed: 4 s and more

        validate_ds_blocks(run.deepspeed, device_type=device.type)
    find_weights(run)
    splits = load_splits(run)
    check_batches(
        run.mpl.data,
        splits,
        labelled_batch=batches.labelled,
        unlabelled_batch=batches.unlabelled,
        data_ranks=batches.data_ranks,
    )
    check_models(run)
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
        if dist.get_world_size() > 1 and not is_agreed(error):
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
    settings = {**wanted, "resume": options.resume, "commits": find_weights(run)}
    check_same_on_all_ranks(settings)  # before groups are made as the config says
    mesh = build_mesh(device=device, width=run.mpl.parallel.width, shard_size=resolved.shard_size)
    writers = Writers(progress=Progress(run.mpl.logging.progress, show=SHOWN) if mesh.is_main else None)
    with ExitStack() as held:

        def enter() -> dict[str, Any] | None:
            held.enter_context(lock_output(options.output, patience=LOCK_PATIENCE, note=writers.note))
            model = run.mpl.model
            if any((run.mpl.data.distributions, model.teacher.weights, model.student.weights)):
                return None  # files, which find_start compares
            return _summary_of_finished_run(options, fingerprint, splits)

        held.callback(writers.close)
        finished = on_main(mesh, enter)
        if finished is not None:
            if options.calibration is not None:
                writers.note("--calibration is ignored: the run is finished")
            return finished
        trainer = build_trainer(Prepared(run, options, resolved, splits, mesh, writers), stop_requested=stop_requested)
        held.callback(trainer.vitals.close)
        finished = _begin(trainer, options)
        if finished is not None:
            return finished
        if not trainer.train():
            return None
        summary = {"config_hash": fingerprint, **_summary(trainer), "cost": trainer.gauge.report()}
        if mesh.is_main:
            write_summary(options.output, summary)
            mark_done(options.output)
        return summary


def _begin(trainer: Trainer, options: Options) -> dict[str, Any] | None:
    """Take the trainer to where it starts, and open its files there. The summary where nothing is left to train.

    The files of the run that was there before are as they were unless all of this succeeds.
    """
    config, writers, output = trainer.config, trainer.writers, options.output
    for line in (trainer.resolved.batches.equation(), *trainer.resolved.notes()):
        writers.note(line)
    if config.mpl.phases.teacher_warmup.steps and trainer.phases[0].name != "teacher_warmup":
        writers.note(f"phases.teacher_warmup is ignored: method {config.mpl.method.name} has no teacher")
    start = find_start(trainer, output, resume=options.resume, max_steps=options.max_steps)
    if start.finished is not None:
        return start.finished
    trainer.record.kept, snapshot = start.kept, start.snapshot
    if snapshot is not None:
        trainer.restore(snapshot)
        writers.note(f"resuming from {snapshot.folder}: {snapshot.phase}, step {snapshot.step}")
    if start.reopens and snapshot is not None:
        trainer.snapshots.withdraw_later(snapshot)
    if trainer.mesh.is_main:
        for name in (DONE_NAME, SUMMARY_NAME):  # of results that a new config.json must not stand beside
            (output / name).unlink(missing_ok=True)
        manifest = start.kept["identity"]["manifest"]
        for line in record_splits(trainer.source.splits, output, manifest=manifest):
            writers.note(line)
        unlabelled = any(phase.unlabelled for phase in trainer.phases)
        for line in () if snapshot is not None else network_notes(config):
            writers.note(line)
        for line in repeated(trainer.source.splits, trainer.resolved.batches, unlabelled=unlabelled):
            writers.note(line)
        (output / CONFIG).write_text(json.dumps(config.resolved(), indent=2) + "\n")
        resume_step = None if snapshot is None else trainer.record.global_step
        writers.metrics = MetricsWriter(output / METRICS, resume_step=resume_step)
    do_together(trainer.mesh, partial(_open_monitor, config, writers, trainer.mesh))
    return None


def _summary(trainer: Trainer) -> dict[str, Any]:
    config, device, resolved = trainer.config, trainer.mesh.device, trainer.resolved
    return {
        "command": command(),
        "config": str(config.path),
        "method": config.mpl.method.name,
        "seed": config.mpl.seed,
        "results": trainer.record.results,
        "history": trainer.record.kept["history"],
        "steps": trainer.record.global_step,
        "seconds": round(trainer.record.seconds(), 3),
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


def _summary_of_finished_run(options: Options, fingerprint: str, splits: Splits) -> dict[str, Any] | None:
    """The summary of a run that is DONE, of the same configuration, data and split, for --resume auto; else None."""
    found = finished_summary(options.output) if options.resume == "auto" else None
    if found is None or found.get("config_hash") != fingerprint:
        return None
    manifest = read_manifest(options.output / SPLITS)
    return found if manifest is not None and same_samples(manifest, describe_splits(splits)) else None


def _open_monitor(run: RunConfig, writers: Writers, mesh: Mesh) -> None:
    """Rank 0: DeepSpeed's own writers for the tensorboard, csv_monitor, wandb and comet sections, if one is enabled."""
    enabled = [name for name in MONITORS if run.deepspeed.get(name, {}).get("enabled", False)]
    if not enabled or not mesh.is_main:
        return
    from mpl_scale.engine.deepspeed_setup import monitor_master, picture_writer  # imports deepspeed: 4 s and more

    try:
        writers.monitor = monitor_master(run.deepspeed)
        writers.draw = picture_writer(writers.monitor)
    except Exception as error:  # of any service's library: no account, no network, a version too old
        raise ValueError(
            f"{', '.join(enabled)} cannot be opened: {first_line(error)}; mend that, or set enabled to false"
        ) from error
