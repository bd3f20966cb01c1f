"""Steps that take turns in one process: that of timm and torch; ours eager, without the fast path, and as a graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import Part, Result, Setting, first_line
from benchmarks.reference_step import ReferenceStep
from benchmarks.throughput import phases
from benchmarks.timing import Clock, interleave, ratios
from benchmarks.workload import Workload, make_workload, peak_bytes, peak_tflops, reset_peak, synthetic_batch
from mpl_scale.config import RunConfig, check
from mpl_scale.config.schema import Config
from mpl_scale.engine.graph import StepRunner
from mpl_scale.mesh import build_mesh
from mpl_scale.trainer.phases import plan_phases
from mpl_scale.types import Batch

PLAIN = {"graph": "off", "kernels": "eager", "channels_last": "off"}
"""Without the fast path: torch's own operators and layout."""
WARMUP_STEPS = 5
"""A graph is captured at the fourth."""


@dataclass(frozen=True)
class Case:
    """One step to time: B = labelled images, U = mu B."""

    model: str
    size: int
    labelled: int
    mu: int
    optimizer: str = "sgd"
    recompute: str = "none"

    @property
    def name(self) -> str:
        """Model, size, batch and recomputation: the key of the case in results."""
        suffix = "" if self.recompute == "none" else f"_{self.recompute}"
        return f"{self.model}_{self.size}_{self.labelled}x{self.mu}{suffix}"

    def config(self, setting: Setting, **parallel: Any) -> RunConfig:
        """Engine flat on one device unless `parallel` says otherwise, bf16 on a GPU, rule cosine."""
        network = {"name": self.model}
        optim = {"name": self.optimizer, "lr": 1e-4, "schedule": "constant", "weight_decay": 1e-5}
        section = {
            "model": {
                "teacher": network,
                "student": network,
                "num_classes": 1000 if self.size > 32 else 10,
                "image_size": self.size,
            },
            "data": {"unlabelled_ratio": self.mu},
            "optim": {"teacher": optim, "student": optim},
            "phases": {"train": {"steps": 1_000_000}},
            "parallel": {"engine": "flat", "recompute": self.recompute, **parallel},
        }
        deepspeed = {"train_batch_size": self.labelled, "bf16": {"enabled": setting.device == "cuda"}}
        return RunConfig(path=Path("benchmarks/gpu/steps.py"), mpl=Config.model_validate(section), deepspeed=deepspeed)


FULL = {  # and the seconds each may take on a GPU; what decides most comes first
    Case("wide_resnet28_2", 32, 128, 7): 60,
    Case("resnet50", 224, 16, 3): 60,
    Case("tf_efficientnet_l2", 512, 1, 1, "rmsprop"): 90,
    Case("tf_efficientnet_l2", 512, 1, 3, "rmsprop", "bn_act"): 90,
    Case("tf_efficientnet_b0", 224, 1, 1): 60,
    Case("tf_efficientnet_b0", 224, 16, 3): 60,
    Case("tf_efficientnet_b5", 456, 4, 3): 75,
}
LARGE = Case("tf_efficientnet_l2", 512, 1, 3, "rmsprop", "bn_act")
TINY = {Case("digits_cnn", 8, 2, 2): 60, Case("digits_cnn", 8, 1, 2, "rmsprop", "bn_act"): 60}
TINY_LARGE = Case("digits_cnn", 8, 1, 2, "rmsprop", "bn_act")


def parts(tiny: bool) -> list[Part]:
    """One part for each case."""
    return [
        Part(f"step_{case.name}", partial(compare_steps, case), seconds)
        for case, seconds in (TINY if tiny else FULL).items()
    ]


@dataclass
class _Turns:
    """The steps of a case, those that could be prepared, and why the others could not."""

    case: Case
    setting: Setting
    loads: dict[str, Workload] = field(default_factory=dict)
    steps: dict[str, Callable[[], Any]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def prepare(self, name: str, make: Callable[[], Callable[[], Any]]) -> None:
        """Build and warm up; what does not fit or fails is named and left out."""
        device = self.setting.torch_device
        reset_peak(device)
        try:
            step = make()
            for _ in range(WARMUP_STEPS if device.type == "cuda" else 1):
                step()
            Clock(device).together()
        except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
            self.failures[name] = first_line(error)
            return
        self.steps[name], self.peaks[name] = step, peak_bytes(device)

    def ours(self, name: str, **parallel: Any) -> Callable[[], Any]:
        """The step of a new workload with these `parallel` settings."""
        setting = self.setting
        load = make_workload(self.case.config(setting, **parallel), device=setting.torch_device)
        self.loads[name] = load
        return load.step

    def reference(self) -> Callable[[], Any]:
        """The same networks and batch sizes as timm and torch users write the step."""
        run = replace(self.case, recompute="none").config(self.setting)
        device = self.setting.torch_device
        reference, batch = ReferenceStep(run, device=device), _batch(run, device)
        return lambda: reference(batch)

    def replayed(self) -> Callable[[], Any]:
        """The eager workload's own networks, so that both fit; on a CPU the same runner calls the step."""
        load = self.loads["eager"]
        capture = load.mesh.device.type == "cuda"
        runner = StepRunner(load.phase.method.step, load.state, capture=capture)  # a failed capture is this row's
        return lambda: runner(next(load.source))

    def measured(self, *, rounds: int) -> Result:
        """Times of all that was prepared, and what follows from them."""
        device, case = self.setting.torch_device, self.case
        if not self.steps:
            return {"case": vars(case), "failures": self.failures}
        count = min(_count(step, self.setting.turn, device) for step in self.steps.values())
        seconds = interleave(self.steps, rounds=rounds, count=count, device=device)
        load = next(iter(self.loads.values()), None)
        peak = peak_tflops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        flops = None if load is None else load.flops()
        return {
            "case": vars(case),
            "rows": {name: self._row(name, found, flops, peak) for name, found in seconds.items()},
            "time_ratios": ratios(seconds),
            "failures": self.failures,
            "flops_per_step": flops,
            "peak_tflops": peak,
        }

    def _row(self, name: str, seconds: list[float], flops: int | None, peak: float | None) -> Mapping[str, Any]:
        median = statistics.median(seconds)
        return {
            "seconds_per_step": seconds,
            "images_per_second": self.case.labelled * (1 + self.case.mu) / median,
            "mfu": None if flops is None or peak is None else flops / median / (peak * 1e12),
            "peak_bytes": self.peaks[name],
        }


def compare_steps(case: Case, setting: Setting) -> Result:
    """Reference, eager, plain and graph in turns. MFU divides multiply-accumulates counted by hooks."""
    turns = _Turns(case, setting)
    turns.prepare("reference", turns.reference)
    turns.prepare("eager", lambda: turns.ours("eager", graph="off"))
    turns.prepare("plain", lambda: turns.ours("plain", **PLAIN))
    if "eager" in turns.steps:
        setting.keep(turns.measured(rounds=1))  # should the capture take the process along
        turns.prepare("graph", turns.replayed)
    result = turns.measured(rounds=setting.rounds)
    if "eager" in turns.steps:
        result["eager_phases_ms"] = phases(turns.loads["eager"], 3, device=setting.torch_device)
    return result


def _batch(run: RunConfig, device: torch.device) -> Batch:
    batches = check(run, world=1, cuda=device.type == "cuda")
    return synthetic_batch(run, plan_phases(run.mpl, batches, max_steps=None)[-1], build_mesh(device=device))


def _count(step: Callable[[], Any], turn: float, device: torch.device) -> int:
    """Number of steps that take `turn` seconds; at least 1."""
    seconds = interleave({"step": step}, rounds=1, count=1, device=device)["step"][0]
    return max(1, min(50, int(turn / seconds)))
