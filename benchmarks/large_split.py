"""A network too large for float64 copies, split by width over local ranks against itself whole: one pass in float32.

    torchrun --nproc_per_node 4 -m benchmarks.large_split --model tf_efficientnet_l2 --size 128

Rank 0 runs the whole network first and leaves its gradients in a file; then all ranks hold the split network. The
relative difference of two float32 runs is rounding, enlarged by depth and batch norm, so the whole network is also run
on images that differ by one part in 2**23: what that moves the gradient by is printed beside.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.mesh import Mesh, build_mesh, choose_device, start_process_group
from mpl_scale.models import Pass, build_model
from mpl_scale.models.passes import within
from mpl_scale.spatial import input_columns, parallelize, traffic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_l2")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--switch_at", default="never")
    parser.add_argument("--halo", default="plain", choices=("plain", "block_input"))
    options = parser.parse_args()
    start_process_group(choose_device(os.environ), timeout_seconds=3600)
    world = dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    mesh = build_mesh(device=torch.device("cpu"), width=world)
    folder = [tempfile.mkdtemp(prefix="large_split")]
    dist.broadcast_object_list(folder, src=0)
    whole, nudged = Path(folder[0]) / "whole.safetensors", Path(folder[0]) / "nudged.safetensors"
    images = torch.randn(options.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    if mesh.is_main:
        model = build(options, None)
        print(f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters, float32, {world} ranks")
        for path, pixels in ((whole, images), (nudged, images * (1 + 2**-23))):
            model.zero_grad()
            logits = run(model, pixels)
            save_file({"logits": logits, **{name: p.grad for name, p in model.named_parameters()}}, path)
            model = build(options, None)
        del model
    dist.barrier()
    split = parallelize(
        build(options, mesh.world_group),
        mesh=mesh,
        image_size=options.size,
        switch_at=options.switch_at,
        halo=options.halo,
    )
    columns = slice(*input_columns(options.size, world)[mesh.width_index])
    logits = run(split, images[..., columns].contiguous())
    sent = traffic(split)
    difference, rounding = compare(split, logits, whole, nudged, mesh)
    if mesh.is_main:
        print(f"columns {columns.start} to {columns.stop}: {sent.messages} messages, {sent.bytes:,} bytes sent")
        print(f"split against whole:      logits {difference[0]:.2e}, gradient {difference[1]:.2e}")
        print(f"whole against nudged:     logits {rounding[0]:.2e}, gradient {rounding[1]:.2e}")
        whole.unlink()
        nudged.unlink()
    dist.destroy_process_group()
    return 0


def build(options: argparse.Namespace, group: dist.ProcessGroup | None) -> nn.Module:
    """The network, with the same weights on every call."""
    section = NetworkConfig(name=options.model)
    shared = ModelConfig(teacher=section, student=section, num_classes=1000, image_size=options.size)
    return build_model(section, shared, field="--model", seed=0, group=group)


def run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """One forward and backward; the gradient is left in the parameters. Logits [B, classes]."""
    rows = torch.arange(len(images))
    with within(Pass(seed=0, stream=0, step=torch.zeros((), dtype=torch.int64), rows=rows), model):
        logits = model(images)
    F.cross_entropy(logits, rows).backward()
    return logits.detach()


def compare(
    split: nn.Module, logits: torch.Tensor, whole: Path, nudged: Path, mesh: Mesh
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Relative norms of the differences (logits, whole gradient): split to whole, nudged to whole. On rank 0."""
    squares = torch.zeros(3, dtype=torch.float64)  # of split - whole, nudged - whole, whole
    with safe_open(whole, framework="pt") as a, safe_open(nudged, framework="pt") as b:
        for name, parameter in split.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=mesh.world_group)
            if mesh.is_main:
                expected = a.get_tensor(name)
                found = parameter.grad / mesh.world
                squares += torch.stack(
                    [t.double().square().sum() for t in (found - expected, b.get_tensor(name) - expected, expected)]
                )
            parameter.grad = None
        expected, moved = a.get_tensor("logits"), b.get_tensor("logits")
    of_logits = [float((t - expected).norm() / expected.norm()) for t in (logits, moved)]
    of_gradient = (squares[:2] / squares[2]).sqrt().tolist()
    return (of_logits[0], of_gradient[0]), (of_logits[1], of_gradient[1])


if __name__ == "__main__":
    sys.exit(main())
