"""Every way to cut a job over a number of ranks, what each costs, and which is the fastest of those that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from mpl_scale.config.checks import choose_engine
from mpl_scale.config.readers import FED_BACK
from mpl_scale.planner.duration import Duration, duration
from mpl_scale.planner.job import Choice, Engine, Job, Machine
from mpl_scale.planner.memory import Memory, memory
from mpl_scale.resolve import Resolved

WIDEST = 16
"""The paper's width; wider splits only where the configuration asks for one."""
POLICIES = ("none", "bn_act", "block")


@dataclass(frozen=True)
class Plan:
    """A choice with its memory and its time."""

    job: Job
    choice: Choice
    machine: Machine

    @cached_property
    def memory(self) -> Memory:
        """Bytes of a rank, by category."""
        return memory(self.job, self.choice, self.machine)

    @cached_property
    def duration(self) -> Duration:
        """Seconds of a step, by phase."""
        return duration(self.job, self.choice, self.machine)

    @property
    def fits(self) -> bool:
        """Whether the device has that much memory."""
        return self.memory.total <= self.machine.device.memory

    @property
    def images_per_second(self) -> float:
        """Labelled and unlabelled ones, each counted once, over all ranks."""
        return (self.job.labelled + self.job.unlabelled) / self.duration.total

    @property
    def days(self) -> float:
        """Days for all steps of the phase."""
        return self.job.steps * self.duration.total / 86400

    @property
    def device_hours(self) -> float:
        """Device-hours of the phase's steps, over all ranks."""
        return 24 * self.days * self.choice.world


@dataclass(frozen=True)
class Found:
    """plans: everything that could be estimated. refused: widths or policies that could not, with the reason."""

    plans: list[Plan]
    refused: dict[str, str]

    @cached_property
    def fitting(self) -> list[Plan]:
        """The plans that fit, the fastest first; of equals the simplest."""
        return sorted((plan for plan in self.plans if plan.fits), key=_order)

    @property
    def smallest(self) -> Plan | None:
        """The plan with the least memory; None: there is no plan."""
        return min(self.plans, key=lambda plan: plan.memory.total, default=None)


def _order(plan: Plan) -> tuple[float, ...]:
    """Sort key: time to three digits (the device's where the input decides), then simplicity, then memory."""
    choice = plan.choice
    policy = POLICIES.index(choice.recompute) if choice.recompute in POLICIES else len(POLICIES)
    times = (float(f"{seconds:.3g}") for seconds in (plan.duration.total, plan.duration.device))
    return (*times, choice.parts, policy, choice.width, choice.deferred, choice.stage, plan.memory.total)


def search(job: Job, world: int, machine: Machine) -> Found:
    """All plans for a number of ranks.

    A width, policy or batch that cannot be is refused with its reason, not passed over.
    """
    plans: list[Plan] = []
    refused: dict[str, str] = {}
    for width in widths(job, world):
        data = world // width
        if job.labelled % data:
            refused[f"width {width}"] = (
                f"train_batch_size {job.labelled} does not divide over {data} data ranks (= {world} ranks / {width})"
            )
            continue
        for recompute in policies(job):
            choices = list(_choices(job, world, width, recompute, machine))
            try:
                new = [Plan(job, choice, machine) for choice in choices]
                for plan in new:
                    _ = plan.memory
            except ValueError as error:
                name = f"width {width}" if recompute == "none" and width > 1 else f"recompute {recompute}"
                refused.setdefault(name, str(error))
                continue
            plans += new
    return Found(plans, refused)


def widths(job: Job, world: int) -> list[int]:
    """Powers of two up to the paper's, and the configuration's own, that divide the ranks."""
    limit = min(world, job.config.model.image_size)
    listed = {1 << k for k in range(WIDEST.bit_length())} | {job.config.parallel.width}
    return sorted(width for width in listed if width <= limit and world % width == 0)


def policies(job: Job) -> list[str | tuple[str, ...]]:
    """The uniform ones, and the configuration's own list for each stage."""
    own = job.config.parallel.recompute
    uniform: list[str | tuple[str, ...]] = ["none", "block"]
    if job.config.parallel.recompute_backend == "native":
        uniform.insert(1, "bn_act")
    return uniform if isinstance(own, str) else [*uniform, tuple(own)]


def _choices(job: Job, world: int, width: int, recompute: str | tuple[str, ...], machine: Machine) -> Iterator[Choice]:
    data = world // width
    share = job.labelled // data
    finetune = job.config.phases.finetune
    finetuned = (finetune.batch_size or job.labelled) if finetune.steps else job.labelled
    for parts in (count for count in range(1, share + 1) if share % count == 0):
        if finetuned % (data * parts):
            continue  # config/checks.py refuses it
        for deferred in (False, True) if job.method.name in FED_BACK else (False,):
            if parts > 1 and not deferred and job.method.name in FED_BACK:
                continue  # a live teacher keeps the graphs of all micro-batches: nothing is gained
            for stage, shards, engine in _sharding(job, world, machine):
                yield Choice(world, width, stage, shards, engine, recompute, deferred, share // parts, parts)


def _sharding(job: Job, world: int, machine: Machine) -> Iterator[tuple[int, int, Engine]]:
    """(stage, shard size, engine): nothing sharded, over a node, over all; weights too."""
    wanted, cuda = job.config.parallel.engine, not machine.device.cpu
    yield 0, world, choose_engine(wanted, stage=0, cuda=cuda)[0]
    if world == 1:
        return
    node, given = machine.device.per_node, job.config.parallel.shard_size
    sizes = {world, *(size for size in (node, given) if size and size < world and world % size == 0)}
    for size in sorted(sizes):
        yield 2, size, choose_engine(wanted, stage=2, cuda=cuda)[0]
    if wanted != "flat":
        yield 3, world, "deepspeed"


def as_configured(job: Job, resolved: Resolved, *, world: int, machine: Machine) -> Plan:
    """The plan that the configuration is.

    Args:
        job: a phase of it.
        resolved: it, on these ranks and devices.
        world: ranks.
        machine: the devices.
    """
    parallel, parts = job.config.parallel, resolved.micro_batches
    recompute = parallel.recompute if isinstance(parallel.recompute, str) else tuple(parallel.recompute)
    choice = Choice(
        world=world,
        width=parallel.width,
        stage=resolved.stage,
        shard_size=resolved.shard_size,
        engine=resolved.engine,
        recompute=recompute,
        deferred=resolved.deferred_teacher,
        labelled=job.labelled // (resolved.batches.data_ranks * parts),
        parts=parts,
    )
    return Plan(job, choice, machine)


def sweep(job: Job, worlds: Sequence[int], machine: Machine) -> dict[int, tuple[Plan | None, Plan | None]]:
    """For each number of ranks the fastest plan without a width partition and the fastest with one; None: none fits."""
    found = {}
    for world in worlds:
        fitting = search(job, world, machine).fitting
        whole = next((plan for plan in fitting if plan.choice.width == 1), None)
        found[world] = whole, next((plan for plan in fitting if plan.choice.width > 1), None)
    return found
