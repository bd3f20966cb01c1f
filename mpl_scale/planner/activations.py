"""Bytes that stay alive between forward and backward, by a census of storages; shapes alone suffice ("meta").

saved_tensors_hooks see what autograd's own nodes keep. They do not see what a selective checkpoint keeps in its cache,
what a custom function keeps on its context, or what layers remember for a repeated pass. So every storage that an
operator makes during the forward pass is noted by a weak reference, and those that outlive it are counted, whoever
holds them. Without checkpointing both counts agree (tests/test_planner_memory.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpl_scale.models.buffers import cast_constants
from mpl_scale.models.passes import Pass


class StorageCensus(TorchDispatchMode):
    """Weak references to every storage that an operator returns while the mode is on.

    Enter it outermost: modes entered later (a selective checkpoint's) call their operators through it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live_bytes(self, *, apart_from: tuple[torch.Tensor, ...] = ()) -> int:
        """Bytes of the noted storages that still exist, those of `apart_from` left out."""
        left_out = {tensor.untyped_storage()._cdata for tensor in apart_from}
        return sum(size for key, (ref, size) in self._seen.items() if key not in left_out and not ref.expired())


def kept_bytes(
    model: nn.Module,
    images: torch.Tensor,
    *,
    loss: Callable[[torch.Tensor], torch.Tensor] = torch.sum,
) -> int:
    """Bytes that one forward pass in training mode leaves behind for its backward pass.

    Parameters, buffers and the images themselves were there before and do not count; the model's buffers may move.

    Args:
        model: in training mode, on the images' device ("meta" computes nothing), recomputation applied or not.
        images: [B, C, H, W] in the dtype the network computes in.
        loss: of the logits; holds the graph alive while it is counted.
    """
    device = images.device
    number, rows = torch.zeros((), dtype=torch.int64, device=device), torch.arange(len(images), device=device)
    before = (*model.parameters(), *model.buffers(), images)
    with StorageCensus() as census:
        passes = getattr(model, "passes", None)
        if passes is None:
            result = loss(model(images))
        else:
            with passes(Pass(seed=0, stream=0, step=number, rows=rows)):
                result = loss(model(images))
    return census.live_bytes(apart_from=(*before, result))


def to_compute_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters and constants in the network's dtype, batch norm's averages as they are: as the engines; in place."""
    cast_constants(model, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
