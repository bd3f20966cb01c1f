"""The base of all optimisers, SGD with Nesterov momentum and TensorFlow's RMSProp: elementwise, for any shard.

Under ZeRO an engine replaces a group's parameters by flat fp32 shards; both rules are elementwise, so sharding cannot
change their result. A rule that looks at whole parameters (whole.py) is told by `bind` which elements are whose.
torch's own SGD and RMSprop call `.item()` on a tensor learning rate, which a CUDA graph forbids: here `group["lr"]` is
a 0-d device tensor, the state is allocated at construction, and every update is in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from mpl_scale.compiling import compiled
from mpl_scale.config.names import Registry, require_known
from mpl_scale.config.schema import OptimConfig
from mpl_scale.types import Slice

OPTIMIZERS: Registry[type[ShardOptimizer]] = Registry("optimizer")
register_optimizer = OPTIMIZERS.register
"""Make a `ShardOptimizer` available as `mpl_scale.optim.<network>.name`."""


class ShardOptimizer(torch.optim.Optimizer, ABC):
    """Base: coupled L2 weight decay per group, a tensor learning rate, state made by `init_state`.

    Groups need `params` and `weight_decay`, and may have an `lr_scale` (groups.py), which multiplies the rate; 0 leaves
    them as they are. The engine sets `lr` (float32 []) before each step. `counters` (float64 [] by name) count the
    steps since `bind`; a rule takes them with its constants.
    """

    state_names: tuple[str, ...] = ()
    counter_names: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    """Fields of the config that `update` takes by name."""
    elementwise = True
    """Whether the rule looks at one element at a time, so that all of it can be one loop."""
    matrices_apart = False
    """Whether hidden layers' matrices are in groups of their own (groups.py), with `matrices` True."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.config = config
        self._constants = {name: getattr(config, name) for name in self.constants}
        self._compiled = False
        defaults = {"lr": torch.tensor(config.lr), "weight_decay": config.weight_decay, "lr_scale": 1.0}
        super().__init__(groups, defaults)
        self._count_from(self.param_groups[0]["params"][0])

    def compile(self) -> None:
        """Make an elementwise rule, weight decay included, one compiled loop over each shard."""
        self._compiled = self.elementwise

    def bind(
        self, masters: Sequence[torch.Tensor], layout: Sequence[Slice], *, group: dist.ProcessGroup | None
    ) -> None:
        """Told by an engine, once: which elements of the shards are which parameter's.

        Args:
            masters: the shards as they are in the groups' `params`, by the layout's numbers.
            layout: this rank's slices of parameters; elements in none are padding.
            group: ranks that hold the other slices; None: all are here.
        """
        self._count_from(masters[0])

    def _count_from(self, first: torch.Tensor) -> None:
        """Start the counters at 0. They count updates of this shard: DeepSpeed steps shard by shard."""
        self._first = first
        self.counters = {name: torch.zeros((), dtype=torch.float64, device=first.device) for name in self.counter_names}

    def init_state(self) -> None:
        """Allocate the state of every parameter that has none (zeros, see each rule)."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in self.state_names:
                    if name not in state:
                        state[name] = self._initial(name, parameter)

    def _initial(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients are left untouched."""
        self.init_state()
        if any(parameter is self._first for group in self.param_groups for parameter in group["params"]):
            for counter in self.counters.values():
                counter.add_(1.0)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters or not group["lr_scale"]:
                continue
            gradients = [p.grad for p in parameters]
            states = {name: [self.state[p][name] for p in parameters] for name in self.state_names}
            lr = group["lr"]
            lr = lr if torch.is_tensor(lr) else torch.tensor(lr, device=parameters[0].device)
            if group["lr_scale"] != 1.0:
                lr = lr * group["lr_scale"]
            weight_decay = group["weight_decay"]
            if self._compiled:
                loop = _loop(type(self), weight_decay, **self._constants)
                loop([p.detach() for p in parameters], gradients, states, lr, self.counters)
            else:
                self._move(parameters, gradients, states, lr, group)

    def _move(
        self,
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: dict[str, list[torch.Tensor]],
        lr: torch.Tensor,
        group: dict[str, Any],
    ) -> None:
        """Decay and update one group in place. The gradients are left untouched."""
        gradients = self.decay(parameters, gradients, lr, group["weight_decay"])
        self.update(parameters, gradients, states, lr, **self.counters, **self._constants)

    @staticmethod
    def decay(
        parameters: list[torch.Tensor], gradients: list[torch.Tensor], lr: torch.Tensor, weight_decay: float
    ) -> list[torch.Tensor]:
        """Weight decay: coupled L2 here, in the gradients that it returns."""
        return list(torch._foreach_add(gradients, parameters, alpha=weight_decay)) if weight_decay else gradients

    @staticmethod
    @abstractmethod
    def update(
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: dict[str, list[torch.Tensor]],
        lr: torch.Tensor,
        **constants: Any,
    ) -> None:
        """Move the parameters and their states in place, after `decay`; constants: the counters too."""


@cache
def _loop(rule: type[ShardOptimizer], weight_decay: float, **constants: Any) -> Callable[..., None]:
    """A rule with weight decay, compiled once for the shards of every network and phase with these constants."""

    def update(parameters, gradients, states, lr, counters) -> None:  # type: ignore[no-untyped-def]
        gradients = rule.decay(parameters, gradients, lr, weight_decay)
        rule.update(parameters, gradients, states, lr, **counters, **constants)

    return compiled(update)


@register_optimizer("sgd")
class SGD(ShardOptimizer):
    """v <- momentum v + g; w <- w - lr (g + momentum v) with Nesterov, else w - lr v. v starts at 0 (C.4)."""

    state_names = ("momentum",)
    constants = ("momentum", "nesterov")

    @staticmethod
    def update(parameters, gradients, states, lr, *, momentum, nesterov):  # type: ignore[no-untyped-def,override]
        """One step in place, as ShardOptimizer.update says: heavy-ball or Nesterov momentum."""
        velocity = states["momentum"]
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, gradients)
        direction = torch._foreach_add(gradients, velocity, alpha=momentum) if nesterov else velocity
        torch._foreach_sub_(parameters, torch._foreach_mul(direction, lr))


@register_optimizer("rmsprop")
class RMSpropTF(ShardOptimizer):
    """s <- rho s + (1 - rho) g^2; m <- momentum m + lr g / sqrt(s + eps); w <- w - m.

    TensorFlow's rule, as timm's RMSpropTF: s starts at 1, eps is under the root, the learning rate is inside the
    momentum. EfficientNet-L2's optimiser (C.4).
    """

    state_names = ("square_average", "momentum")
    constants = ("rho", "eps", "momentum")

    def _initial(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        initial = super()._initial(name, parameter)
        return initial.fill_(1.0) if name == "square_average" else initial

    @staticmethod
    def update(parameters, gradients, states, lr, *, rho, eps, momentum):  # type: ignore[no-untyped-def,override]
        """One step in place, as ShardOptimizer.update says: TensorFlow's RMSprop, eps inside the root."""
        square, velocity = states["square_average"], states["momentum"]
        torch._foreach_mul_(square, rho)
        torch._foreach_addcmul_(square, gradients, gradients, value=1.0 - rho)
        root = torch._foreach_add(square, eps)
        torch._foreach_sqrt_(root)
        update = torch._foreach_div(gradients, root)
        torch._foreach_mul_(update, lr)
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, update)
        torch._foreach_sub_(parameters, velocity)


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> ShardOptimizer:
    """The configured optimiser over parameter groups (parameters or flat shards)."""
    require_known("mpl_scale.optim.<network>.name", config.name, OPTIMIZERS)
    return OPTIMIZERS[config.name](groups, config)
