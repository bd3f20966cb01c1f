"""Seconds of one step by phase and cause: a roofline per kind of layer, collectives by latency and bytes, the input.

Nothing overlaps but the input: the flat engine reduces after its backward pass, and halos wait for their neighbours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mpl_scale.data.vectors import LENGTHS, input_shape
from mpl_scale.engine.graph import why_not_captured
from mpl_scale.optim import OPTIMIZERS
from mpl_scale.planner.job import Choice, Job, Machine
from mpl_scale.planner.recorder import Sent, Work
from mpl_scale.planner.static import FP32

CAUSES = ("compute", "launches", "halo", "pools", "statistics", "zero")
"""Of a phase's time: kernels; waiting for Python to start them; the width group's exchanges, and its sums (pools,
gates); batch norm's all-reduces; gradients and weights."""
RAW = {"arrays", "cifar10", "cifar100", "idx", "stl10", "svhn", "synthetic"}
"""Sources whose images are not compressed."""


@dataclass(frozen=True)
class Duration:
    """seconds[phase][cause] of the device; input: seconds that the host needs for a batch, beside the device."""

    seconds: dict[str, dict[str, float]]
    input: float

    @property
    def total(self) -> float:
        """Seconds of a step: the input is made ahead, so the slower of device and input decides."""
        return max(self.device, self.input)

    @property
    def device(self) -> float:
        """Milliseconds of device time alone."""
        return sum(sum(causes.values()) for causes in self.seconds.values())

    def by_cause(self) -> dict[str, float]:
        """Over all phases; "input": how much longer than the device it takes."""
        found: dict[str, float] = defaultdict(float)
        for causes in self.seconds.values():
            for cause, seconds in causes.items():
                found[cause] += seconds
        return {**found, "input": max(self.input - self.device, 0.0)}


def duration(job: Job, choice: Choice, machine: Machine) -> Duration:
    """The time of one step.

    Raises:
        ValueError: the networks cannot be cut that way.
    """
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    graph = _replayed(job, choice, machine)
    for one in job.passes(choice):
        trace, phase = job.trace(one.network, choice), found[one.phase]
        for times, work, sent in (
            (one.forward, trace.forward, trace.sent_forward),
            (one.backward, trace.backward, trace.sent_backward),
        ):
            if not times * one.images:
                continue
            compute = kernels(work, one.images, machine, fp32=job.dtype.itemsize == FP32)
            phase["compute"] += choice.parts * times * compute
            if not graph:
                starts = sum(item.calls for item in work) * machine.reached.launch
                phase["launches"] += choice.parts * times * max(starts - compute, 0.0)
            for cause, seconds in _sent(sent, one.images, choice, machine).items():
                phase[cause] += choice.parts * times * seconds
        if one.backward:
            phase["zero"] += _reductions(trace.parameters, job, choice, machine)
        if one.backward and one.phase != "feedback":
            phase["zero"] += _gather(trace.parameters, job, choice, machine)
            found["optimiser"]["compute"] += _update(trace.parameters, job, choice, machine, network=one.network)
    labelled, unlabelled = job.images(choice)
    images = (labelled + unlabelled) * choice.parts / choice.width
    reached, data = machine.reached, job.config.data
    of_rgb = job.config.data.decoded_channels / 3 / job.config.model.in_chans
    seen = reached.view * of_rgb * math.prod(input_shape(job.config))
    one_image = seen + (0.0 if not data.is_apart and data.source in RAW | LENGTHS.keys() else reached.decode)
    phases = {name: dict(causes) for name, causes in found.items()}
    return Duration(phases, images * one_image / machine.device.cores)


def _replayed(job: Job, choice: Choice, machine: Machine) -> bool:
    """Whether the step would be a CUDA graph; `required` is for the run to refuse, not for a plan."""
    parallel = job.config.parallel
    reason = why_not_captured(
        graph="off" if parallel.graph == "off" else "auto",
        device=torch.device("cpu" if machine.device.cpu else "cuda"),
        flat_engine=choice.engine == "flat",
        recompute_backend=parallel.recompute_backend,
    )
    return reason is None


def kernels(work: Iterable[Work], images: float, machine: Machine, *, fp32: bool) -> float:
    """Roofline: each kind and intensity takes its arithmetic or its traffic, whichever is slower."""
    device, reached = machine.device, machine.reached
    peak = device.peak * (device.fp32 if fp32 else 1.0)
    total = 0.0
    for item in work:
        arithmetic = 2 * item.macs.at(images) / (peak * reached.arithmetic[item.kind])
        traffic = item.bytes.at(images) / (device.bandwidth * reached.traffic[item.kind])
        total += max(arithmetic, traffic)
    return total


def collective(operation: str, size: float, *, ranks: int, spread: int, machine: Machine) -> float:
    """Seconds of one collective that gives `size` bytes per rank.

    Args:
        operation: all_reduce, reduce_scatter, all_gather (size: of the whole), all_to_all.
        size: bytes.
        ranks: of the group.
        spread: consecutive global ranks that the group lies in: beyond a node's, it goes over the network.
        machine: the devices.
    """
    if ranks == 1:
        return 0.0
    device, reached = machine.device, machine.reached
    nodes = math.ceil(spread / device.per_node)
    inside = math.ceil(ranks / nodes)  # a strided group has fewer ranks in a node than the node has
    latency = reached.link_latency * math.log2(inside) if inside > 1 else 0.0
    rate = device.link * reached.link
    if nodes > 1:
        latency += reached.network_latency * math.log2(nodes)
        lanes = 1 if operation == "all_to_all" else inside  # a ring or tree uses every adapter of a node
        rate = min(rate, device.network * reached.network * lanes)
    share = 1.0 if operation == "all_to_all" else (ranks - 1) / ranks * (2 if operation == "all_reduce" else 1)
    return latency + share * size / rate


def _sent(sent: Iterable[Sent], images: float, choice: Choice, machine: Machine) -> dict[str, float]:
    """Seconds that a pass spends sending, by cause."""
    found: dict[str, float] = defaultdict(float)
    for item in sent:
        ranks = choice.world if item.group == "world" else choice.width
        size = item.bytes.at(images) / item.calls
        cause = "statistics" if item.group == "world" else "halo" if item.operation == "all_to_all" else "pools"
        found[cause] += item.calls * collective(item.operation, size, ranks=ranks, spread=ranks, machine=machine)
    return found


def _reductions(parameters: int, job: Job, choice: Choice, machine: Machine) -> float:
    """Seconds of reducing the gradient: after every micro-batch if it is accumulated in fp32, or at stage 3."""
    size = parameters * job.dtype.itemsize
    narrow = job.dtype.itemsize < FP32
    times = choice.parts if narrow or choice.stage == 3 or choice.engine == "deepspeed" else 1
    shards, world = choice.shards, choice.world
    once = collective("reduce_scatter", size, ranks=shards, spread=shards, machine=machine)
    once += collective("all_reduce", size / shards, ranks=world // shards, spread=world, machine=machine)
    return times * once


def _gather(parameters: int, job: Job, choice: Choice, machine: Machine) -> float:
    """Seconds of gathering the weights: after the update; at stage 3 before every forward and backward pass."""
    times = 2 * choice.parts if choice.stage == 3 else 1
    size = parameters * job.dtype.itemsize
    return times * collective("all_gather", size, ranks=choice.shards, spread=choice.shards, machine=machine)


def _update(parameters: int, job: Job, choice: Choice, machine: Machine, *, network: str) -> float:
    """Read and write master and optimiser state, read the gradient, write weights; the average likewise."""
    optim = job.optim.teacher if network == "teacher" else job.optim.student
    states = len(OPTIMIZERS[optim.name].state_names)
    shard = parameters / choice.shards
    traffic = shard * FP32 * (2 * (1 + states) + 1) + parameters * job.dtype.itemsize
    if network == "student" and job.settings.ema_decay > 0:
        traffic += shard * FP32 * 3
    return traffic / (machine.device.bandwidth * machine.reached.traffic["elementwise"])
