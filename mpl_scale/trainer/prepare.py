"""From a ds_config and options to a finished run: everything that can be wrong with the input is found first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mpl_scale.augment import StrongView
from mpl_scale.checkpoint import CheckpointError
from mpl_scale.config import Batches, RunConfig, check
from mpl_scale.config.checks import uses_flat_engine, zero_stage
from mpl_scale.config.names import require_known
from mpl_scale.data import Splits, check_batches, load_images, make_splits
from mpl_scale.engine.graph import why_not_captured
from mpl_scale.mesh import Mesh, adopt_slurm_environment, build_mesh, choose_device, start_process_group
from mpl_scale.models import build_model
from mpl_scale.monitor import MetricsWriter, Progress, Writers, config_hash, mark_done, versions, write_summary
from mpl_scale.mpl import FEEDBACK_RULES, METHODS
from mpl_scale.optim import OPTIMIZERS
from mpl_scale.trainer.phases import initial_seed, plan_phases
from mpl_scale.trainer.run import Trainer
from mpl_scale.trainer.snapshots import Snapshots

SHOWN = (
    "student_loss",
    "teacher_supervised_loss",
    "cosine",
    "h",
    "student_top1",
    "teacher_top1",
    "ema_top1",
    "finetuned_top1",
)


@dataclass(frozen=True)
class Options:
    """The command line beside the config. resume: auto, never, or a checkpoint's folder."""

    output: Path
    resume: str = "auto"
    max_steps: int | None = None


def train(
    run: RunConfig, options: Options, *, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Run a configuration on the ranks the launcher started.

    Returns the summary, or None if it was asked to stop; the same call then goes on from the saved state.

    Raises:
        ValueError: bad input, before the ranks join where it does not depend on them.
    """
    adopt_slurm_environment(os.environ)
    device = choose_device(os.environ)
    batches = check(run, world=int(os.environ.get("WORLD_SIZE", "1")), cuda=device.type == "cuda")
    _check_names(run)
    if not uses_flat_engine(run, cuda=device.type == "cuda"):
        from mpl_scale.engine.deepspeed_setup import validate_ds_blocks  # imports deepspeed: 4 s and more

        validate_ds_blocks(run.deepspeed, device_type=device.type)
    splits = _load_splits(run)
    check_batches(
        run.mpl.data,
        splits,
        labelled_batch=batches.labelled,
        unlabelled_batch=batches.unlabelled,
        data_ranks=batches.data_ranks,
    )
    _check_models(run)
    _check_output(options.output)
    _share_cores(os.environ)
    owns_group = not dist.is_initialized()
    if owns_group:
        start_process_group(device, timeout_seconds=run.mpl.parallel.timeout_seconds)
    try:
        return _run(run, options, batches, splits, device, stop_requested)
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
    batches: Batches,
    splits: Splits,
    device: torch.device,
    stop_requested: Callable[[], bool],
) -> dict[str, Any] | None:
    eager_because = why_not_captured(
        graph=run.mpl.parallel.graph, device=device, flat_engine=uses_flat_engine(run, cuda=device.type == "cuda")
    )
    mesh = _mesh(run, device)
    phases = plan_phases(run.mpl, batches, max_steps=options.max_steps)
    fingerprint = config_hash({**run.resolved(), "max_steps": options.max_steps})
    done = _summary_of_finished_run(options, fingerprint)
    if done is not None:
        return done
    progress = Progress(run.mpl.logging.progress, show=SHOWN) if mesh.is_main else None
    writers = Writers(progress=progress)
    writers.note(batches.equation())
    if eager_because is not None and device.type == "cuda":
        writers.note(f"the step is not captured as a CUDA graph: {eager_because}")
    if run.mpl.phases.teacher_warmup.steps and phases[0].name != "teacher_warmup":
        writers.note(f"phases.teacher_warmup is ignored: method {run.mpl.method.name} has no teacher")
    snapshots = Snapshots(options.output / "checkpoints", run.mpl.checkpoint.keep, mesh, warn=writers.note)
    trainer = Trainer(
        run=run,
        splits=splits,
        phases=phases,
        mesh=mesh,
        writers=writers,
        snapshots=snapshots,
        stop_requested=stop_requested,
        capture=eager_because is None,
    )
    snapshot = snapshots.find(options.resume)
    if snapshot is not None:
        trainer.restore(snapshot)
        writers.note(f"resuming from {snapshot.folder}: {snapshot.phase}, step {snapshot.step}")
    if mesh.is_main:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "DONE").unlink(missing_ok=True)
        (options.output / "config.json").write_text(json.dumps(run.resolved(), indent=2) + "\n")
        resume_step = None if snapshot is None else trainer.global_step
        writers.metrics = MetricsWriter(options.output / "metrics.jsonl", resume_step=resume_step)
        writers.monitor = _deepspeed_monitor(run, options.output)
    try:
        if not trainer.train():
            return None
        summary = {
            "config": str(run.path),
            "config_hash": fingerprint,
            "method": run.mpl.method.name,
            "seed": run.mpl.seed,
            "results": trainer.results,
            "steps": trainer.global_step,
            "seconds": round(trainer.elapsed(), 3),
            "ranks": mesh.world,
            "zero_stage": zero_stage(run),
            "engine": "flat" if uses_flat_engine(run, cuda=device.type == "cuda") else "deepspeed",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "versions": versions(),
        }
        if mesh.is_main:
            write_summary(options.output, summary)
            mark_done(options.output)
        return summary
    finally:
        writers.close()


def _share_cores(environment: Mapping[str, str]) -> None:
    """Divide the node's cores over its ranks, unless OMP_NUM_THREADS has decided."""
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or environment.get("WORLD_SIZE", "1")
    if "OMP_NUM_THREADS" not in environment:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(local)))


def _mesh(run: RunConfig, device: torch.device) -> Mesh:
    """The flat engine's stage 0 is a shard group of one rank; DeepSpeed's has its own rule."""
    parallel = run.mpl.parallel
    flat_stage_0 = uses_flat_engine(run, cuda=device.type == "cuda") and zero_stage(run) == 0
    return build_mesh(device=device, width=parallel.width, shard_size=1 if flat_stage_0 else parallel.shard_size)


def _check_names(run: RunConfig) -> None:
    method, optim = run.mpl.method, run.mpl.optim
    require_known("mpl_scale.method.name", method.name, METHODS.keys() - {"teacher_warmup"})
    require_known("mpl_scale.method.feedback.rule", method.feedback.rule, FEEDBACK_RULES)
    require_known("mpl_scale.optim.teacher.name", optim.teacher.name, OPTIMIZERS)
    require_known("mpl_scale.optim.student.name", optim.student.name, OPTIMIZERS)
    StrongView(run.mpl.data.strong, seed=0, stream=0)


def _load_splits(run: RunConfig) -> Splits:
    config, data = run.mpl, run.mpl.data
    images = load_images(data)
    if len(images.classes) != config.model.num_classes:
        raise ValueError(
            f"mpl_scale.model.num_classes = {config.model.num_classes}, but the data set has {len(images.classes)} "
            f"classes; set {len(images.classes)}"
        )
    return make_splits(images, config=data, seed=config.seed)


def _check_models(run: RunConfig) -> None:
    """Build both networks without memory, and show them an image of the configured size."""
    config = run.mpl
    for name in ("teacher", "student"):
        field = f"mpl_scale.model.{name}"
        section = getattr(config.model, name)
        model = build_model(section, config.model, field=field, seed=initial_seed(config.seed, name), device="meta")
        size = config.model.image_size
        with torch.no_grad():
            try:
                logits = model.eval()(torch.empty(1, 3, size, size, device="meta"))
            except RuntimeError as error:
                raise ValueError(
                    f"{field}.name = {section.name} cannot take images of mpl_scale.model.image_size = {size}: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        if logits.shape != (1, config.model.num_classes):
            raise ValueError(f"{field}.name = {section.name} gives {list(logits.shape)}, not one logit per class")


def _check_output(output: Path) -> None:
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--output {output}: {parent} is not a folder this user can write to; choose another")


def _summary_of_finished_run(options: Options, fingerprint: str) -> dict[str, Any] | None:
    """The summary of a run of the same configuration that is DONE, for --resume auto; else None."""
    summary = options.output / "summary.json"
    if options.resume != "auto" or not (options.output / "DONE").exists() or not summary.exists():
        return None
    found: dict[str, Any] = json.loads(summary.read_text())
    return found if found.get("config_hash") == fingerprint else None


def _deepspeed_monitor(run: RunConfig, output: Path) -> Any:
    """DeepSpeed's own writers for the tensorboard, csv_monitor, wandb and comet sections, if one is enabled."""
    sections = ("tensorboard", "csv_monitor", "wandb", "comet")
    if not any(run.deepspeed.get(section, {}).get("enabled", False) for section in sections):
        return None
    from mpl_scale.engine.deepspeed_setup import monitor_master  # imports deepspeed: 4 s and more

    return monitor_master(run.deepspeed)
