"""Kernels against the speed of memory, memory planned against measured, and the largest batch."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.parts import Part, Result, Setting
from benchmarks.gpu.steps import LARGE, TINY_LARGE, WARMUP_STEPS, Case
from benchmarks.kernel_classes import elementwise_speed, time_by_class
from benchmarks.timing import Clock, interleave
from benchmarks.workload import make_workload, peak_bytes, reset_peak, synthetic_batch
from mpl_scale.engine.recompute import apply_recompute
from mpl_scale.models import build_model
from mpl_scale.planner import kept_bytes, to_compute_dtype
from mpl_scale.trainer.gauge import MEASURED, Gauge

POLICIES = ("none", "bn_act", "block")
LARGEST = (("none", "live"), ("bn_act", "live"), ("block", "live"), ("block", "deferred"))


def parts(tiny: bool) -> list[Part]:
    """The parts of this module, the most valuable first."""
    large = TINY_LARGE if tiny else LARGE
    shape, parameters = ((2, 8, 16, 16), 10_000) if tiny else ((8, 432, 128, 128), 2**27)
    return [
        Part("elementwise", partial(elementwise, shape, parameters), 40),
        Part(f"kernels_{large.name}", partial(kernel_times, large), 60),
        Part("memory", partial(planned_and_measured, large), 90),
        *(
            Part(f"largest_{policy}_{teacher}", partial(largest, replace(large, recompute=policy, mu=8), teacher), 45)
            for policy, teacher in LARGEST
        ),
    ]


def elementwise(shape: tuple[int, int, int, int], parameters: int, setting: Setting) -> Result:
    """Kernels that memory bounds, as a share of what a copy reaches."""
    rows = elementwise_speed(shape=shape, parameters=parameters, device=setting.torch_device)
    return {"shape": shape, "parameters": parameters, "rows": rows}


def kernel_times(case: Case, setting: Setting) -> Result:
    """Time by kernel class of eager steps, and the step's own time beside it."""
    device = setting.torch_device
    load = make_workload(case.config(setting, graph="off"), device=device)
    for _ in range(2):
        load.step()
    whole = interleave({"step": load.step}, rounds=3, count=1, device=device)["step"]
    return {"case": vars(case), "seconds_per_step": whole, **time_by_class(load.step, steps=2, device=device)}


def planned_and_measured(case: Case, setting: Setting) -> Result:
    """By recompute policy: bytes as planned and as a run measures them (by a GPU's allocator; counted on a CPU)."""
    rows: dict[str, Any] = {}
    for policy in POLICIES:
        reset_peak(setting.torch_device)
        rows[policy] = _planned_and_measured(replace(case, recompute=policy), setting)
        setting.keep({"case": vars(case), "memory": rows})
    return {"case": vars(case), "memory": rows}


def _planned_and_measured(case: Case, setting: Setting) -> Result:
    run, device = case.config(setting), setting.torch_device
    found: Result = {"kept_bytes_per_image_bf16": _kept(case, setting)}
    try:
        load = make_workload(run, device=device)
        gauge = Gauge(run, replace(load.resolved, cost=True), load.mesh)
        for _ in range(MEASURED):
            gauge(load.runner, load.phase, load.state, next(load.source))
        cost = gauge.report()
        assert cost is not None
        found |= {"bytes": cost["bytes"], "planned_bytes": cost["planned_bytes"], "note": cost["note"]}
        if device.type == "cuda":
            for _ in range(WARMUP_STEPS):
                load.step()
            found["with_graph"] = {
                "allocated": torch.cuda.max_memory_allocated(device),
                "reserved": torch.cuda.max_memory_reserved(device),
                "eager_because": load.eager_because,
            }
    except torch.OutOfMemoryError as error:
        found["out_of_memory"] = str(error).splitlines()[0]
    return found


def _kept(case: Case, setting: Setting) -> float:
    """Bytes per image between forward and backward, by shapes alone."""
    run, count = case.config(setting), 2
    model = build_model(run.mpl.model.student, run.mpl.model, field="kept", seed=0, device="meta")
    images = torch.empty(count, 3, case.size, case.size, dtype=torch.bfloat16, device="meta")
    model = to_compute_dtype(apply_recompute(model, case.recompute), torch.bfloat16)  # type: ignore[arg-type]
    return kept_bytes(model, images) / count


def largest(case: Case, teacher: str, setting: Setting) -> Result:
    """The largest labelled batch whose eager step fits: doubled until it does not, then halved in between."""
    device = setting.torch_device
    load = make_workload(replace(case, labelled=1).config(setting, graph="off", teacher=teacher), device=device)
    tried: dict[int, int | None] = {}

    def fits(labelled: int) -> bool:
        reset_peak(device)
        phase = replace(load.phase, labelled=labelled, unlabelled=case.mu * labelled)
        batch = synthetic_batch(load.run, phase, load.mesh)
        try:
            load.phase.method.step(load.state, batch)
            Clock(device).together()
            tried[labelled] = peak_bytes(device)
        except torch.OutOfMemoryError:
            tried[labelled] = None
            for network in (load.state.teacher, load.state.student):  # a backward that was cut short leaves gradients
                for parameter in network.module.parameters():  # type: ignore[union-attr]
                    if parameter.grad is not None:
                        parameter.grad.zero_()
        del batch
        gc.collect()
        best = max((count for count, peak in tried.items() if peak is not None), default=0)
        setting.keep({"case": vars(case), "largest_labelled": best, "peak_bytes_by_labelled": tried})
        return tried[labelled] is not None

    low = 0
    for labelled in itertools.takewhile(lambda b: b <= setting.limit, (2**n for n in itertools.count())):
        if not fits(labelled):
            high = labelled
            while high - low > max(1, low // 4):
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            break
        low = labelled
    return {"case": vars(case), "largest_labelled": low, "peak_bytes_by_labelled": tried}
