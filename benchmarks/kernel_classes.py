"""Where a device's time goes: kernels grouped by what they do, and elementwise kernels against memory's speed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import interleave
from mpl_scale.config.schema import OptimConfig
from mpl_scale.models import Pass, Passes
from mpl_scale.models.layers import convert
from mpl_scale.optim import build_optimizer

KERNEL_CLASSES = {
    "collectives": r"nccl|gloo|all_reduce|allreduce|all_gather|reduce_scatter|c10d",
    "memcpy": r"memcpy|memset|aten::copy_|aten::fill_|aten::zero_|aten::clone|aten::cat|CatArray|direct_copy",
    "depthwise": r"depthwise|dgrad2d_grouped|conv2d_grouped|grouped_direct",
    "convolution_and_matrix_product": r"conv|gemm|cutlass|xmma|sm\d\d_|fprop|dgrad|wgrad|cudnn.*engine|mkldnn"
    r"|nchwToNhwc|nhwcToNchw|aten::(mm|addmm|bmm|linear)",
    "optimiser": r"multi_tensor|foreach",
    "batch_norm": r"batch_?norm|bn_|welford",
    "reduction": r"reduce|softmax|aten::(sum|mean|var_mean|dot)|dot_kernel",
    "elementwise": r"elementwise|vectorized|triton|aten::|unrolled|pointwise|index|scatter|gather|where|pad",
}
"""First match wins; a name that matches none is `other`."""


def classify(name: str) -> str:
    """The class of a kernel's (or, on a CPU, an operator's) name."""
    return next((kind for kind, pattern in KERNEL_CLASSES.items() if re.search(pattern, name, re.I)), "other")


def time_by_class(step: Callable[[], Any], *, steps: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds a step by class and the longest kernels; on a CPU of operators, each without those it calls."""
    cuda = device.type == "cuda"
    step()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize(device)
    times: Counter[str] = Counter()
    launches = 0
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            times[event.key] += microseconds / 1e3 / steps
            launches += event.count
    classes: Counter[str] = Counter()
    for name, milliseconds in times.items():
        classes[classify(name)] += milliseconds
    return {
        "ms_per_step": dict(classes.most_common()),
        "ms_per_step_in_all": sum(classes.values()),
        "launches_per_step": launches / steps,
        "longest": [
            {"name": name[:160], "class": classify(name), "ms_per_step": ms} for name, ms in times.most_common(25)
        ],
    }


def elementwise_speed(*, shape: tuple[int, int, int, int], parameters: int, device: torch.device) -> dict[str, Any]:
    """Least bytes over time of the kernels that memory bounds, and as a share of a copy's rate measured beside them.

    Args:
        shape: [B, C, H, W] of batch norm with SiLU, in bf16 on a GPU.
        parameters: elements of the optimiser's flat shard.
        device: where.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    size = x.numel() * x.element_size()
    passes = Passes()
    layer = convert(torch.nn.BatchNorm2d(shape[1]), passes=passes, group=None).to(device)
    number, rows = torch.zeros((), dtype=torch.int64, device=device), torch.arange(shape[0], device=device)

    def forward() -> torch.Tensor:
        with passes(Pass(seed=0, stream=0, step=number, rows=rows)):
            return torch.nn.functional.silu(layer(x))

    gradient = torch.randn_like(x)

    def both() -> None:
        torch.autograd.grad(forward(), x, gradient)

    source = torch.randn(parameters, device=device)
    target = torch.zeros_like(source)
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: target.copy_(source), 8 * parameters),
        # forward: statistics read x, normalisation reads it and writes y; backward: x and dy twice, dx
        "batch_norm_silu_forward": (lambda: torch.no_grad()(forward)(), 3 * size),
        "batch_norm_silu_forward_backward": (both, 8 * size),
        "moving_average": (lambda: target.lerp_(source, 0.01), 12 * parameters),
    }
    for name, tensors in (("sgd", 5), ("rmsprop", 7)):  # weight, gradient, states read; weight, states written
        work[name] = (_update(name, parameters, device), tensors * 4 * parameters)
    steps = {name: function for name, (function, _) in work.items()}
    for function in steps.values():
        function()
    seconds = interleave(steps, rounds=5, count=3, device=device)
    rates = {name: work[name][1] / min(seconds[name]) / 1e12 for name in work}
    return {
        name: {
            "least_bytes": work[name][1],
            "seconds": seconds[name],
            "terabytes_per_second": rates[name],
            "share_of_copy": rates[name] / rates["copy"],
        }
        for name in work
    }


def _update(name: str, parameters: int, device: torch.device) -> Callable[[], None]:
    shard = torch.nn.Parameter(torch.randn(parameters, device=device))
    shard.grad = torch.randn(parameters, device=device)
    optimizer = build_optimizer([{"params": [shard], "weight_decay": 0.0}], OptimConfig(name=name, lr=0.1))
    optimizer.init_state()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-6, device=device)
    return optimizer.step
