"""Bytes of state per rank that do not depend on the batch: a closed form per engine and ZeRO stage, and a census.

A plan and the benchmarks use the closed form. `reachable_bytes` walks every tensor that a live engine
holds, DeepSpeed's internals included; tests/test_planner_static.py holds the two together on 1, 2 and 4 ranks.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from mpl_scale.config.names import require_known
from mpl_scale.optim import OPTIMIZERS

FP32 = 4


@dataclass(frozen=True)
class TrainedNetwork:
    """One network, as an engine holds it.

    parameters: P. buffers: elements of batch norm's averages, fp32 on every rank. dtype: of weights and gradients.
    optimizer: a name in mpl_scale.optim.OPTIMIZERS. ema: whether a moving average of it is kept. kept_gradients: k,
    gradient shards that the step holds: 2 for the student, 1 for the teacher; the flat engine has two static ones
    whatever the network. persistent: elements that stage 3 keeps whole (parameters up to
    stage3_param_persistence_threshold).
    """

    parameters: int
    buffers: int
    dtype: torch.dtype
    optimizer: str
    ema: bool
    kept_gradients: int = 2
    persistent: int = 0


@dataclass(frozen=True)
class EngineSettings:
    """An engine's part in it.

    engine: which implementation. stage: zero_optimization.stage. shard_size: ranks that share one copy of the state.
    clipping: gradient_clipping above 0. accumulation: gradient_accumulation_steps above 1. reduce_bucket:
    zero_optimization.reduce_bucket_size, elements, allocated for good at stage 3.
    """

    engine: Literal["flat", "deepspeed"]
    stage: int
    shard_size: int
    clipping: bool = False
    accumulation: bool = False
    reduce_bucket: int = 500_000_000


def static_bytes(network: TrainedNetwork, engine: EngineSettings) -> dict[str, int]:
    """Bytes of one network on one rank between a backward pass and its update, without activations.

    With P parameters of w bytes and s ranks to a shard (s = 1 at stage 0):

    | part | flat, stages 0 to 2 | deepspeed 0 | 1 and 2 | 3 |
    |---|---|---|---|---|
    | weights | P w | P w | P w | P w / s |
    | master (none where fp32 weights serve) | 4 P / s | 4 P | 4 P / s | 4 P / s |
    | optimizer, n states | 4 n P / s | 4 n P | 4 n P / s | 4 n P / s |
    | gradients | P w | P w | P w / s | P w / s |
    | kept_gradients: g_u and g_l | 2 x 4 P / s | k x 4 P | k x 4 P / s | k x 4 P / s |
    | communication | 2 P w / s if s > 1 | | | bucket w |
    | clipping | 4 P / s | | | |
    | accumulation (weights narrower than fp32) | 4 P / s | not counted | | |
    | ema | 4 P / s + buffers | same | same | same |

    Flat fp32 masters are views of the weights; DeepSpeed copies them at stages 1 to 3. Padding (a shard's last
    elements) and DeepSpeed's transient buckets during a backward pass at stages 1 and 2 are left out. What the table
    holds for gradients at stages 1 and 2 is after the reduction: a parameter that lies on two shards is held whole.

    Raises:
        ValueError: an optimiser nobody registered; an engine without that stage.
    """
    require_known("optimizer", network.optimizer, OPTIMIZERS)
    stage, flat = engine.stage, engine.engine == "flat"
    if stage not in range(4) or (flat and stage == 3):
        raise ValueError(
            f"zero_optimization.stage = {stage} with engine {engine.engine}: flat has 0 to 2, deepspeed 0 to 3"
        )
    size = engine.shard_size if stage else 1
    shard, buffers = -(-network.parameters // size), network.buffers * FP32
    width = network.dtype.itemsize
    separate_master = width < FP32 or (stage > 0 and not flat)
    states = len(OPTIMIZERS[network.optimizer].state_names)
    partitioned = stage == 3
    found = {
        "weights": ((shard if partitioned else network.parameters) + network.persistent) * width,
        "buffers": buffers,
        "master": shard * FP32 if separate_master else 0,
        "optimizer": states * shard * FP32,
        "gradients": (network.parameters if flat or stage == 0 else shard) * width,
        "kept_gradients": (2 if flat else network.kept_gradients) * shard * FP32,
        "communication": 0,
        "clipping": shard * FP32 if flat and engine.clipping else 0,
        "accumulation": shard * FP32 if flat and engine.accumulation and width < FP32 else 0,
        "ema": shard * FP32 + buffers if network.ema else 0,
    }
    if flat and size > 1:
        found["communication"] = 2 * shard * width
    elif partitioned:
        found["communication"] = engine.reduce_bucket * width
    return found


def reachable_bytes(roots: Iterable[Any], *, meta: bool = False) -> int:
    """Bytes of the distinct storages of all tensors that the roots lead to, through whatever objects hold them.

    Follows attributes, containers, closures and defaults of functions; not modules, types or a function's globals.

    Args:
        roots: where to start.
        meta: count what lies on the meta device, as if it had its bytes, instead of what has memory.
    """
    storages = [tensor.untyped_storage() for tensor in _tensors(roots) if tensor.is_meta == meta]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


_NOT_FOLLOWED = (type, types.ModuleType, types.FrameType, types.BuiltinFunctionType, dist.ProcessGroup, str, bytes)


def _tensors(roots: Iterable[Any]) -> Iterator[torch.Tensor]:
    pending, visited = list(roots), {}
    while pending:
        item = pending.pop()
        if id(item) in visited or isinstance(item, _NOT_FOLLOWED):
            continue
        visited[id(item)] = item  # held, so that no other object takes its id
        if isinstance(item, torch.Tensor):
            yield item
            pending.extend(vars(item).values())
            if item.is_leaf and item.grad is not None:
                pending.append(item.grad)
        elif isinstance(item, types.FunctionType):
            cells = [cell for cell in item.__closure__ or () if cell != types.CellType()]
            pending.extend([*(cell.cell_contents for cell in cells), *(item.__defaults__ or ()), vars(item)])
        else:
            pending.extend(gc.get_referents(item))
