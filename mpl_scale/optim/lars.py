"""LARS (You et al. 2017, reference [82]) over sharded state: the paper's optimiser for finetuning large students (C.4).

A parameter's gradient is scaled by its trust ratio, eta |w| / (|g| + decay |w|), then SGD with momentum takes it.
"""

from __future__ import annotations

import torch

from mpl_scale.optim.optimizers import SGD, register_optimizer
from mpl_scale.optim.whole import WholeParameters


@register_optimizer("lars")
class LARS(WholeParameters, SGD):
    """d = trust (g + decay w); v <- momentum v + d; w <- w - lr (d + momentum v) with Nesterov, else w - lr v.

    Batch norm's parameters and biases (tensors of one dimension) have trust 1, and no decay where their group has none.
    """

    def _move(self, parameters, gradients, states, lr, group):  # type: ignore[no-untyped-def]
        """See ShardOptimizer."""
        weight_decay = group["weight_decay"]
        weight, gradient = self._norms(parameters, parameters, gradients)
        ratio = self.config.trust * weight / (gradient + weight_decay * weight)
        trust = torch.where(self.is_matrix & (weight > 0) & (gradient > 0), ratio, 1.0)
        decayed = self.decay(parameters, gradients, lr, weight_decay)
        self.update(parameters, self._scaled(parameters, decayed, trust), states, lr, **self._constants)
