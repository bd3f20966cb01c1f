"""Recompute activations in the backward pass instead of keeping them, exactly (DESIGN 6).

torch's checkpointing runs a block's forward a second time, and with it batch norm's moving averages: 0.25 off on
EfficientNet-B0. Here the second run happens in a context of the model's `Passes` that draws the same random numbers and
lets batch norm learn nothing, so a recomputed model equals the plain one bit by bit.

| policy | kept for the backward pass | recomputed |
|---|---|---|
| none | everything | nothing |
| bn_act | each block's input and its convolutions' outputs | batch norm, activations, gates |
| block | each block's input | the block |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.passes import Passes

Policy = Literal["none", "bn_act", "block"]


def apply_recompute(model: nn.Module, policy: Policy) -> nn.Module:
    """Make the blocks of a model recompute; in place, state_dict keys and deepcopy unaffected.

    Args:
        model: from build_model (it has `passes`), partitioned if it is to be, not yet under an engine.
        policy: see the table above.

    Raises:
        ValueError: the model has no blocks.
    """
    if policy == "none":
        return model
    blocks = list(find_blocks(model))
    if not blocks:
        raise ValueError(
            f"mpl_scale.parallel.recompute = {policy}: {type(model).__name__} has no blocks (modules in a Sequential "
            "that hold a convolution and a batch norm); set none"
        )
    for block in blocks:
        if policy == "bn_act":
            _keep_activations_out_of_place(block)
        block.__class__ = _recomputed(type(block))  # type: ignore[arg-type]
        block._recompute = (model.passes, policy)  # type: ignore[assignment]
    return model


def _keep_activations_out_of_place(block: nn.Module) -> None:
    """An in-place activation right behind a convolution would overwrite the output that is kept."""
    for layer in block.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]


def find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost members of Sequentials and ModuleLists that hold both a convolution and a batch norm."""
    for child in module.children():
        inner = list(find_blocks(child))
        if inner:
            yield from inner
        elif isinstance(module, nn.Sequential | nn.ModuleList) and _is_block(child):
            yield child


def _is_block(module: nn.Module) -> bool:
    layers = list(module.modules())
    return any(isinstance(m, nn.Conv2d) for m in layers) and any(isinstance(m, BatchNorm) for m in layers)


@cache
def _recomputed(base: type[nn.Module]) -> type[nn.Module]:
    """A block's class with a forward that recomputes: a swap of the class changes no key and no reference."""

    def forward(self: Any, *inputs: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return base.forward(self, *inputs)
        passes, policy = self._recompute
        contexts = partial(_contexts, passes, policy)
        # Random numbers are counter-based: there is no generator state to stash.
        plain = partial(base.forward, self)
        return checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return type(f"Recomputed{base.__name__}", (base,), {"forward": forward})


def _contexts(passes: Passes, policy: Policy) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the first and the second run of a block happen in."""
    repeat = passes.repetition()
    if policy == "block":
        return nullcontext(), repeat
    first, second = create_selective_checkpoint_contexts(_keep_convolutions)
    return first, _both(second, repeat)


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _keep_convolutions(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
