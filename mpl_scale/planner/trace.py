"""What one rank's pass through a network really does, by running its modules on the meta device: shapes, no memory.

The network is built, split and recomputed by the code of a run, for a rank of a mesh that nobody started: its groups
only count what they are asked to send. A dispatch mode sees every operator of a forward and a backward pass. One run
tells how costs grow with the batch, because the batch is a large prime: what the prime divides belongs to images, the
rest (weights, statistics) to the pass. Compiled loops of batch norm are counted as the single passes over memory that
they are.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig, ParallelConfig
from mpl_scale.engine.recompute import apply_recompute, find_stages
from mpl_scale.mesh import Mesh
from mpl_scale.models import Pass, build_model
from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.buffers import stateful_buffers
from mpl_scale.models.kernels import Mode
from mpl_scale.models.passes import within
from mpl_scale.planner.activations import to_compute_dtype
from mpl_scale.planner.macs import count_macs
from mpl_scale.planner.recorder import Direction, Line, MeteredGroup, Recorder, Sent, Work, metered_batch_norm
from mpl_scale.spatial import input_columns, parallelize
from mpl_scale.spatial.agreement import ShapeAgreement
from mpl_scale.spatial.switch import Switch

PRIME = 4099
"""Images of the traced batch (times the ranks that share them): no channel count is a multiple of it."""
STEM, HEAD = "stem", "head"


@dataclass(frozen=True)
class TraceKey:
    """Everything a trace depends on.

    distributed: whether batch norm has other ranks to ask. vectors: the network sees vectors of this length
    instead of images; 0: images. The rest as of the configuration.
    """

    network: NetworkConfig
    shared: ModelConfig
    width: int
    switch_at: str
    halo: str
    recompute: tuple[str, ...] | str
    kernels: Mode
    distributed: bool
    dtype: torch.dtype
    vectors: int = 0

    @staticmethod
    def of(
        network: NetworkConfig,
        shared: ModelConfig,
        parallel: ParallelConfig,
        *,
        kernels: Mode,
        world: int,
        dtype: torch.dtype,
        vectors: int = 0,
    ) -> TraceKey:
        """The key of a network in a configuration, without what costs nothing (the classifier's dropout, weights)."""
        plain = network.model_copy(update={"dropout": 0.0, "weights": None, "init": "default"})
        recompute = parallel.recompute
        return TraceKey(
            network=plain,
            shared=shared.model_copy(update={"teacher": plain, "student": plain}),
            width=parallel.width,
            switch_at=parallel.switch_at if parallel.width > 1 else "auto",
            halo=parallel.halo if parallel.width > 1 else "plain",
            recompute=recompute if isinstance(recompute, str) else tuple(recompute),
            kernels=kernels,
            distributed=world > 1,
            dtype=dtype,
            vectors=vectors,
        )

    @property
    def built_from(self) -> tuple[str, str, Mode, int]:
        """What the whole network depends on."""
        return self.network.model_dump_json(), self.shared.model_dump_json(), self.kernels, self.vectors

    def text(self) -> str:
        """The same string for the same costs."""
        fields = [self.network.model_dump_json(), self.shared.model_dump_json(exclude={"teacher", "student"})]
        split = (self.width, self.switch_at, self.halo)
        rest = (*split, self.recompute, self.kernels, self.distributed, self.dtype, self.vectors)
        return "|".join([*fields, *map(str, rest)])


@dataclass(frozen=True)
class NetworkTrace:
    """One network on one rank; Lines are over the images of its width group's batch.

    Attributes:
        parameters: elements.
        sizes: parameters by size: [elements, count].
        buffers: elements of batch norm's averages.
        macs: multiply-accumulates of a forward pass on one whole image.
        kept: bytes that a forward pass leaves for its backward pass, by stage.
        working: bytes that the backward pass needs beside them at its worst moment.
        forward, backward: work by kind of layer and arithmetic intensity; the backward includes what is recomputed.
        sent_forward, sent_backward: collectives.
        split: whether deep stages go over to whole images of fewer rows.
    """

    parameters: int
    sizes: tuple[tuple[int, int], ...]
    buffers: int
    macs: int
    kept: dict[str, Line]
    working: Line
    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    sent_forward: tuple[Sent, ...]
    sent_backward: tuple[Sent, ...]
    switched: bool

    def kept_bytes(self, images: float) -> float:
        """Bytes that a forward pass on this many images of the width group keeps."""
        return sum(line.at(images) for line in self.kept.values()) if images else 0.0

    def kept_whole(self, elements: int) -> int:
        """Elements of the parameters of up to `limit` elements each (what ZeRO-3 does not partition)."""
        return sum(size * count for size, count in self.sizes if size <= elements)


def trace_network(key: TraceKey) -> NetworkTrace:
    """Run one forward and backward pass on the meta device and note what it costs the busiest rank of a width group.

    Raises:
        ValueError: what building, splitting or recomputing the network refuses.
    """
    size, recorder = key.shared.image_size, Recorder(PRIME)
    plain, macs, world_group = _built(*key.built_from)
    world_group.recorder = recorder
    model = copy.deepcopy(plain)
    for layer in model.modules():
        if isinstance(layer, BatchNorm) and not key.distributed:
            layer.group = None
    model = parallelize(model, mesh=_mesh(key, recorder), image_size=size, switch_at=key.switch_at, halo=key.halo)  # type: ignore[arg-type]
    _trust_shapes(model)
    recompute = key.recompute if isinstance(key.recompute, str) else list(key.recompute)
    model = to_compute_dtype(apply_recompute(model, recompute), key.dtype)  # type: ignore[arg-type]
    batch = PRIME * key.width
    start, stop = input_columns(size, key.width)[_rank(key)]
    shape = (batch, key.vectors) if key.vectors else (batch, key.shared.in_chans, size, stop - start)
    images = torch.empty(shape, dtype=key.dtype, device="meta")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # the engines' gradients are there before
    present = (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), images)
    recorder.ignore([tensor for tensor in present if tensor is not None])
    if key.kernels == "compiled":
        metered_batch_norm(model, recorder)
    rows = torch.arange(batch, device="meta")
    number = torch.zeros((), dtype=torch.int64, device="meta")
    with recorder, _stages(model, recorder):
        with within(Pass(seed=0, stream=0, step=number, rows=rows), model):
            loss = model(images).float().sum()
        recorder.ignore([loss, rows, number])
        kept = recorder.live()
        recorder.direction = Direction.BACKWARD
        loss.backward()
    left = sum(kept.values(), Line())
    return NetworkTrace(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sizes=tuple(sorted(Counter(parameter.numel() for parameter in model.parameters()).items())),
        buffers=sum(buffer.numel() for buffer in stateful_buffers(model).values() if buffer.is_floating_point()),
        macs=macs,
        kept={stage: line.per(batch) for stage, line in kept.items()},
        working=(recorder.peak - left).per(batch),
        forward=recorder.work(Direction.FORWARD, batch),
        backward=recorder.work(Direction.BACKWARD, batch),
        sent_forward=recorder.sent(Direction.FORWARD, batch),
        sent_backward=recorder.sent(Direction.BACKWARD, batch),
        switched=_switched(model),
    )


@lru_cache(maxsize=2)
def _built(network: str, shared: str, kernels: Mode, vectors: int) -> tuple[nn.Module, int, MeteredGroup]:
    """A network to copy, its multiply-accumulates, and the group its batch norms ask."""
    group, common = MeteredGroup("world"), ModelConfig.model_validate_json(shared)
    model = build_model(
        NetworkConfig.model_validate_json(network),
        common,
        field="mpl_scale.model",
        seed=0,
        group=group,  # type: ignore[arg-type]
        device="meta",
        kernels=kernels,
    )
    if vectors:
        return model, count_macs(model, vectors, channels=0), group
    return model, count_macs(model, common.image_size, channels=common.in_chans), group


def _rank(key: TraceKey) -> int:
    """The busiest of a width group: uneven slices are wider in front, and the first rank has one neighbour only."""
    return min(1, key.width - 1)


def _mesh(key: TraceKey, recorder: Recorder) -> Mesh:
    """The place of that rank; nobody else is there."""
    rank = _rank(key)
    return Mesh(
        device=torch.device("meta"),
        rank=rank,
        world=key.width,
        data=1,
        width=key.width,
        data_index=0,
        width_index=rank,
        world_group=None,
        width_group=MeteredGroup("width", recorder) if key.width > 1 else None,  # type: ignore[arg-type]
        shard_group=None,
        replica_group=None,
        shard_size=1,
        shard_index=0,
    )


def _trust_shapes(model: nn.Module) -> None:
    """Remove the hooks that compare shapes with other ranks: a trace has no other ranks."""
    hooks = model._forward_pre_hooks
    for handle in [handle for handle, hook in hooks.items() if isinstance(hook, ShapeAgreement)]:
        del hooks[handle]


def _switched(model: nn.Module) -> bool:
    """Whether the model goes over to a batch split (spatial/switch.py)."""
    return any(isinstance(getattr(hook, "__self__", None), Switch) for hook in model._forward_hooks.values())


@contextmanager
def _stages(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which stage runs; what lies before the first block is the stem, behind the last one the head.

    A block that is recomputed runs without its hooks: backward work has no stage.
    """
    handles = []
    recorder.stage = STEM

    def hook(block: nn.Module, stage: str, last: bool) -> None:
        def enter(*_: object) -> None:
            recorder.stage = stage

        def leave(*_: object) -> None:
            recorder.stage = HEAD if last else stage

        handles.extend([block.register_forward_pre_hook(enter), block.register_forward_hook(leave)])

    listed = [(stage, block) for stage, blocks in find_stages(model).items() for block in blocks]
    for number, (stage, block) in enumerate(listed):
        hook(block, stage, number == len(listed) - 1)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
