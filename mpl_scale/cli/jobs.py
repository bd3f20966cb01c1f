"""From a configuration to what the planner plans: one job per phase, on the devices that --gpu names."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from mpl_scale.config import Batches, RunConfig, check
from mpl_scale.config.checks import uses_flat_engine, zero_stage

if TYPE_CHECKING:
    from mpl_scale.planner.job import Job, Machine
    from mpl_scale.planner.search import Found, Plan

GIGA = 1e9


def make_jobs(run: RunConfig, batches: Batches, *, cuda: bool) -> list[Job]:
    """The phases of a run. cuda: whether batch norm's loops are compiled where the configuration leaves it open."""
    from mpl_scale.planner.job import Job
    from mpl_scale.trainer.phases import plan_phases

    kernels = run.mpl.parallel.kernels
    return [
        Job(
            name=phase.name,
            config=run.mpl,
            deepspeed=run.deepspeed,
            method=phase.method,
            settings=phase.settings,
            optim=phase.optim,
            labelled=phase.labelled,
            unlabelled=phase.unlabelled,
            steps=phase.steps,
            kernels=("compiled" if cuda else "eager") if kernels == "auto" else kernels,
        )
        for phase in plan_phases(run.mpl, batches, max_steps=None)
    ]


def main_job(jobs: list[Job]) -> Job:
    """The phase that a plan is made for."""
    return next(job for job in jobs if job.name == "train")


def make_machine(gpu: str, *, calibration: str | None = None, per_node: int | None = None) -> Machine:
    """The devices that --gpu, --calibration and --nodes mean."""
    from mpl_scale.planner.hardware import Reached, find_device, load_calibration
    from mpl_scale.planner.job import Machine

    device, reached = find_device(gpu, ranks_per_node=per_node), Reached()
    if device.cpu:  # no driver; Python and torch themselves
        reached = dataclasses.replace(reached, runtime=0.5 * GIGA, launch=5e-6)
    if calibration is not None:
        device, reached = load_calibration(calibration, device)
    return Machine(device, reached)


def configured_plan(job: Job, run: RunConfig, batches: Batches, *, world: int, machine: Machine) -> Plan:
    """The job as the configuration cuts it."""
    from mpl_scale.planner.search import as_configured

    flat = uses_flat_engine(run, cuda=not machine.device.cpu)
    return as_configured(job, world, machine, stage=zero_stage(run), flat=flat, parts=batches.micro_batches)


def refuse_misfits(
    run: RunConfig, batches: Batches, *, world: int, machine: Machine, search_for_better: bool = True
) -> list[str]:
    """Warnings where a phase fits only without allowances. search_for_better: name a plan that fits; takes longer.

    Raises:
        ValueError: a phase cannot fit; with its bytes and what would fit.
    """
    from mpl_scale.planner.reasons import misfit
    from mpl_scale.planner.search import search

    jobs, warnings = make_jobs(run, batches, cuda=not machine.device.cpu), []
    for job in jobs:
        plan = configured_plan(job, run, batches, world=world, machine=machine)
        sure = sum(size for name, size in plan.memory.categories.items() if name not in ("runtime", "fragmentation"))
        if sure > machine.device.memory:
            advice = "mpl-scale plan finds what would"
            if search_for_better:
                advice = what_would_fit(search(main_job(jobs), world, machine))
            raise ValueError(f"phase {job.name} cannot fit: {misfit(plan)}; {advice}")
        if not plan.fits:
            warnings.append(f"phase {job.name} may not fit: {misfit(plan)}, allowances included")
    return warnings


def check_this_gpu(run: RunConfig) -> list[str]:
    """`refuse_misfits` for this rank's GPU and the memory that it really has; nothing where there is none."""
    import torch

    from mpl_scale.mesh import adopt_slurm_environment, choose_device

    adopt_slurm_environment(os.environ)
    device = choose_device(os.environ)
    if device.type != "cuda":
        return []
    world = int(os.environ.get("WORLD_SIZE", "1"))
    real = torch.cuda.get_device_properties(device)
    machine = make_machine("h200")  # its rates are not asked for
    machine = dataclasses.replace(
        machine, device=dataclasses.replace(machine.device, name=real.name, memory=float(real.total_memory))
    )
    batches = check(run, world=world, cuda=True)
    try:
        return refuse_misfits(run, batches, world=world, machine=machine, search_for_better=False)
    except RuntimeError as error:  # a network whose operators cannot be traced may still train
        return [f"the memory of this run could not be planned: {error}"]


def what_would_fit(found: Found) -> str:
    """Advice: the fastest plan that fits, as settings; or how far the smallest is from it."""
    if found.fitting:
        best = found.fitting[0]
        return f"this would, {best.memory.total / GIGA:.1f} GB: {best.choice} (mpl-scale plan --output writes it)"
    smallest = found.smallest
    if smallest is None:
        return "; ".join(f"{name}: {why}" for name, why in found.refused.items())
    from mpl_scale.planner.reasons import misfit

    return (
        f"nothing does on {smallest.choice.world} ranks: {misfit(smallest, smallest=True)}; use more or larger devices"
    )
