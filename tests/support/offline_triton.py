"""Compile the Triton kernels that inductor makes of the package's loops, for GPUs that are not here.

`python -m tests.support.offline_triton 80 90` prints JSON lists of [loop, kernel, architecture, bytes of machine code].
A process of its own: what it tells torch and triton about the GPU stays in their caches. Needs neither GPU nor driver;
the assembler comes with triton. Shapes are static here, and of each kernel the first configuration is compiled.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from mpl_scale.config.schema import OptimConfig
from mpl_scale.models.kernels import Activation, loops
from mpl_scale.optim import OPTIMIZERS

GPU = torch.device("cuda", 0)


def pretend(stack: ExitStack, capability: int) -> list[Any]:
    """Have torch and triton find one GPU of that compute capability; the list gets what triton compiles."""
    properties = SimpleNamespace(
        type="cuda",
        index=0,
        name="",
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=108,
        total_memory=80 << 30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        L2_cache_size=40 << 20,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=166912,
    )
    compiled: list[Any] = []
    compile_ = triton.compile

    def record(*args: Any, **kwargs: Any) -> Any:
        compiled.append(compile_(*args, **kwargs))
        return compiled[-1]

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: CudaInterface,
    )
    triton.runtime.driver.set_active(target)
    for where, name, value in (
        (CudaInterface, "get_device_properties", staticmethod(lambda *_: properties)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: properties)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *_: capability)),
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "get_device_capability", lambda *_: (properties.major, properties.minor)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "is_available", lambda: True),
        (torch._inductor.runtime.triton_helpers, "set_driver_to_gpu", lambda: None),
        (triton, "compile", record),
    ):
        stack.enter_context(mock.patch.object(where, name, value))
    return compiled


def jobs() -> Iterator[tuple[str, Callable[..., Any], list[torch.Tensor]]]:
    """(name, function, arguments) of every loop of batch norm, on bfloat16, and every elementwise optimiser."""
    x, dy = (torch.empty(8, 16, 64, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    c = [torch.empty(16, device=GPU) for _ in range(5)]
    sums = torch.empty(33, dtype=torch.float64, device=GPU)
    ours = loops("eager", Activation("silu"), torch.bfloat16)
    yield "sums", ours.sums, [x]
    yield "statistics", lambda t, w, b: ours.statistics(t, w, b, 1e-3), [sums, *c[:2]]
    yield "normalise", ours.normalise, [x, *c[:2]]
    tracked = torch.empty((), dtype=torch.int64, device=GPU)

    def learn(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ours.learn(*given, 0.1, 1)
        return given[:3]

    yield "learn", learn, [*c[:2], tracked, *c[2:4], sums]
    yield "gradient_sums", ours.gradient_sums, [dy, x, *c[:4]]
    yield "through_statistics", ours.through_statistics, [sums[:-1].clone(), sums, c[0]]
    yield "gradient_input", ours.gradient_input, [dy, x, *c[:5]]
    yield "forward", lambda x, w, b: ours.forward(x, w, b, 1e-3), [x, *c[:2]]
    yield "backward", ours.backward, [dy, x, *c[:4], sums]
    for name, kind in OPTIMIZERS.items():
        if kind.elementwise:
            shards = [torch.empty(1000, device=GPU) for _ in range(2 + len(kind.state_names))]
            counters = [torch.empty((), dtype=torch.float64, device=GPU) for _ in kind.counter_names]
            yield name, _update(name), [*counters, *shards]


def _update(name: str) -> Callable[..., Any]:
    rule, config = OPTIMIZERS[name], OptimConfig(name=name, lr=0.1)
    constants = {constant: getattr(config, constant) for constant in rule.constants}

    def update(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(rule.counter_names)
        counters = dict(zip(rule.counter_names, given, strict=False))
        master, gradient, *states = given[count:]
        named = {state: [shard] for state, shard in zip(rule.state_names, states, strict=True)}
        rule.update([master], [gradient], named, gradient.sum(), **counters, **constants)  # a 0-d rate
        return master, *states

    return update


def kernels_of(
    graph: torch.fx.GraphModule, arguments: list[torch.Tensor], mode: FakeTensorMode, folder: Path
) -> Iterator[tuple[str, Any]]:
    """Inductor's kernels, loaded from the code that it writes for a graph."""
    lowering = GraphLowering(graph, example_inputs=arguments, shape_env=None)
    with DebugContext(), V.set_graph_handler(lowering), V.set_fake_mode(mode):
        lowering.run(*arguments)
        code = lowering.codegen()[0]
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", getattr(code, "value", code), re.S):
        path = Path(tempfile.mkdtemp(dir=folder)) / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield name, getattr(module, name)


def main(capabilities: list[int]) -> None:
    """Print what was compiled."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        traced = [
            (name, make_fx(functionalize(function), select_decomp_table())(*arguments), arguments)
            for name, function, arguments in jobs()
        ]
        for capability in capabilities:
            with ExitStack() as stack:
                compiled = pretend(stack, capability)
                torch._inductor.runtime.hints.DeviceProperties.create.cache_clear()
                for name, graph, arguments in traced:
                    for kernel, tuner in kernels_of(graph, arguments, mode, Path(folder)):
                        tuner._precompile_config(tuner.configs[0])
                        made = compiled[-1]
                        rows.append([name, kernel, made.metadata.target.arch, len(made.asm["cubin"])])
    print(json.dumps(rows))


if __name__ == "__main__":
    main([int(capability) for capability in sys.argv[1:]])
