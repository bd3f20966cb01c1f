"""Is a split network the unsplit one? Outputs, gradients and buffers in float64, on the ranks at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mpl_scale.mesh import Mesh
from mpl_scale.models.build import channels_of
from mpl_scale.models.passes import Pass, Passes
from mpl_scale.spatial.layout import input_columns
from mpl_scale.spatial.parallelize import Halo, parallelize, traffic

Build = Callable[[dist.ProcessGroup | None], nn.Module]
FLOOR = 1e-5
"""Gradients below this fraction of the largest are compared with that fraction: near zero only rounding differs."""


@dataclass(frozen=True)
class Differences:
    """Largest relative differences over all ranks, and the names of the worst; messages and bytes of this rank."""

    logits: float
    gradients: float
    buffers: float
    images: float  # the gradient of the input, by its columns
    worst_gradient: str
    worst_buffer: str
    messages: int
    bytes: int

    @property
    def worst(self) -> float:
        """The largest of all differences."""
        return max(self.logits, self.gradients, self.buffers, self.images)


def compare_partitioned(
    build: Build,
    *,
    mesh: Mesh,
    image_size: int,
    batch: int,
    switch_at: str = "never",
    halo: Halo = "plain",
    passes: int = 1,
    finish: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Differences:
    """Run a network split over `mesh` and unsplit, both in float64 and training mode, on the same random images.

    Every rank calls it; rank 0 runs the unsplit network on the whole batch and all ranks return the differences.

    Args:
        build: makes the network for batch norm over a group (None: unsplit) as `build_model` does, on the CPU.
        mesh: of the ranks that call this.
        image_size: pixels.
        batch: images per width group.
        switch_at, halo: as of `parallelize`.
        passes: forward and backward passes before comparing; gradients add up, batch norm learns in each.
        finish: what else the run does to the split network, in place, as recomputation.
    """
    split = _disturb(build(mesh.world_group))
    keys = list(split.state_dict())
    split = finish(parallelize(split, mesh=mesh, image_size=image_size, switch_at=switch_at, halo=halo))
    assert list(split.state_dict()) == keys, "splitting changed the state_dict"
    generator = torch.Generator().manual_seed(0)
    total = batch * mesh.data
    images = torch.randn(
        passes, total, channels_of(split), image_size, image_size, generator=generator, dtype=torch.float64
    )
    rows = slice(mesh.data_index * batch, (mesh.data_index + 1) * batch)
    columns = slice(*input_columns(image_size, mesh.width)[mesh.width_index])
    own = images[:, rows, :, :, columns].clone().requires_grad_()
    if mesh.width > 1:
        traffic(split).reset()
    logits = _run(split, own, torch.arange(total)[rows])
    sent = traffic(split) if mesh.width > 1 else None
    for parameter in split.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=mesh.world_group)
        parameter.grad /= mesh.world
    assert own.grad is not None
    whole_grad = torch.zeros_like(images)
    whole_grad[:, rows, :, :, columns] = own.grad / mesh.width / mesh.data  # see parallelize.py on the input's gradient
    dist.all_reduce(whole_grad, group=mesh.world_group)
    all_logits = torch.zeros(passes, total, logits.shape[-1], dtype=torch.float64)
    all_logits[:, rows] = logits / mesh.width
    dist.all_reduce(all_logits, group=mesh.world_group)
    drift = max(_relative(logits, all_logits[:, rows]), 0.0)  # logits must agree within the width group
    found: list[Differences | None] = [None]
    if mesh.rank == 0:
        reference = _disturb(build(None))
        images.requires_grad_()
        expected = _run(reference, images, torch.arange(total))
        assert images.grad is not None
        gradients = dict(reference.named_parameters())
        largest = max(float(p.grad.abs().max()) for p in gradients.values() if p.grad is not None)
        errors = {
            name: _relative(p.grad, gradients[name].grad, floor=FLOOR * largest) for name, p in split.named_parameters()
        }
        buffers = dict(reference.named_buffers())
        moved = {name: _relative(b, buffers[name]) for name, b in split.named_buffers()}
        worst_gradient, worst_buffer = (
            max(errors, key=errors.__getitem__),
            max(moved, key=moved.__getitem__, default=""),
        )
        found[0] = Differences(
            logits=max(_relative(all_logits, expected), drift),
            gradients=errors[worst_gradient],
            buffers=moved.get(worst_buffer, 0.0),
            images=_relative(whole_grad, images.grad, floor=FLOOR * float(images.grad.abs().max())),
            worst_gradient=worst_gradient,
            worst_buffer=worst_buffer,
            messages=sent.messages if sent else 0,
            bytes=sent.bytes if sent else 0,
        )
    dist.broadcast_object_list(found, group=mesh.world_group)
    assert found[0] is not None
    return found[0]


def _disturb(model: nn.Module) -> nn.Module:
    """float64, and no weight at a value that hides an error: zero-initialised norms, tiny layer scales."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.2 if parameter.ndim < 2 else 0.01)
    return model


def _run(model: nn.Module, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logits [passes, B, classes] of images [passes, B, 3, H, *]; gradients of the mean loss of every pass, added."""
    found = []
    context = model.passes
    assert isinstance(context, Passes)
    for step, x in enumerate(images):
        with context(Pass(seed=5, stream=0, step=torch.tensor(step), rows=rows)):
            logits = model(x)
            F.cross_entropy(logits, rows % logits.shape[1]).backward()
        found.append(logits.detach())
    return torch.stack(found)


def _relative(found: torch.Tensor | None, expected: torch.Tensor | None, *, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest expected magnitude; nan counts as infinite."""
    assert found is not None
    assert expected is not None
    if not found.numel():
        return 0.0
    difference = float((found - expected).abs().max()) / max(float(expected.abs().max()), floor, 1e-300)
    return difference if difference == difference else float("inf")
