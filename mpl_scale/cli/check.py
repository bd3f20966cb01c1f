"""`mpl-scale check`: validate a configuration and say what it costs, without its data, a GPU, or other ranks.

Both networks are built at full size on the meta device, split and recomputed as the config says, which finds what no
schema can: an image size a network cannot take, a width it cannot be split by, stages that have no policy. With --gpu,
a run that cannot fit is refused, with what would.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mpl_scale.cli.command import Command, add_config_options, load, positive
from mpl_scale.cli.fit import emulated_bf16, refuse_misfits
from mpl_scale.config import RunConfig
from mpl_scale.config.needs import needed_packages
from mpl_scale.packages import missing_packages
from mpl_scale.resolve import Resolved, resolve
from mpl_scale.trainer.planning import GIGA, configured_plan, main_job, make_jobs, make_machine

if TYPE_CHECKING:
    from mpl_scale.planner.job import Job, Machine
    from mpl_scale.planner.search import Plan


COUNTED = (
    "state: weights, masters, optimisers, gradients, averages (shards); activations: kept at the worst moment; "
    "working: what a backward pass needs beside them; resident: images kept decoded, at most; "
    "allowances: driver, libraries, fragmentation"
)


def _options(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    parser.add_argument("--world", type=positive, default=1, metavar="N", help="number of ranks")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="what the ranks will compute on (default: cuda; none is needed here): it decides what each auto means",
    )
    parser.add_argument("--gpu", metavar="NAME|FILE.json", help="as of mpl-scale plan: refuse what cannot fit on it")
    parser.add_argument("--calibration", metavar="FILE", help="as of mpl-scale plan")


def _run(options: argparse.Namespace) -> int:
    run, cuda = load(options), options.device == "cuda" and options.gpu != "cpu"
    for line in report(run, world=options.world, cuda=cuda, gpu=options.gpu, calibration=options.calibration):
        print(line, flush=True)
    return 0


def report(
    run: RunConfig, *, world: int, cuda: bool, gpu: str | None = None, calibration: str | None = None
) -> list[str]:
    """Check everything that needs no data, then say in lines: batch equation, settings, networks, memory by phase.

    Args:
        run: as loaded.
        world: ranks.
        cuda: whether they compute on GPUs.
        gpu: the device, as of --gpu: milliseconds too, and what cannot fit is refused; None: bytes alone.
        calibration: a file of measured rates.

    Raises:
        ValueError: names the field, the value and the fix.
    """
    resolved = resolve(run, world=world, device="cuda" if cuda else "cpu")
    # timm: seconds, once the config is known to be good
    from mpl_scale.trainer.preflight import check_models, check_names, network_notes

    check_names(run)
    check_models(run)
    per_node = world if gpu == "cpu" else None
    machine = make_machine(gpu or ("h200" if cuda else "cpu"), calibration=calibration, per_node=per_node)
    jobs = make_jobs(run, resolved.batches, kernels=resolved.kernels)
    plans = {job.name: configured_plan(job, resolved, world=world, machine=machine) for job in jobs}
    lines = [
        resolved.batches.equation(),
        f"{world} ranks = data {resolved.batches.data_ranks} x width {run.mpl.parallel.width}; on {resolved.device}:",
        *resolved.table(),
        *(f"warning: {warning}" for warning in resolved.warnings),
        *network_notes(run),
        *(f"warning: {line}" for line in missing_packages(needed_packages(run, engine=resolved.engine))),
        *_networks(run, plans["train"]),
        *(_memory(job, plans[job.name]) for job in jobs),
        COUNTED,
    ]
    if gpu is not None:
        lines += _verdict(run, resolved, plans, world=world, machine=machine, main=main_job(jobs).name)
    return lines


def _networks(run: RunConfig, plan: Plan) -> list[str]:
    """One line each: what a network is, and what its rank keeps of an image."""
    from mpl_scale.data.vectors import input_shape

    shape, lines = input_shape(run.mpl), []
    seen = f"a vector of {shape[0]}" if len(shape) == 1 else f"an image of {shape[1]}x{shape[2]}"
    for name in ("teacher", "student"):
        trace = plan.job.trace(name, plan.choice)
        lines.append(
            f"{name}: {getattr(run.mpl.model, name).name}, {trace.parameters / 1e6:.1f} M parameters, "
            f"{trace.macs / GIGA:.3g} GMAC {seen}, {trace.kept_bytes(1) / 1e6:.1f} MB of activations"
            f"{' a rank' if plan.choice.width > 1 else ''}"
        )
    return lines


def _memory(job: Job, plan: Plan) -> str:
    """One line: what a phase keeps on each rank."""
    labelled, unlabelled = job.images(plan.choice)
    shown = {name: size / GIGA for name, size in plan.memory.categories.items()}
    state = plan.memory.static / GIGA
    rest = " + ".join(
        f"{name} {shown[name]:.2f}"
        for name in ("gathered", "activations", "working", "images", "resident")
        if name in shown
    )
    return (
        f"phase {job.name} ({job.method.name}, {job.steps} steps, {labelled} labelled + {unlabelled} unlabelled "
        f"images a micro-batch): {plan.memory.total / GIGA:.2f} GB per rank = state {state:.2f} + {rest} + allowances "
        f"{shown['fragmentation'] + shown['runtime']:.2f}"
    )


def _verdict(
    run: RunConfig, resolved: Resolved, plans: dict[str, Plan], *, world: int, machine: Machine, main: str
) -> list[str]:
    """What --gpu adds. ValueError: something cannot fit."""
    warnings = refuse_misfits(run, resolved, world=world, machine=machine)
    plan = plans[main]
    return [
        *(f"warning: {warning}" for warning in warnings),
        *emulated_bf16(machine, bf16=resolved.bf16),
        f"{machine.device.name} has {machine.device.memory / GIGA:.0f} GB; phase {main}: "
        f"{1e3 * plan.duration.total:.1f} ms a step, {plan.images_per_second:.1f} img/s, {plan.days:.2f} days "
        f"(rates: {machine.reached.source}); mpl-scale plan looks for better",
    ]


CHECK = Command(
    name="check",
    help="validate a ds_config, print its batch equation and what it costs; needs neither data nor GPU",
    examples=(
        "mpl-scale check --ds_config ds_configs/digits.json --world 2",
        "mpl-scale check --ds_config ds_configs/l2.json --world 2048",
        "mpl-scale check --ds_config ds_configs/l2_8gpu.json --world 8 --gpu h200",
    ),
    options=_options,
    run=_run,
)
