"""LAMB (You et al., 2020) over sharded state: AdamW's direction, scaled for each parameter to the norm of its weights.

timm's Lamb with its defaults but for max_grad_norm, which is `gradient_clipping` here: the trust ratio is not clipped
(trust_clip = False), and parameters without weight decay keep ratio 1 (always_adapt = False).
"""

from __future__ import annotations

import torch

from mpl_scale.optim.adamw import AdamW, adam_direction
from mpl_scale.optim.optimizers import register_optimizer
from mpl_scale.optim.whole import WholeParameters


@register_optimizer("lamb")
class LAMB(WholeParameters, AdamW):
    """d = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w; w <- w - lr (|w| / |d|) d, m and v as AdamW's.

    The ratio is 1 where a norm is 0, and in a group without weight decay, whose rule is AdamW's.
    """

    def _move(self, parameters, gradients, states, lr, group):  # type: ignore[no-untyped-def]
        """See ShardOptimizer."""
        dtype, weight_decay = parameters[0].dtype, group["weight_decay"]
        direction, first = adam_direction(gradients, states, **self.counters, **self._constants)
        direction = list(torch._foreach_div(direction, first.to(dtype)))
        if weight_decay:
            torch._foreach_add_(direction, parameters, alpha=weight_decay)
            weight, step = self._norms(parameters, parameters, direction)
            ratio = torch.where((weight > 0) & (step > 0), weight / step, 1.0)
            direction = self._scaled(parameters, direction, ratio)
        torch._foreach_sub_(parameters, torch._foreach_mul(direction, lr.to(dtype)))
