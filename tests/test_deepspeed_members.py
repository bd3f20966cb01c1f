"""Every private member of DeepSpeed that mpl_scale uses is there and has its shape: what a new release breaks first.

The members are read out of the source of mpl_scale/engine, so that the table below cannot fall behind it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from packaging.requirements import Requirement
from packaging.version import Version

from mpl_scale.engine.deepspeed_engine import DeepSpeedNetwork
from mpl_scale.mesh import build_mesh
from tests.support.deepspeed_cases import ACCUMULATE_FP32, CPU, ROWS, SGD, Case, Net
from tests.support.ranks import pool

WRITTEN_FOR = "0.19.8"
SOURCES = sorted(Path(__file__).parents[1].glob("mpl_scale/engine/deepspeed_*.py"))
OWNERS = {"wrapper": "wrapper", "engine": "engine", "_engine": "engine", "weight": "weight"}
"""Names in the source that stand for DeepSpeed's optimiser, its engine, and a parameter at stage 3."""
TORCHS = {"numel", "shape", "grad", "requires_grad", "data", "data_ptr", "element_size"}
"""Members of a parameter that are torch's."""

Shape = Callable[[Any], bool]


def tensors(value: Any) -> bool:
    """A list of 1-D tensors."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, torch.Tensor) and one.dim() == 1 for one in value)
    )


def groups(value: Any) -> bool:
    """A list of lists of tensors."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, torch.Tensor) for group in value for one in group)
    )


def by_index(value: Any) -> bool:
    """{0, 1, ...: ...}."""
    return isinstance(value, Mapping) and set(value) == set(range(len(value)))


def process_groups(value: Any) -> bool:
    """One for each parameter group, in a list or by number."""
    return all(isinstance(value[index], dist.ProcessGroup) for index in range(len(value))) and bool(len(value))


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


ENGINE: dict[str, Shape] = {
    "optimizer": lambda value: value is not None,
    "basic_optimizer": lambda value: hasattr(value, "init_state"),  # ours
    "param_names": lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value.values()),
    "zero_optimization_stage": callable,
    "zero_grad": callable,
    "backward": callable,
    "step": callable,
    "was_step_applied": callable,
    "set_gradient_accumulation_boundary": callable,
}
FLAT: dict[str, Shape] = {
    "single_partition_of_fp32_groups": tensors,
    "bit16_groups": groups,
    "bit16_groups_flat": tensors,
    "real_dp_process_group": process_groups,
    "averaged_gradients": lambda value: isinstance(value, dict),
    "all_grad_tensors": lambda value: isinstance(value, dict),
    "micro_step_id": whole,
    "cpu_offload": lambda value: isinstance(value, bool),
    "reset_cpu_buffers": callable,
    "update_lp_params": callable,
    "zero_grad": callable,
}
PARTITIONED: dict[str, Shape] = {
    "fp32_partitioned_groups_flat": tensors,
    "fp16_groups": groups,
    "sub_group_process_groups": process_groups,
    "sub_group_to_group_id": by_index,
    "averaged_gradients": lambda value: isinstance(value, dict),
    "grad_partitions_flat_buffer": lambda value: isinstance(value, torch.Tensor),
    "offload_optimizer": lambda value: isinstance(value, bool),
    "reset_cpu_buffers": callable,
    "zero_grad": callable,
    "_partition_all_parameters": callable,
    "_reassign_or_swap_out_partitioned_parameters": callable,
}
WEIGHT: dict[str, Shape] = {
    "partition_numel": callable,
    "ds_numel": whole,
    "ds_shape": lambda v: isinstance(v, torch.Size),
}
WRAPPERS: dict[str, tuple[Case, str, dict[str, Shape]]] = {
    "stage 0": (Case(0), "", {}),
    "stage 0, bf16": (Case(0, bf16=True), "FP16_UnfusedOptimizer", {"fp32_groups": groups, "fp16_groups": groups}),
    "stage 1": (Case(1), "DeepSpeedZeroOptimizer", FLAT),
    "stage 2, bf16": (Case(2, bf16=True), "DeepSpeedZeroOptimizer", FLAT),
    "stage 2, offload": (
        Case(2, zero={"offload_optimizer": {"device": "cpu"}}),
        "DeepSpeedZeroOptimizer",
        {**FLAT, "_offload_accumulated_param_ids": lambda value: isinstance(value, set)},
    ),
    "stage 1, fp32 accumulation": (
        Case(1, bf16=True, top=ACCUMULATE_FP32),
        "BF16_Optimizer",
        {
            "fp32_groups_flat_partition": tensors,
            "fp32_groups_gradient_flat_partition": tensors,
            "fp32_groups_gradients_flat": tensors,
            "bf16_groups": groups,
            "bf16_groups_flat": tensors,
            "real_dp_process_group": process_groups,
            "update_lp_params": callable,
            "zero_grad": callable,
        },
    ),
    "stage 3": (Case(3), "DeepSpeedZeroOptimizer_Stage3", PARTITIONED),
}
"""By kind of engine: its case, the class of its optimiser ("": ours, bare), and what that class must have."""


def used() -> Iterator[tuple[str, str]]:
    """(engine, wrapper or weight; member) of every access in the source."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                owner, (member,) = node.args[0], [arg.value for arg in node.args[1:] if isinstance(arg, ast.Constant)]
                if isinstance(owner, ast.Attribute) and owner.attr in ("wrapper", "optimizer"):
                    yield "wrapper", member
            if isinstance(node, ast.Attribute):
                name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if name in OWNERS:
                    yield OWNERS[name], node.attr


def missing(owner: Any, members: Mapping[str, Shape]) -> list[str]:
    """What an object has not, or not as expected."""
    found = []
    for name, shape in members.items():
        if not hasattr(owner, name):
            found.append(f"{type(owner).__name__}.{name} is gone")
        elif not shape(getattr(owner, name)):
            found.append(f"{type(owner).__name__}.{name} is {type(getattr(owner, name)).__name__}, not as before")
    return found


def look(kind: str) -> Sequence[str]:
    """On each rank: what an engine after one backward pass lacks."""
    case, expected, members = WRAPPERS[kind]
    mesh = build_mesh(device=CPU)
    network = DeepSpeedNetwork(Net(3, 0), optim=SGD, ds_config=case.ds_config(), mesh=mesh)
    images = torch.randn(ROWS, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    network.accumulate(F.cross_entropy(network.forward(images), torch.zeros(ROWS, dtype=torch.int64)))
    network.reduce()
    engine = network._engine
    wrapper = engine.optimizer
    found = missing(engine, ENGINE) + missing(wrapper, members)
    if expected and type(wrapper).__name__ != expected:
        found.append(f"the optimiser is a {type(wrapper).__name__}, not a {expected}")
    if case.stage == 3:
        found += missing(wrapper.fp16_groups[0][0], WEIGHT)
    network.discard()
    engine.destroy()
    return found


@pytest.mark.parametrize("kind", WRAPPERS)
def test_deepspeed_has_what_the_engine_reaches_for(kind: str) -> None:
    for found in pool(2).run(look, kind):
        assert not found, (
            f"DeepSpeed {version('deepspeed')} is not as mpl_scale/engine/deepspeed_shards.py expects it (written for "
            f"{WRITTEN_FOR}): {'; '.join(found)}"
        )


def test_the_table_names_every_member_that_is_used() -> None:
    named = {("engine", name) for name in ENGINE} | {("weight", name) for name in WEIGHT}
    named |= {("wrapper", name) for _, _, members in WRAPPERS.values() for name in members}
    assert {(owner, name) for owner, name in used() if name not in TORCHS} == named


def test_a_member_that_is_gone_or_changed_is_named() -> None:
    network = torch.nn.Linear(1, 1)
    assert missing(network, {"weight": callable, "micro_step_id": whole, "forward": callable}) == [
        "Linear.weight is Parameter, not as before",
        "Linear.micro_step_id is gone",
    ]


def test_the_release_is_pinned() -> None:
    """~= 0.19.8: patches of 0.19 that come later, nothing else; and one of these is installed."""
    root = Path(__file__).parents[1]
    (line,) = [line for line in (root / "setup.py").read_text().splitlines() if '"deepspeed' in line]
    pinned = Requirement(line.strip().split('"')[1])
    assert str(pinned.specifier) == f"~={WRITTEN_FOR}"
    assert Version(version("deepspeed")) in pinned.specifier, "run the tests of this file before raising the pin"
