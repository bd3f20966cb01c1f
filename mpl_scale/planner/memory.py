"""Bytes of one rank by category, at the worst moment of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mpl_scale.config.readers import FED_BACK
from mpl_scale.config.schema import Config
from mpl_scale.data.decode.views import weak_view
from mpl_scale.data.formats.synthetic import PARTS
from mpl_scale.data.resident import stored_bytes, stored_view
from mpl_scale.data.resident_parts import SMALL
from mpl_scale.data.vectors import LENGTHS, input_shape
from mpl_scale.planner.job import Choice, Job, Machine, NetworkPass
from mpl_scale.planner.static import FP32, EngineSettings, TrainedNetwork, static_bytes

# DeepSpeed's own defaults (docs: zero_optimization), where a configuration says nothing.
REDUCE_BUCKET, MAX_LIVE, PERSISTENCE = 500_000_000, 1_000_000_000, 100_000
_BATCHES = 3
"""Batches on the device: the slots that the step reads, what was copied to them, and what the prefetcher has ready."""
IMAGES = {"digits": 1_797, "cifar10": 60_000, "cifar100": 60_000, "svhn": 630_420, "stl10": 113_000}
"""Images of a source, test part included."""


@dataclass(frozen=True)
class Memory:
    """categories: bytes, in the order they are printed. stages: of the activations, by network."""

    categories: dict[str, float]
    stages: dict[str, dict[str, float]]

    @property
    def total(self) -> float:
        """Bytes of the rank, all categories together."""
        return sum(self.categories.values())

    @property
    def static(self) -> float:
        """Bytes that the networks' engines hold whatever the batch."""
        return sum(self.categories[name] for name in STATIC if name in self.categories)


STATIC = (
    "weights",
    "buffers",
    "master",
    "optimizer",
    "gradients",
    "kept_gradients",
    "communication",
    "clipping",
    "accumulation",
    "ema",
    "skip",
    "loss_buffers",
)
"""Categories of network_state, and the training loss's buffers."""


def memory(job: Job, choice: Choice, machine: Machine) -> Memory:
    """What a rank holds.

    Raises:
        ValueError: the networks cannot be cut that way.
    """
    found = dict.fromkeys(STATIC, 0.0)
    for network in job.networks():
        for name, size in network_state(job, choice, network).items():
            found[name] += size
    found["loss_buffers"] = loss_buffers(job)
    found = {name: size for name, size in found.items() if size}
    found |= _transient(job, choice)
    activations, stages = _activations(job, choice)
    found |= activations
    found["images"] = _images(job, choice)
    if resident := resident_bytes(job.config):
        found["resident"] = resident
    reached = machine.reached
    per_step = sum(found[name] for name in ("activations", "working", "images", "gathered") if name in found)
    found["fragmentation"] = reached.fragmentation * per_step
    found["runtime"] = reached.runtime
    return Memory(found, stages)


def loss_buffers(job: Job) -> float:
    """Bytes that the training loss keeps from step to step, twice where a step can be taken back.

    A status of every unlabelled image is counted where the size of the source is known.
    """
    if (loss := job.training_loss) is None:
        return 0.0
    with torch.device("meta"):
        kept = loss.buffers(classes=job.config.model.num_classes, images=IMAGES.get(job.config.data.source, 0))
    copies = 2 if job.config.guard.nonfinite == "skip" else 1
    return float(copies * sum(buffer.nbytes for buffer in kept.values()))


def resident_bytes(config: Config) -> float:
    """Most bytes of the images that stay decoded: of a source whose size is known, or all that the setting allows."""
    data, size = config.data, config.model.image_size
    if data.resident == "off" or data.source in LENGTHS or (data.resident == "auto" and size > SMALL):
        return 0.0
    view = weak_view(data.weak, size)
    if stored_view(view) is None:
        return 0.0
    images = None if data.is_apart else IMAGES.get(data.source)
    if data.is_synthetic:
        images = PARTS * data.synthetic_images
    return float(
        min(
            data.resident_bytes,
            math.inf if images is None else stored_bytes(view, images, channels=data.decoded_channels),
        )
    )


def network_state(job: Job, choice: Choice, network: str) -> dict[str, int]:
    """Static bytes of one network by category: static.py's table, and the copies that guard.nonfinite = skip keeps."""
    trace = job.trace(network, choice)  # type: ignore[arg-type]
    zero = job.deepspeed.get("zero_optimization", {})
    optim = job.optim.teacher if network == "teacher" else job.optim.student
    feeds_back = job.method.name in FED_BACK and network == "student"
    threshold = zero.get("stage3_param_persistence_threshold", zero.get("param_persistence_threshold", PERSISTENCE))
    trained = TrainedNetwork(
        parameters=trace.parameters,
        buffers=trace.buffers,
        dtype=job.dtype,
        optimizer=optim.name,
        ema=network == "student" and job.settings.ema_decay > 0,
        kept_gradients=2 if feeds_back else 1,
        persistent=trace.kept_whole(_number(threshold, PERSISTENCE)) if choice.stage == 3 else 0,
    )
    engine = EngineSettings(
        choice.engine,
        stage=choice.stage,
        shard_size=choice.shard_size,
        clipping=job.deepspeed.get("gradient_clipping", 0.0) > 0,
        accumulation=choice.parts > 1,
        reduce_bucket=_number(zero.get("reduce_bucket_size"), REDUCE_BUCKET),
    )
    found = static_bytes(trained, engine)
    if job.config.guard.nonfinite == "skip":
        master = FP32 * -(-trace.parameters // (choice.shard_size if choice.stage else 1))
        found["skip"] = master + found["optimizer"] + found["buffers"] + found["ema"]
    return found


def _number(given: object, default: int) -> int:
    return int(given) if isinstance(given, int | float) else default


def _transient(job: Job, choice: Choice) -> dict[str, float]:
    """What DeepSpeed allocates while a pass runs: gradient buckets, at stage 3 the gathered weights."""
    if choice.engine != "deepspeed" or choice.stage == 0 or choice.shards == 1:
        return {}
    zero = job.deepspeed.get("zero_optimization", {})
    largest = max(job.trace(network, choice).parameters for network in job.networks())
    limit = MAX_LIVE if choice.stage == 3 else REDUCE_BUCKET
    name = "stage3_max_live_parameters" if choice.stage == 3 else "reduce_bucket_size"
    return {"gathered": float(min(largest, _number(zero.get(name), limit)) * job.dtype.itemsize)}


def _activations(job: Job, choice: Choice) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Kept and working bytes at the moment when they are most, and the kept ones by stage.

    A live teacher keeps the graphs of all micro-batches while the student learns; a deferred one has its own turn.
    """
    passes = [one for one in job.passes(choice) if one.graph or one.backward]
    live = job.method.name in FED_BACK and not choice.deferred
    held = _kept(job, choice, next((one for one in passes if one.network == "teacher"), None)) * choice.parts
    worst, stages = (0.0, 0.0), {}
    for one in passes:
        if not one.backward:
            continue
        kept = held if live else 0.0
        if not (live and one.network == "teacher"):
            kept += _kept(job, choice, one)
        working = max(job.trace(one.network, choice).working.at(one.images), 0.0)
        if kept + working > sum(worst):
            worst, stages = (kept, working), _stages(job, choice, one)
            if live:
                stages |= _stages(job, choice, next(p for p in passes if p.network == "teacher"), times=choice.parts)
    return {"activations": worst[0], "working": worst[1]}, stages


def _kept(job: Job, choice: Choice, one: NetworkPass | None) -> float:
    return 0.0 if one is None else job.trace(one.network, choice).kept_bytes(one.images)


def _stages(job: Job, choice: Choice, one: NetworkPass, *, times: int = 1) -> dict[str, dict[str, float]]:
    trace = job.trace(one.network, choice)
    return {one.network: {stage: times * line.at(one.images) for stage, line in trace.kept.items()}}


def _images(job: Job, choice: Choice) -> float:
    """Batches of pixels, and of the largest moment's passes what the networks are given: fp32, and in their dtype."""
    labelled, unlabelled = job.images(choice)
    batches = _BATCHES * choice.parts * (labelled + 2 * unlabelled)
    given = {"teacher": 0, "student": 0}
    for one in job.passes(choice):
        if one.network == "student" or job.teacher_sees_images:
            given[one.network] = max(given[one.network], one.images)
    live = job.method.name in FED_BACK and not choice.deferred
    shown = given["teacher"] * choice.parts + given["student"] if live else max(given.values())
    numbers = math.prod(input_shape(job.config)) / choice.width
    vectors = job.config.data.source in LENGTHS
    pixel = FP32 if vectors else job.config.data.decoded_channels / job.config.model.in_chans  # grey is 3 until then
    return numbers * (batches * pixel + shown * (FP32 + job.dtype.itemsize))
