"""From a configuration to what the planner plans: one job per phase, on the devices that --gpu names.

Imports what it needs when it is called: commands read this module before they know that they have something to do.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from mpl_scale.config import Batches, RunConfig
from mpl_scale.resolve import Resolved

if TYPE_CHECKING:
    from mpl_scale.models.kernels import Mode
    from mpl_scale.planner.job import Job, Machine
    from mpl_scale.planner.search import Plan

GIGA = 1e9


def make_jobs(run: RunConfig, batches: Batches, *, kernels: Mode) -> list[Job]:
    """The phases of a run. kernels: as resolved for the devices."""
    from mpl_scale.planner.job import Job
    from mpl_scale.trainer.phases import plan_phases

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
            kernels=kernels,
        )
        for phase in plan_phases(run.mpl, batches, max_steps=None)
    ]


def main_job(jobs: list[Job]) -> Job:
    """The phase that a plan is made for."""
    return next(job for job in jobs if job.name == "train")


def make_machine(gpu: str, *, calibration: str | None = None, per_node: int | None = None) -> Machine:
    """The devices that --gpu, --calibration and --nodes name. ValueError: an unknown device or an unreadable file."""
    from mpl_scale.planner.hardware import Reached, find_device, load_calibration
    from mpl_scale.planner.job import Machine

    device, reached = find_device(gpu, ranks_per_node=per_node), Reached()
    if device.cpu:  # no driver; Python and torch themselves
        reached = dataclasses.replace(reached, runtime=0.5 * GIGA, launch=5e-6)
    if calibration is not None:
        device, reached = load_calibration(calibration, device)
    return Machine(device, reached)


def configured_plan(job: Job, resolved: Resolved, *, world: int, machine: Machine) -> Plan:
    """The job as the configuration cuts it."""
    from mpl_scale.planner.search import as_configured

    return as_configured(job, resolved, world=world, machine=machine)


def less_memory(plan: Plan) -> Plan | None:
    """The fastest plan of the same ranks and engine that needs at most nine tenths of the memory; None: there is none.

    A run that is out of memory had less of it, or needed more, than was planned: what just fits on paper is no help.
    """
    from mpl_scale.planner.search import Found, search

    limit = 0.9 * min(plan.memory.total, plan.machine.device.memory)
    found = search(plan.job, plan.choice.world, plan.machine).plans
    smaller = [one for one in found if one.memory.total <= limit and one.choice.engine == plan.choice.engine]
    return next(iter(Found(smaller, {}).fitting), None)
