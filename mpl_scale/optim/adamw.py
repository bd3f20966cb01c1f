"""AdamW (Loshchilov and Hutter, 2019): decoupled weight decay, and averages corrected for their start at 0."""

from __future__ import annotations

import math

import torch

from mpl_scale.optim.optimizers import ShardOptimizer, register_optimizer


def adam_direction(gradients, states, *, steps, betas, adam_eps):  # type: ignore[no-untyped-def]
    """Move both averages in place; what Adam's step t is along, up to its second value, float64 [].

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; m / (sqrt(v / (1 - b2^t)) + eps), and 1 - b1^t.
    steps float64 []: t.
    """
    average, square = states["average"], states["square_average"]
    torch._foreach_mul_(average, betas[0])
    torch._foreach_add_(average, gradients, alpha=1.0 - betas[0])
    torch._foreach_mul_(square, betas[1])
    torch._foreach_addcmul_(square, gradients, gradients, value=1.0 - betas[1])
    # 1 - beta^t in float64 []: 1 - 0.999 has 5 digits left in float32. torch.pow would copy beta to the device.
    first, second = (-torch.expm1(steps * math.log(max(beta, 1e-300))) for beta in betas)
    root = torch._foreach_sqrt(square)
    torch._foreach_div_(root, second.sqrt().to(square[0].dtype))
    torch._foreach_add_(root, adam_eps)
    return torch._foreach_div(average, root), first


@register_optimizer("adamw")
class AdamW(ShardOptimizer):
    """w <- w - lr decay w; m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
    w <- w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), in step t. torch.optim.AdamW's rule.
    """

    state_names = ("average", "square_average")
    counter_names = ("steps",)
    constants = ("betas", "adam_eps")

    @staticmethod
    def decay(parameters, gradients, lr, weight_decay):  # type: ignore[no-untyped-def]
        """Decoupled: the parameters shrink in place, the gradients are as they were."""
        if weight_decay:
            torch._foreach_sub_(parameters, torch._foreach_mul(parameters, (lr * weight_decay).to(parameters[0].dtype)))
        return gradients

    @staticmethod
    def update(parameters, gradients, states, lr, *, steps, betas, adam_eps):  # type: ignore[no-untyped-def,override]
        """One step in place, as ShardOptimizer.update says; steps float64 []: t."""
        update, first = adam_direction(gradients, states, steps=steps, betas=betas, adam_eps=adam_eps)
        torch._foreach_sub_(parameters, torch._foreach_mul(update, (lr / first).to(parameters[0].dtype)))
