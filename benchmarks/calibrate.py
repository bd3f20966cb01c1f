"""What this machine really reaches, for `mpl-scale plan --calibration FILE`: rates by kind of layer, and collectives.

    python -m benchmarks.calibrate --output my-node.json
    torchrun --nproc_per_node 2 -m benchmarks.calibrate --output my-node.json       # all-reduces as well

The peak is what a large matrix product reaches, the bandwidth what a copy does. Each kind of layer runs in a shape that
arithmetic decides and in one that memory decides, forward and backward, in bf16 on a GPU and fp32 on a CPU. Decoding is
left as the planner assumes it (benchmarks.data measures it). One process alone leaves the collectives assumed too.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks import report
from benchmarks.timing import interleave
from mpl_scale.device import Numerics
from mpl_scale.mesh import adopt_slurm_environment, choose_device, start_process_group

ROUNDS = 5


def main(arguments: list[str] | None = None) -> int:
    """Parse the options, measure and write the calibration; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/calibration.json"))
    parser.add_argument("--scale", type=int, default=1, help="multiply the sizes, so that a GPU has enough to do")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    options = parser.parse_args(arguments)
    adopt_slurm_environment(os.environ)
    device = choose_device(os.environ)
    Numerics().apply(device)
    owns_group = not dist.is_initialized()
    if owns_group:
        start_process_group(device, timeout_seconds=600)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    document = measure(device, scale=options.scale)
    if dist.get_rank() == 0:
        for name, value in {**document["device"], **document["reached"]}.items():
            print(f"{name}: {value}")
        report.write(options.output, document)
        print(f"written: {options.output}")
    if owns_group:
        dist.destroy_process_group()
    return 0


def measure(device: torch.device, *, scale: int = 1) -> dict[str, Any]:
    """The calibration: {"device": fields of planner.hardware.Device, "reached": fields of Reached}."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def seconds(function: Callable[[], Any], count: int = 1) -> float:
        function()
        return statistics.median(interleave({"": function}, rounds=ROUNDS, count=count, device=device)[""])

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    n = 1024 * scale
    a, b = numbers(n, n), numbers(n, n)
    peak = 2 * n**3 / seconds(lambda: torch.mm(a, b))
    line = numbers(scale << 24)  # a GPU's cache holds tens of megabytes
    target = torch.empty_like(line)
    bandwidth = 2 * line.numel() * line.element_size() / seconds(lambda: target.copy_(line))
    arithmetic, traffic = {}, {}
    for kind, shapes in _SHAPES.items():
        heavy, light = (_layer(kind, *shape, scale=scale, numbers=numbers) for shape in shapes)
        run, macs, _ = heavy
        arithmetic[kind] = _share(2 * 3 * macs / seconds(run), peak)
        run, _, size = light
        traffic[kind] = _share(size / seconds(run), bandwidth)
    gate = seconds(lambda: F.silu(line))
    traffic["elementwise"] = traffic["norm"] = _share(2 * line.numel() * line.element_size() / gate, bandwidth)
    small = torch.zeros(1, device=device)
    reached: dict[str, Any] = {"arithmetic": arithmetic, "traffic": traffic}
    reached["launch"] = seconds(lambda: small.add_(1.0), 1000)
    found: dict[str, Any] = {"peak": peak, "bandwidth": bandwidth}
    if dist.get_world_size() > 1:
        rate, latency = _collectives(device, seconds)
        found["link"] = rate
        reached |= {"link": 1.0, "link_latency": latency}
    return {**report.provenance("benchmarks.calibrate", device), "device": found, "reached": reached}


# (batch, channels in, channels out, pixels a side, kernel): arithmetic decides, then memory decides.
_SHAPES = {
    "dense": ((4, 128, 128, 28, 3), (4, 8, 8, 112, 3)),
    "pointwise": ((4, 512, 512, 14, 1), (4, 16, 16, 112, 1)),
    "depthwise": ((4, 128, 128, 28, 5), (4, 128, 128, 56, 3)),
    "linear": ((256, 1024, 1024, 1, 1), (8, 2048, 1024, 1, 1)),
}


def _layer(
    kind: str, batch: int, inputs: int, outputs: int, side: int, kernel: int, *, scale: int, numbers: Callable[..., Any]
) -> tuple[Callable[[], None], int, int]:
    """A forward and backward pass, the multiply-accumulates of the forward one, and the bytes that both move."""
    batch *= scale
    groups = inputs if kind == "depthwise" else 1
    if kind == "linear":
        x, weight = numbers(batch, inputs), numbers(outputs, inputs)
    else:
        x, weight = numbers(batch, inputs, side, side), numbers(outputs, inputs // groups, kernel, kernel)
    x.requires_grad_()
    weight.requires_grad_()

    def forward() -> torch.Tensor:
        if kind == "linear":
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=kernel // 2, groups=groups)

    y = forward()
    dy = torch.ones_like(y)

    def run() -> None:
        torch.autograd.grad(forward(), (x, weight), dy)

    tensors = (x, weight, y)  # forward once; backward reads all of them, and writes two
    size = sum(t.numel() * t.element_size() for t in tensors) + sum(
        t.numel() * t.element_size() for t in (*tensors, x, weight)
    )
    return run, y.numel() * (weight.numel() // outputs), size


def _share(rate: float, peak: float) -> float:
    """The measured rate as a share of the peak, at most 1: a rate above the peak is a cache's."""
    return min(rate / peak, 1.0)


def _collectives(device: torch.device, seconds: Callable[..., float]) -> tuple[float, float]:
    """Bytes per second of a large all-reduce as planner.duration counts them, and seconds of a small one a doubling."""
    ranks = dist.get_world_size()
    small, large = torch.zeros(2, device=device), torch.zeros(1 << 22, device=device)
    latency = seconds(lambda: dist.all_reduce(small), 20)
    size = 2 * (ranks - 1) / ranks * large.numel() * large.element_size()
    rate = size / max(seconds(lambda: dist.all_reduce(large)) - latency, 1e-9)
    return rate, latency / math.log2(ranks)


if __name__ == "__main__":
    sys.exit(main())
