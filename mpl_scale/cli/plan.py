"""`mpl-scale plan`: what a run will cost on devices nobody has to own yet, the best way to cut it, and why."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_scale.cli.command import Command, add_config_options, load, positive
from mpl_scale.cli.fit import emulated_bf16, what_would_fit
from mpl_scale.config import Batches, RunConfig
from mpl_scale.files import refuse_output, refuse_run
from mpl_scale.trainer.planning import GIGA, main_job, make_jobs, make_machine

if TYPE_CHECKING:
    from mpl_scale.planner.job import Job, Machine
    from mpl_scale.planner.search import Plan


def _options(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    parser.add_argument("--gpus", type=positive, default=8, metavar="N", help="devices in all (default: 8)")
    parser.add_argument(
        "--gpu",
        default="h200",
        metavar="NAME|FILE.json",
        help="h200, h100-80, a100-80, a100-40, v100-16, cpu, or a JSON file of your own (docs/planner.md)",
    )
    parser.add_argument("--nodes", type=positive, metavar="M", help="nodes that they are in; default: of 8 devices")
    parser.add_argument("--calibration", metavar="FILE", help="measured rates, of python -m benchmarks.calibrate")
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="plans to print (default: 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the best plan as a ds_config")
    parser.add_argument(
        "--sweep",
        type=positive,
        nargs=2,
        metavar=("FROM", "TO"),
        help="instead: the best plan at FROM, 2 FROM ... TO devices, with and without a width partition",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="of --sweep: a PNG or SVG (needs matplotlib)")
    parser.add_argument("--paper", action="store_true", help="instead: what the paper's own run must have reached")


def _run(options: argparse.Namespace) -> int:
    if options.output is not None:
        refuse_output(options.output, folder=False)
        refuse_run(options.output)
    run = load(options)
    if options.plot is not None and options.sweep is None:
        raise ValueError(f"--plot {options.plot}: there is a plot of --sweep only; add --sweep FROM TO")
    if options.nodes is not None and options.gpus % options.nodes:
        raise ValueError(f"--nodes {options.nodes} does not divide --gpus {options.gpus}; use a divisor")
    cpu = options.gpu == "cpu"
    per_node = options.gpus // options.nodes if options.nodes else options.gpus if cpu else None
    machine = make_machine(options.gpu, calibration=options.calibration, per_node=per_node)
    job = job_of(run, machine)
    if options.paper:
        _print(_paper(job))
    elif options.sweep is not None:
        _sweep(job, machine, options)
    else:
        _plan(run, job, machine, options)
    return 0


def job_of(run: RunConfig, machine: Machine) -> Job:
    """What a run's main phase asks of devices of this kind.

    Raises:
        ValueError: a name of the configuration is not known, or its batch is none to divide.
    """
    # torch and timm: seconds
    from mpl_scale.resolve import choose_kernels
    from mpl_scale.trainer.preflight import check_names

    check_names(run)
    kernels, _ = choose_kernels(run.mpl.parallel, "cpu" if machine.device.cpu else "cuda")
    return main_job(make_jobs(run, _whole(run), kernels=kernels))


def _whole(run: RunConfig) -> Batches:
    """The batch over all ranks, before anybody has divided it."""
    total = run.deepspeed.get("train_batch_size")
    if not isinstance(total, int) or total < 1:
        raise ValueError(
            f"train_batch_size = {total!r}: a plan divides the whole batch; give the labelled images per step over all "
            "ranks, at least 1"
        )
    return Batches(
        labelled=total,
        unlabelled=total * run.mpl.data.unlabelled_ratio,
        labelled_per_rank=total,
        data_ranks=1,
        finetune=run.mpl.phases.finetune.batch_size or total,
        micro_batches=1,
    )


def _plan(run: RunConfig, job: Job, machine: Machine, options: argparse.Namespace) -> None:
    from mpl_scale.planner.reasons import reasons
    from mpl_scale.planner.search import search

    found = search(job, options.gpus, machine)
    if not found.fitting:
        raise ValueError(f"--gpus {options.gpus} --gpu {options.gpu}: {what_would_fit(found)}")
    best = found.fitting[0]
    _print(emulated_bf16(machine, bf16=job.dtype.itemsize == 2))
    _print([_headline(run, job, machine, options.gpus), "", *_table(found.fitting[: options.top]), ""])
    _print([*bytes_of(best), "", *_milliseconds(best), ""])
    _print(["why:", *(f"  {line}" for line in reasons(best, found)), ""])
    _print([_length(best)])
    if options.output is not None:
        write_config(run, best, options.output)
        where = " --device cpu" if machine.device.cpu else f" --gpu {options.gpu}"
        _print(
            [f"written: {options.output}; mpl-scale check --ds_config {options.output} --world {options.gpus}{where}"]
        )


def _headline(run: RunConfig, job: Job, machine: Machine, ranks: int) -> str:
    nodes = -(-ranks // machine.device.per_node)
    size, model = job.config.model.image_size, job.config.model
    return (
        f"{run.path.name}: {job.method.name}, {model.teacher.name} teaches {model.student.name} at {size}x{size}, "
        f"{job.labelled} labelled + {job.unlabelled} unlabelled images a step, on {ranks} x {machine.device.name} "
        f"({nodes} {'node' if nodes == 1 else 'nodes'}); rates: {machine.reached.source}"
    )


def _table(plans: list[Plan]) -> list[str]:
    lines = [f"{'':>2} {'ms a step':>10} {'img/s':>9} {'GB a rank':>9} {'MFU':>6}  plan"]
    for number, plan in enumerate(plans, 1):
        lines.append(
            f"{number:>2} {1e3 * plan.duration.total:>10.1f} {plan.images_per_second:>9.1f} "
            f"{plan.memory.total / GIGA:>9.2f} {_mfu(plan):>6}  {plan.choice}"
        )
    return lines


def _mfu(plan: Plan) -> str:
    from mpl_scale.planner.paper import step_operations

    rate = step_operations(plan.job, plan.choice) / plan.choice.world / plan.duration.total
    return f"{100 * rate / plan.machine.device.peak:.1f}%"


def bytes_of(plan: Plan) -> list[str]:
    """Lines: a rank's bytes by category, the activations by stage."""
    lines = [f"GB a rank, of {plan.machine.device.memory / GIGA:.1f}:"]
    lines += [f"  {name.replace('_', ' '):<16} {size / GIGA:>9.3f}" for name, size in plan.memory.categories.items()]
    lines.append(f"  {'total':<16} {plan.memory.total / GIGA:>9.3f}")
    for network, stages in plan.memory.stages.items():
        shown = ", ".join(f"{stage} {size / GIGA:.3f}" for stage, size in stages.items())
        lines.append(f"  activations of the {network} by stage: {shown}")
    return lines


def _milliseconds(plan: Plan) -> list[str]:
    from mpl_scale.planner.duration import CAUSES

    used = [cause for cause in CAUSES if any(cause in row for row in plan.duration.seconds.values())]
    lines = ["ms a step:", f"  {'':<16} {''.join(f'{cause:>12}' for cause in used)}{'all':>12}"]
    for phase, row in plan.duration.seconds.items():
        cells = "".join(f"{1e3 * row.get(cause, 0.0):>12.2f}" for cause in used)
        lines.append(f"  {phase:<16} {cells}{1e3 * sum(row.values()):>12.2f}")
    verdict = "hidden behind it" if plan.duration.input <= plan.duration.device else "the device waits for it"
    lines.append(f"  input: {1e3 * plan.duration.input:.2f} on the host beside the device, {verdict}")
    return lines


def _length(plan: Plan) -> str:
    return (
        f"run: {plan.job.steps:,} steps of phase {plan.job.name} take {plan.days:.2f} days, "
        f"{plan.device_hours:,.0f} device-hours"
    )


def _sweep(job: Job, machine: Machine, options: argparse.Namespace) -> None:
    from mpl_scale.planner.search import sweep

    first, last = options.sweep
    if last < first:
        raise ValueError(f"--sweep {first} {last}: runs upwards; give the smaller number first")
    worlds = [first << k for k in range((last // first).bit_length())]
    found = sweep(job, worlds, machine)
    from mpl_scale.planner.scaling import lines, plot

    _print(lines(found))
    if options.plot is not None:
        plot(found, options.plot, title=f"{job.config.model.student.name} at {job.config.model.image_size} pixels")
        _print([f"written: {options.plot}"])


def _paper(job: Job) -> list[str]:
    from mpl_scale.planner.paper import readings

    return readings(job)


def write_config(run: RunConfig, plan: Plan, path: Path) -> None:
    """The whole configuration with the plan's settings in place.

    Raises:
        OSError: it cannot be written.
    """
    raw = copy.deepcopy(run.resolved())
    for name, value in plan.choice.settings().items():
        *sections, field = name.split(".")
        section = raw
        for key in sections:
            section = section.setdefault(key, {})
        section[field] = value
    path.write_text(json.dumps(raw, indent=2) + "\n")


def _print(lines: list[str]) -> None:
    if lines:
        print("\n".join(lines), file=sys.stdout, flush=True)


PLAN = Command(
    name="plan",
    help="bytes per rank, milliseconds per phase and days of a run on given devices; the best way to cut it, and why",
    examples=(
        "mpl-scale plan --ds_config ds_configs/l2.json --gpus 128 --gpu h200 --output my.json",
        "mpl-scale plan --ds_config ds_configs/imagenet10_resnet50.json --gpus 8 --gpu a100-40",
        "mpl-scale plan --ds_config ds_configs/l2.json --gpu h100-80 --sweep 8 4096 --plot sweep.svg",
        "mpl-scale plan --ds_config ds_configs/l2.json --paper",
    ),
    options=_options,
    run=_run,
)
