"""A network under DeepSpeed's ZeRO 0-3: eager, with offload and the rest of a ds_config.

Teacher and student each have an engine of their own in one process. DeepSpeed knows one kind of step: backward, then
an update. Meta Pseudo Labels needs the reduced gradient itself, for the feedback, and needs to drop one without a
trace; deepspeed_shards.py reaches into DeepSpeed for that. Pinned to DeepSpeed 0.19.8: tests/test_deepspeed_engine.py
compares every stage with plain PyTorch and is the first thing to run with another release.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mpl_scale.config.deepspeed_half import refuse_combinations
from mpl_scale.config.schema import OptimConfig
from mpl_scale.engine.deepspeed_setup import connect, engine_config
from mpl_scale.engine.deepspeed_shards import open_shards
from mpl_scale.mesh import Mesh, process_group
from mpl_scale.models.buffers import cast_constants
from mpl_scale.models.passes import Pass, within
from mpl_scale.mpl.network import GradientShard
from mpl_scale.optim import build_optimizer, parameter_groups
from mpl_scale.types import Slice

logger = logging.getLogger(__name__)


class DeepSpeedNetwork:
    """Implements mpl_scale.mpl.Network; see there for the contract of each method.

    Args:
        module: in fp32, on the mesh's device; rank 0's parameters and buffers are given to all ranks.
        optim: optimiser and which parameters weight decay covers.
        ds_config: the DeepSpeed half of the config. Batch sizes are the caller's, who calls `accumulate`
            gradient_accumulation_steps times; monitors, optimizer and scheduler are left to the trainer.
        mesh: shard group (ZeRO's data-parallel group) and replica group.

    Raises:
        ValueError: a setting that DeepSpeed would ignore, fail on late, or get wrong here.
    """

    def __init__(self, module: nn.Module, *, optim: OptimConfig, ds_config: Mapping[str, Any], mesh: Mesh) -> None:
        config = engine_config(ds_config)
        refuse_combinations(config, shard_size=mesh.shard_size, world=mesh.world)
        for name, parameter in module.named_parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(f"parameter {name} is {parameter.dtype}; build the module in fp32 and enable bf16")
        deepspeed = connect(mesh.device)
        self.module = module
        self._mesh = mesh
        self._stage: int = config["zero_optimization"].get("stage", 0)
        self._micro_batches, self._accumulated = int(config["gradient_accumulation_steps"]), 0
        self._dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
        self._adopt_rank_0()
        cast_constants(module, self._dtype)
        initial = self._snapshot()
        optimizer = build_optimizer(parameter_groups(module, optim), optim)
        with _all_trained(module):
            self._engine, *_ = deepspeed.initialize(
                args=SimpleNamespace(device_rank=mesh.device.index or 0),
                model=module,
                optimizer=optimizer,
                config=config,
                mpu=_Topology(mesh, sharded=self._stage > 0),
            )
        self._shards = open_shards(self._engine)
        self._restore(initial)
        self._shards.allocate_state()
        self._shards.base.bind(self._shards.masters, self._shards.layout, group=self.dot_group)
        self.refused_update = False

    def _adopt_rank_0(self) -> None:
        """Rank 0's parameters and buffers everywhere, contiguous: DeepSpeed itself reaches the shard group only."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data.contiguous()
        if self._mesh.world_group is not None:
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                dist.broadcast(tensor.data, src=0, group=self._mesh.world_group)

    def _snapshot(self) -> dict[str, torch.Tensor]:
        """The fp32 parameters, on the host, if DeepSpeed is about to round them."""
        if self._dtype == torch.float32:
            return {}
        return {name: p.detach().to("cpu", copy=True) for name, p in self.module.named_parameters()}

    @torch.no_grad()
    def _restore(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Start the masters from the unrounded parameters; DeepSpeed starts them from the bf16 weights."""
        if parameters:
            for piece in self.layout:
                values = parameters[piece.name].view(-1)[piece.start : piece.start + piece.length]
                self.master[piece.shard][piece.offset : piece.offset + piece.length].copy_(values)

    def forward(self, images: torch.Tensor, pass_: Pass | None = None) -> torch.Tensor:
        """Logits in fp32, whatever the weights are in."""
        with within(pass_, self.module):
            logits: torch.Tensor = self._engine(images.to(self._dtype))
        return logits.float()

    def accumulate(self, loss: torch.Tensor) -> None:
        """Backpropagate; DeepSpeed reduces in the last micro-batch's backward pass."""
        self._accumulated += 1
        self._engine.set_gradient_accumulation_boundary(self._accumulated == self._micro_batches)
        self._engine.backward(loss, scale_wrt_gas=False)

    def reduce(self) -> GradientShard:
        """Average over the replicas, copy the shard out."""
        assert self._accumulated == self._micro_batches, "reduce before gradient_accumulation_steps losses"
        self._accumulated = 0
        if self._mesh.replica_group is not None:
            self._shards.average(self._mesh.replica_group)
        return self._shards.gradient()

    def apply(self, lr: torch.Tensor) -> None:
        """DeepSpeed's step. It skips an update whose gradient is not finite; that is logged."""
        for group in self._shards.base.param_groups:
            group["lr"] = lr.to(self.master[0].device)
        self._engine.step()
        self._shards.clear()
        self.refused_update = not self._engine.was_step_applied()
        if self.refused_update:
            logger.warning("the gradient of %s is not finite: update skipped", type(self.module).__name__)

    def discard(self) -> None:
        """Clear every place where DeepSpeed keeps the gradient."""
        self._shards.clear()

    @property
    def dot_group(self) -> dist.ProcessGroup | None:
        """The shard group; None at stage 0, where gradients are whole everywhere."""
        return self._mesh.shard_group if self._stage else None

    @property
    def layout(self) -> Sequence[Slice]:
        """One slice per parameter that overlaps this rank's shard."""
        return self._shards.layout

    @property
    def master(self) -> Sequence[torch.Tensor]:
        """One shard per parameter (stage 0), parameter group (1, 2) or sub-group (3)."""
        return [master.data.view(-1) for master in self._shards.masters]

    @property
    def optimizer_state(self) -> dict[str, Sequence[torch.Tensor]]:
        """The optimiser's state by name, one tensor per shard."""
        return {name: self._shards.state(name) for name in self._shards.base.state_names}

    @property
    def optimizer_counters(self) -> dict[str, torch.Tensor]:
        """The optimiser's counters by name."""
        return dict(self._shards.base.counters)

    @property
    def owns_shard(self) -> bool:
        """The first shard group owns, the others are replicas; at stage 0 rank 0 owns all."""
        return self._mesh.rank < (self._mesh.shard_size if self._stage else 1)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Write the master shards into the module's weights and gather them over the shard group."""
        self._shards.refresh()


@contextmanager
def _all_trained(module: nn.Module) -> Iterator[None]:
    """Every parameter asks for a gradient: DeepSpeed shards no other. One that then gets none is nothing new to it."""
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class _Topology:
    """The process groups in the form DeepSpeed asks for them (Megatron's "model parallel unit").

    The data-parallel group is the group that shards. The model-parallel group is this rank alone, not None: some of
    DeepSpeed's norms reduce over it unasked, and None would mean the world. Always given, because DeepSpeed keeps the
    last one in a global that an engine without one would then use.
    """

    def __init__(self, mesh: Mesh, *, sharded: bool) -> None:
        self._alone: Any = dist.group.WORLD
        if mesh.world > 1:
            self._alone = process_group([mesh.rank], local=True)
        shard_group: Any = mesh.shard_group if sharded else mesh.world_group
        self._data = self._alone if shard_group is None else shard_group

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._alone

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._data
