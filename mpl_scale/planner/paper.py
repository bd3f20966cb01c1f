"""The operations of a job's step, and what the paper's own run must have reached (section 4)."""

from __future__ import annotations

from mpl_scale.planner.job import Choice, Job
from mpl_scale.planner.macs import StepImages, step_flops

CORES, CORES_PER_REPLICA, SECONDS = 2048, 16, 0.95
"""Section 4: 2,048 TPUv3 cores in replicas of 16; a million steps in about 11 days."""
PEAK = 123e12 / 2
"""Of a TPU v3 chip in bf16 (Google's figure), which has two cores."""


def step_operations(job: Job, choice: Choice) -> int:
    """Floating-point operations that a step asks for, over all ranks, recomputation and a deferred teacher left out."""
    macs = dict.fromkeys(("teacher", "student"), 0)
    if job.method.name == "pseudo_label":  # a teacher that labels and is not trained
        macs["teacher"] = job.trace("teacher", choice).macs
    for network in job.networks():
        macs[network] = job.trace(network, choice).macs
    images = StepImages.of(job.settings, method=job.method.name, labelled=job.labelled, unlabelled=job.unlabelled)
    return step_flops(images, teacher_macs=macs["teacher"], student_macs=macs["student"])


def readings(job: Job) -> list[str]:
    """Lines: the rate that each reading of "a batch size of ... images into each training step" asks of a core."""
    choice = Choice(CORES, 1, 0, 1, "flat", "none", False, job.labelled, 1)
    once, replicas = step_operations(job, choice), CORES // CORES_PER_REPLICA
    batch = f"{job.labelled:,} labelled + {job.unlabelled:,} unlabelled images"
    days = job.steps * SECONDS / 86400
    lines = [
        f"the paper (section 4): {CORES:,} TPUv3 cores in {replicas} replicas of {CORES_PER_REPLICA}, "
        f"{SECONDS} s a step, {job.steps:,} steps: {days:.1f} days, {CORES * 24 * days:,.0f} core-hours",
        f"a step of {job.method.name} on {batch}: {once / 1e15:.1f} PFLOP, recomputation left out",
    ]
    for name, times in (("over all replicas", 1), ("in each replica", replicas)):
        rate = times * once / CORES / SECONDS
        share = rate / PEAK
        verdict = "possible" if share < 1 else "impossible"
        lines.append(
            f"{batch} {name}: {times * (job.labelled + job.unlabelled) / SECONDS:,.0f} img/s, {rate / 1e12:.1f} "
            f"TFLOP/s a core, {share:.1%} of its peak of {PEAK / 1e12:.1f}: {verdict}"
        )
    return lines
