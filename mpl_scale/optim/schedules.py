"""Learning rates as arrays over the steps of a phase: the step reads its entry on the device, by index.

In all of them W warm-up steps come first, lr (s + 1) / W, and what remains is counted from there: t of T.

| schedule | rate | torch's |
|---|---|---|
| cosine | min + (lr - min) (1 + cos(pi t / T)) / 2 | CosineAnnealingLR(T, min) |
| linear | lr + (min - lr) t / T | LinearLR(1, min / lr, T) |
| exponential | lr rate^floor(t / decay_steps) | StepLR(decay_steps, rate) |
| step | lr rate^(milestones passed), in steps of the phase | MultiStepLR(milestones, rate) |
| one_cycle | a cosine from start_fraction lr to lr over the W steps, one from lr to min over the others | OneCycleLR |
| constant | lr | ConstantLR(1) |
"""

from __future__ import annotations

import torch

from mpl_scale.config.schema import OptimConfig


def schedule(config: OptimConfig, *, steps: int, wait: int = 0) -> torch.Tensor:
    """The learning rate of every step, float32 [steps]: 0 for `wait` steps, then the schedule over what remains."""
    step = torch.arange(steps, dtype=torch.float64) - wait
    lr, low, warmup, total = config.lr, config.min_lr, config.warmup_steps, steps - wait
    after, rest = (step - warmup).clamp(min=0), max(1, total - warmup)
    if config.schedule == "cosine":
        rate = _cosine(lr, low, after / rest)
    elif config.schedule == "linear":
        rate = lr + (low - lr) * after / rest
    elif config.schedule == "exponential":
        rate = lr * config.decay_rate ** torch.floor(after / config.decay_steps)
    elif config.schedule == "step":
        passed = torch.bucketize(step, torch.tensor(config.milestones, dtype=torch.float64), right=True)
        rate = lr * config.decay_rate**passed
    elif config.schedule == "one_cycle":  # the peak is the last step of the warm-up, as torch's
        rise, fall = step / (warmup - 1), (step - (warmup - 1)) / rest
        rate = torch.where(step < warmup, _cosine(config.start_fraction * lr, lr, rise), _cosine(lr, low, fall))
    else:
        rate = torch.full_like(after, lr)
    if warmup and config.schedule != "one_cycle":
        rate = torch.where(step < warmup, lr * (step + 1) / warmup, rate)
    return torch.where(step < 0, 0.0, rate).to(torch.float32)


def _cosine(first: float, last: float, share: torch.Tensor) -> torch.Tensor:
    """Half a cosine from first (share 0) to last (share 1)."""
    return last + (first - last) * 0.5 * (1 + torch.cos(torch.pi * share))
