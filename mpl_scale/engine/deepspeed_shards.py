"""Where DeepSpeed 0.19.8 keeps the master weights, the optimiser state and the reduced gradient, one class per wrapper.

| stage | fp32 | bf16 | bf16 with data_types.grad_accum_dtype = fp32 |
|---|---|---|---|
| 0 | the optimiser itself | FP16_UnfusedOptimizer | refused by DeepSpeed |
| 1 | DeepSpeedZeroOptimizer | the same | BF16_Optimizer |
| 2 | DeepSpeedZeroOptimizer | the same | the same |
| 3 | DeepSpeedZeroOptimizer_Stage3 | the same | the same |

Every class presents the state as numbered flat fp32 shards, and a gradient laid out exactly as the master weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from mpl_scale.types import Slice

Pieces = Sequence[Sequence[torch.Tensor]]


class Shards(ABC):
    """Base. Subclasses fill `wrapper`, `base`, `masters` and `layout` and say where gradients are."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.wrapper = engine.optimizer
        self.base = engine.basic_optimizer  # our ShardOptimizer
        self.masters: Sequence[Any] = []  # the tensors the optimiser's state is keyed by
        self.layout: list[Slice] = []

    def allocate_state(self) -> None:
        """Make the optimiser state that DeepSpeed would leave to the first step."""
        self.base.init_state()

    def state(self, name: str) -> list[torch.Tensor]:
        """One optimiser state, live, one 1-D tensor per shard."""
        return [self.base.state[master][name].view(-1) for master in self.masters]

    @abstractmethod
    def pieces(self) -> Pieces:
        """The reduced gradient where `step` will read it: for each shard the tensors that make it up, in order."""

    def gradient(self) -> list[torch.Tensor]:
        """A copy of the reduced gradient, fp32, one 1-D tensor per shard (zero in the padding)."""
        return [torch.cat([piece.detach().reshape(-1).float() for piece in shard]) for shard in self.pieces()]

    def average(self, group: dist.ProcessGroup) -> None:
        """Replace the reduced gradient by its mean over a group of replicas."""
        for shard in self.pieces():
            flat = torch.cat([piece.detach().reshape(-1) for piece in shard])
            dist.all_reduce(flat, group=group)
            flat.div_(dist.get_world_size(group))
            for piece, mean in zip(shard, flat.split([piece.numel() for piece in shard]), strict=True):
                piece.copy_(mean.view_as(piece))

    def clear(self) -> None:
        """Forget the reduced gradient; the next backward starts as after a step."""
        self.wrapper.zero_grad()

    def refresh(self) -> None:
        """Copy the master shards into the module's weights and gather them."""
        self.wrapper.update_lp_params()

    def _partitions(self, *, offloaded: bool) -> Pieces:
        if offloaded:
            return [[master.grad] for master in self.masters]
        return [self.wrapper.averaged_gradients[index] for index in range(len(self.masters))]

    def _clear_offloaded(self) -> None:
        self.wrapper.reset_cpu_buffers()
        for master in self.masters:
            master.grad.zero_()


class ReplicatedShards(Shards):
    """Stage 0: every rank holds everything, one shard per parameter."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        if hasattr(self.wrapper, "fp32_groups"):
            self.weights = [weight for group in self.wrapper.fp16_groups for weight in group]
            self.masters = [master for group in self.wrapper.fp32_groups for master in group]
            self.base.state.clear()  # its constructor took a step with zero gradients; the masters are restored later
        else:
            self.weights = [weight for group in self.base.param_groups for weight in group["params"]]
            self.masters = self.weights
        for index, weight in enumerate(self.weights):
            name = engine.param_names[weight]
            self.layout.append(Slice(name, tuple(weight.shape), 0, weight.numel(), index, 0))

    def pieces(self) -> Pieces:
        """The parameters' own gradients; DeepSpeed fills in zeros for parameters without one, but for frozen ones."""
        for weight in self.weights:
            if weight.grad is None and not weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
        return [[weight.grad] for weight in self.weights]

    def clear(self) -> None:
        """Drop the parameters' gradients."""
        self.engine.zero_grad()

    def refresh(self) -> None:
        """Cast the masters down; in fp32 they are the weights."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.data.copy_(master.data)


class FlatShards(Shards):
    """Stages 1 and 2: parameters of a group are views into one flat tensor, cut into equal parts."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.masters = self.wrapper.single_partition_of_fp32_groups
        self._first_micro_step = self.wrapper.micro_step_id
        self._locate(self.wrapper.bit16_groups, self.wrapper.bit16_groups_flat)

    def _locate(self, groups: Pieces, flats: Sequence[torch.Tensor]) -> None:
        """Derive the layout from where the parameters lie, whatever order and alignment DeepSpeed chose."""
        for index, (group, flat, master) in enumerate(zip(groups, flats, self.masters, strict=True)):
            begin = dist.get_rank(self.wrapper.real_dp_process_group[index]) * master.numel()
            for weight in group:
                position = (weight.data_ptr() - flat.data_ptr()) // flat.element_size()
                low, high = max(position, begin), min(position + weight.numel(), begin + master.numel())
                if low < high:
                    name, shape = self.engine.param_names[weight], tuple(weight.shape)
                    self.layout.append(Slice(name, shape, low - position, high - low, index, low - begin))

    def pieces(self) -> Pieces:
        """The partition's gradients, or with CPU offload the masters', which the hooks have filled."""
        return self._partitions(offloaded=self.wrapper.cpu_offload)

    def clear(self) -> None:
        """What `step` resets on an overflow, and the micro step: else the next gradient is added to this one."""
        self.wrapper.zero_grad()
        for gradients in (self.wrapper.averaged_gradients, self.wrapper.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
        self.wrapper.micro_step_id = self._first_micro_step
        if self.wrapper.cpu_offload:
            self._clear_offloaded()
            self.wrapper._offload_accumulated_param_ids.clear()


class Bf16FlatShards(FlatShards):
    """Stage 1 with bf16 weights and fp32 gradient accumulation: every rank holds the whole fp32 gradient."""

    def __init__(self, engine: Any) -> None:
        Shards.__init__(self, engine)
        self.masters = self.wrapper.fp32_groups_flat_partition
        self._locate(self.wrapper.bf16_groups, self.wrapper.bf16_groups_flat)

    def pieces(self) -> Pieces:
        """This rank's part of the whole gradient."""
        return [[part] for part in self.wrapper.fp32_groups_gradient_flat_partition]

    def average(self, group: dist.ProcessGroup) -> None:
        """Average the whole gradient, not only this rank's part: its norm is needed for clipping."""
        for flat in self.wrapper.fp32_groups_gradients_flat:
            dist.all_reduce(flat, group=group)
            flat.div_(dist.get_world_size(group))

    def clear(self) -> None:
        """Zeroes the accumulated gradients too."""
        self.wrapper.zero_grad()


class PartitionedShards(Shards):
    """Stage 3: each parameter is cut into equal parts; a sub-group's parts lie one after the other in a flat tensor."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.masters = self.wrapper.fp32_partitioned_groups_flat
        for index, group in enumerate(self.wrapper.fp16_groups):
            rank = dist.get_rank(self.wrapper.sub_group_process_groups[index])
            offset = 0
            for weight in group:
                part = weight.partition_numel()
                start = rank * part
                length = min(part, weight.ds_numel - start)
                if length > 0:
                    name, shape = engine.param_names[weight], tuple(weight.ds_shape)
                    self.layout.append(Slice(name, shape, start, length, index, offset))
                padding = part - max(length, 0)
                offset += part
                self.masters[index].data[offset - padding : offset].zero_()  # DeepSpeed leaves it uninitialised

    def allocate_state(self) -> None:
        """The optimiser's groups are empty outside of `step`: fill them for the time of the allocation."""
        for index, master in enumerate(self.masters):
            self.base.param_groups[self.wrapper.sub_group_to_group_id[index]]["params"].append(master)
        self.base.init_state()
        for group in self.base.param_groups:
            group["params"] = []

    def pieces(self) -> Pieces:
        """The gradients' partitions, or with CPU offload the masters' gradients."""
        return self._partitions(offloaded=self.wrapper.offload_optimizer)

    def clear(self) -> None:
        """zero_grad also resets the micro step; a parameter that gets no gradient next time must not keep this one."""
        self.wrapper.zero_grad()
        self.wrapper.averaged_gradients.clear()
        self.wrapper.grad_partitions_flat_buffer.zero_()
        if self.wrapper.offload_optimizer:
            self._clear_offloaded()

    def refresh(self) -> None:
        """Write the partitions; parameters that stay whole are dropped, the next forward gathers them again."""
        self.wrapper._partition_all_parameters()
        for index in range(len(self.masters)):
            self.wrapper._reassign_or_swap_out_partitioned_parameters(index)


def open_shards(engine: Any) -> Shards:
    """The shards of an engine, by the wrapper that DeepSpeed chose."""
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        return ReplicatedShards(engine)
    if stage == 3:
        return PartitionedShards(engine)
    return Bf16FlatShards(engine) if hasattr(engine.optimizer, "fp32_groups_flat_partition") else FlatShards(engine)
