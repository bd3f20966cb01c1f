"""The same Meta Pseudo Labels step as a practised user writes it with timm and torch: what ours is measured against.

Eager, autocast to bf16 where asked, torch's own foreach optimisers, gradients flattened by torch.cat for the cosine.
tests/test_benchmarks.py compares its weights after a step with mpl_scale's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mpl_scale.config import RunConfig
from mpl_scale.config.schema import NetworkConfig, OptimConfig
from mpl_scale.models.registry import find_builder
from mpl_scale.types import Batch


class ReferenceStep:
    """Both networks, their optimisers, the student's moving average and the baseline; call it with a batch.

    Args:
        run: rule cosine; constant learning rates; no dropout, drop-path, clipping or label smoothing.
        device: of everything.
    """

    def __init__(self, run: RunConfig, *, device: torch.device) -> None:
        self._config, self._device = run.mpl, device
        self._bf16 = bool(run.deepspeed.get("bf16", {}).get("enabled", False))
        self.teacher, self.student = (
            self._network(section) for section in (run.mpl.model.teacher, run.mpl.model.student)
        )
        self._teacher_optimizer = _optimizer(self.teacher, run.mpl.optim.teacher)
        self._student_optimizer = _optimizer(self.student, run.mpl.optim.student)
        self._average = [value.detach().clone() for value in _floats(self.student)]
        self._baseline = torch.zeros((), device=device)
        self._steps = 0

    def _network(self, section: NetworkConfig) -> nn.Module:
        shared = self._config.model
        with self._device:
            model = find_builder(section.name, field="reference")(num_classes=shared.num_classes, **section.kwargs)
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.momentum, layer.eps = 1.0 - shared.bn_decay, shared.bn_eps
        memory_format = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format
        return model.to(memory_format=memory_format).train()

    def _logits(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return network(images).float()

    def __call__(self, batch: Batch) -> torch.Tensor:
        """One step; returns the cosine, 0-d."""
        method = self._config.method
        count = len(batch.strong)
        x_l, x_u, x_s = (batch.normalise(pixels) for pixels in (batch.labelled, batch.weak, batch.strong))
        logits = self._logits(self.teacher, torch.cat([x_l, x_u, x_s]))
        labelled, weak, strong = logits.split([len(x_l), count, count])
        pseudo = self._pseudo_labels(weak.detach())

        student = self._logits(self.student, torch.cat([x_s, x_l]))[:count]
        F.cross_entropy(student, pseudo).backward()
        before = _flat_gradient(self.student)
        self._student_optimizer.step()
        self._student_optimizer.zero_grad()

        with _statistics_held(self.student):
            F.cross_entropy(self._logits(self.student, x_l), batch.labels).backward()
        after = _flat_gradient(self.student)
        self._student_optimizer.zero_grad()
        cosine = torch.dot(before, after) / torch.sqrt(torch.dot(before, before) * torch.dot(after, after))
        self._steps += 1
        decay = method.feedback.baseline_decay
        self._baseline.lerp_(cosine, 1.0 - decay)
        h = method.feedback.weight * (cosine - self._baseline / (1.0 - decay**self._steps))

        target = (weak.detach() / method.uda.temperature).softmax(-1)
        confident = (target.max(-1).values >= method.uda.threshold).float()
        uda = (F.cross_entropy(strong, target, reduction="none") * confident).mean()
        supervised = F.cross_entropy(labelled, batch.labels)
        (h * F.cross_entropy(weak, pseudo) + supervised + method.uda.weight * uda).backward()
        self._teacher_optimizer.step()
        self._teacher_optimizer.zero_grad()

        rate = min(method.ema_decay, self._steps / (self._steps + 9))
        torch._foreach_lerp_(self._average, [value.detach() for value in _floats(self.student)], 1.0 - rate)
        return cosine

    def _pseudo_labels(self, logits: torch.Tensor) -> torch.Tensor:
        if self._config.method.pseudo_labels == "argmax":
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def _optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    exempt = [p for p in network.parameters() if p.ndim <= 1]
    decayed = [p for p in network.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, foreach=True)
    return torch.optim.RMSprop(
        groups, lr=config.lr, alpha=config.rho, eps=config.eps, momentum=config.momentum, foreach=True
    )


def _flat_gradient(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def _floats(network: nn.Module) -> list[torch.Tensor]:
    return [value for value in (*network.parameters(), *network.buffers()) if value.is_floating_point()]


@contextmanager
def _statistics_held(network: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch, and its averages stay."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
