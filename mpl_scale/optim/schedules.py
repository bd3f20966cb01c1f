"""Learning rates as arrays over the steps of a phase: the step reads its entry on the device, by index."""

from __future__ import annotations

import torch

from mpl_scale.config.schema import OptimConfig


def schedule(config: OptimConfig, *, steps: int, wait: int = 0) -> torch.Tensor:
    """The learning rate of every step, float32 [steps].

    The released code's rule: 0 for `wait` steps, then a linear warm-up lr (s + 1) / W over W steps, then cosine to 0
    over what remains, or lr rate**floor(s / decay_steps) counted after the warm-up, or constant.
    """
    step = torch.arange(steps, dtype=torch.float64) - wait
    warmup = config.warmup_steps
    after = (step - warmup).clamp(min=0)
    if config.schedule == "cosine":
        factor = 0.5 * (1 + torch.cos(torch.pi * after / max(1, steps - wait - warmup)))
    elif config.schedule == "exponential":
        factor = config.decay_rate ** torch.floor(after / config.decay_steps)
    else:
        factor = torch.ones_like(after)
    if warmup:
        factor = torch.where(step < warmup, (step + 1) / warmup, factor)
    return (config.lr * torch.where(step < 0, 0.0, factor)).to(torch.float32)
