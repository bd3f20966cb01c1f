"""Recompute activations in the backward pass instead of keeping them, exactly (DESIGN 6).

torch's checkpointing runs a block's forward a second time, and with it batch norm's moving averages: 0.25 off on
EfficientNet-B0. Here the second run happens in a context of the model's `Passes` that draws the same random numbers and
lets batch norm learn nothing, so a recomputed model equals the plain one bit by bit.

| policy | kept for the backward pass | recomputed |
|---|---|---|
| none | everything | nothing |
| bn_act | each block's input and its dense convolutions' outputs | batch norm, activations, gates, depthwise |
| block | each block's input | the block |

`block` has a second backend, fairscale's, which can keep the inputs in the host's memory. It reads the device's random
state, so it never runs inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.passes import Passes

Policy = Literal["none", "bn_act", "block"]
Backend = Literal["native", "fairscale"]


@dataclass(frozen=True)
class _How:
    """What a recomputed block needs to know."""

    passes: Passes
    policy: Policy
    backend: Backend
    offload: bool


def apply_recompute(
    model: nn.Module, policy: Policy | Sequence[Policy], *, backend: Backend = "native", offload: bool = False
) -> nn.Module:
    """Make the blocks of a model recompute; in place, state_dict keys and deepcopy unaffected.

    Args:
        model: from build_model (it has `passes`), partitioned if it is to be, not yet under an engine.
        policy: see the table above; or one for each stage (find_stages).
        backend: who runs a block again; fairscale knows the policies none and block.
        offload: fairscale keeps the blocks' inputs in the host's memory.

    A network of vectors (a reduced teacher's) keeps next to nothing and is left as it is.

    Raises:
        ValueError: the model has no blocks, or not as many stages as policies; or a backend without the policy.
    """
    if not any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        return model
    stages = find_stages(model)
    policies = [policy] * len(stages) if isinstance(policy, str) else list(policy)
    _check(model, policy, policies, list(stages), backend=backend, offload=offload)
    for blocks, choice in zip(stages.values(), policies, strict=True):
        for block in blocks if choice != "none" else ():
            if choice == "bn_act":
                _keep_activations_out_of_place(block)
            block.__class__ = _recomputed(type(block))  # type: ignore[arg-type]
            block._recompute = _How(model.passes, choice, backend, offload)  # type: ignore[arg-type, assignment]
    return model


def _check(
    model: nn.Module,
    given: Policy | Sequence[Policy],
    policies: Sequence[Policy],
    stages: Sequence[str],
    *,
    backend: Backend,
    offload: bool,
) -> None:
    name, field = type(model).__name__, f"mpl_scale.parallel.recompute = {given}"
    if not stages and given != "none":
        raise ValueError(
            f"{field}: {name} has no blocks (modules in a Sequential that hold a convolution and a batch norm, or a "
            "linear layer or convolution and a layer norm); set none"
        )
    if len(policies) != len(stages):
        raise ValueError(f"{field}: {name} has {len(stages)} stages ({', '.join(stages)}); give one policy for each")
    if backend == "fairscale" and "bn_act" in policies:
        raise ValueError(f"{field}: fairscale recomputes whole blocks; use block, or recompute_backend native")
    if offload and backend != "fairscale":
        raise ValueError("mpl_scale.parallel.recompute_offload = true needs recompute_backend = fairscale")


def _keep_activations_out_of_place(block: nn.Module) -> None:
    """An in-place activation right behind a convolution would overwrite the output that is kept."""
    for layer in block.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]


def find_stages(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The blocks by the path of the container they are members of, in the order of the model."""
    paths = {module: path for path, module in model.named_modules()}
    stages: dict[str, list[nn.Module]] = {}
    for block in find_blocks(model):
        stages.setdefault(paths[block].rpartition(".")[0], []).append(block)
    return stages


def find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost members of Sequentials and ModuleLists that hold both weights and their norm."""
    for child in module.children():
        inner = list(find_blocks(child))
        if inner:
            yield from inner
        elif isinstance(module, nn.Sequential | nn.ModuleList) and _is_block(child):
            yield child


def _is_block(module: nn.Module) -> bool:
    """A convolution and a batch norm, or, as in a transformer, a linear layer or convolution and a layer norm."""
    convolves, projects, batch, layer = (
        any(isinstance(m, kind) for m in module.modules()) for kind in (nn.Conv2d, nn.Linear, BatchNorm, nn.LayerNorm)
    )
    return (convolves and (batch or layer)) or (projects and layer)


@cache
def _recomputed(base: type[nn.Module]) -> type[nn.Module]:
    """A block's class with a forward that recomputes: a swap of the class changes no key and no reference."""

    def forward(self: Any, *inputs: Any, **named: Any) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return base.forward(self, *inputs, **named)
        how: _How = self._recompute
        plain = partial(base.forward, self)
        if how.backend == "fairscale":
            from mpl_scale.engine.fairscale_recompute import run_again  # fairscale is an extra

            return run_again(self, plain, inputs, named, repeat=how.passes.repetition(), offload=how.offload)
        contexts = partial(_contexts, how.passes, how.policy)
        # Random numbers are counter-based: there is no generator state to stash.
        return checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **named)

    return type(f"Recomputed{base.__name__}", (base,), {"forward": forward})


def _contexts(passes: Passes, policy: Policy) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the first and the second run of a block happen in."""
    repeat = passes.repetition()
    if policy == "block":
        return nullcontext(), repeat
    first, second = create_selective_checkpoint_contexts(_keep_dense_convolutions)
    return first, _both(second, repeat)


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _keep_dense_convolutions(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator is torch.ops.aten.convolution.default and args[8] == 1  # groups: depthwise ones are cheap
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
