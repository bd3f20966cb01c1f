"""Refuse a configuration that cannot fit its devices, and say what would."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from mpl_scale.config import RunConfig
from mpl_scale.resolve import Resolved, resolve
from mpl_scale.trainer.planning import GIGA, configured_plan, main_job, make_jobs, make_machine

if TYPE_CHECKING:
    from mpl_scale.planner.job import Machine
    from mpl_scale.planner.search import Found


def refuse_misfits(
    run: RunConfig, resolved: Resolved, *, world: int, machine: Machine, search_for_better: bool = True
) -> list[str]:
    """Warnings where a phase fits only without allowances. search_for_better: name a plan that fits; takes longer.

    Raises:
        ValueError: a phase cannot fit; with its bytes and what would fit.
    """
    from mpl_scale.planner.reasons import misfit
    from mpl_scale.planner.search import search

    jobs, warnings = make_jobs(run, resolved.batches, kernels=resolved.kernels), []
    for job in jobs:
        plan = configured_plan(job, resolved, world=world, machine=machine)
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
    resolved = resolve(run, world=world, device=device.type)
    try:
        return refuse_misfits(run, resolved, world=world, machine=machine, search_for_better=False)
    except RuntimeError as error:  # a network whose operators cannot be traced may still train
        return [f"the memory of this run could not be planned: {error}"]


def emulated_bf16(machine: Machine, *, bf16: bool) -> list[str]:
    """A warning where a device has no units for what is asked of it; no line elsewhere."""
    if machine.device.bf16 or not bf16:
        return []
    return [f"warning: {machine.device.name} has no bf16 units: these are its fp16 figures, bf16 is far slower"]


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
