"""Everything that the owner of a GPU should run, in one command and under 8 minutes, into one JSON.

    python -m benchmarks.gpu_suite --output benchmarks/results/h200/gpu_suite.json
    python -m benchmarks.gpu_suite --device cpu --tiny          # all parts at toy size

Parts, small ones first; the file is written after each, and a part that fails is recorded and the rest goes on:
steps (replayed as a graph, eager, eager without the fast path, and the eager timm + torch step of reference_step.py,
taking turns A B C A B C in one process), the same with one labelled and one unlabelled image, time by kernel class,
elementwise kernels against the speed of memory, bytes kept for backward, and the largest labelled batch that fits at
mu 8. Needs torch, timm and pydantic; neither DeepSpeed nor DALI.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import report
from benchmarks.kernel_classes import elementwise_speed, time_by_class
from benchmarks.reference_step import ReferenceStep
from benchmarks.throughput import phases
from benchmarks.timing import Clock, interleave, ratios
from benchmarks.workload import Workload, make_workload, peak_bytes, peak_tflops, reset_peak, synthetic_batch
from mpl_scale.config import RunConfig
from mpl_scale.config.schema import Config
from mpl_scale.device import Numerics
from mpl_scale.engine.graph import StepRunner
from mpl_scale.engine.recompute import apply_recompute
from mpl_scale.mesh import start_process_group
from mpl_scale.models import build_model
from mpl_scale.planner import kept_bytes, static_bytes, to_compute_dtype

PLAIN = {"graph": "off", "kernels": "eager", "channels_last": "off"}
"""Without the fast path: torch's own operators and layout."""
COPY_TERABYTES = 4.3
"""Read and written by a device-to-device copy on an H200, TB/s: what elementwise kernels are held against."""


@dataclass(frozen=True)
class Case:
    """One step to time: B = labelled images, U = mu B."""

    model: str
    size: int
    labelled: int
    mu: int
    optimizer: str = "sgd"
    recompute: str = "none"
    reference: bool = True

    @property
    def name(self) -> str:
        """Shown and stored."""
        suffix = "" if self.recompute == "none" else f"_{self.recompute}"
        return f"{self.model}_{self.size}_{self.labelled}x{self.mu}{suffix}"


FULL = [
    Case("resnet50", 224, 16, 3),
    Case("tf_efficientnet_b0", 224, 16, 3),
    Case("tf_efficientnet_b0", 224, 1, 1),
    Case("tf_efficientnet_b5", 456, 4, 3),
    Case("tf_efficientnet_l2", 512, 1, 1, "rmsprop"),
    Case("tf_efficientnet_l2", 512, 1, 3, "rmsprop", "bn_act"),
]
TINY = [
    Case("digits_cnn", 8, 2, 2),
    Case("digits_cnn", 8, 1, 1, "rmsprop"),
    Case("digits_cnn", 8, 1, 2, "rmsprop", "bn_act"),
]


@dataclass
class Suite:
    """Options, the document, and the time that is left."""

    options: argparse.Namespace
    device: torch.device
    document: dict[str, Any]
    began: float

    def part(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """Run a part, keep its result or its failure, write the file."""
        began = time.perf_counter()
        if self.options.parts and not any(name.startswith(part) for part in self.options.parts):
            return
        if began - self.began > self.options.budget:
            result: dict[str, Any] = {"skipped": f"--budget {self.options.budget:g} seconds are spent"}
        else:
            try:
                result = function()
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"}
        result["seconds_in_all"] = time.perf_counter() - began
        self.document["parts"][name] = result
        report.write(self.options.output, self.document)
        print(f"{name}: {_shown(result)} [{result['seconds_in_all']:.0f} s]", flush=True)
        reset_peak(self.device)

    def config(self, case: Case, **parallel: Any) -> RunConfig:
        """Engine flat on one device, bf16 on a GPU, rule cosine, nothing random but the labels."""
        network = {"name": case.model}
        optim = {"name": case.optimizer, "lr": 1e-4, "schedule": "constant", "weight_decay": 1e-5}
        section = {
            "model": {
                "teacher": network,
                "student": network,
                "num_classes": 10 if self.options.tiny else 1000,
                "image_size": case.size,
            },
            "data": {"unlabelled_ratio": case.mu},
            "optim": {"teacher": optim, "student": optim},
            "phases": {"train": {"steps": 1_000_000}},
            "parallel": {"engine": "flat", "recompute": case.recompute, **parallel},
        }
        deepspeed = {"train_batch_size": case.labelled, "bf16": {"enabled": self.device.type == "cuda"}}
        return RunConfig(path=Path("benchmarks/gpu_suite.py"), mpl=Config.model_validate(section), deepspeed=deepspeed)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    Numerics().apply(device)
    owns_group = not dist.is_initialized()
    if owns_group:
        start_process_group(device, timeout_seconds=600)
    document = {
        "kind": "gpu_suite",
        **report.provenance("benchmarks.gpu_suite", device, commit=options.commit),
        "tiny": options.tiny,
        "peak_tflops": peak_tflops(device, torch.bfloat16 if device.type == "cuda" else torch.float32),
        "parts": {},
    }
    suite = Suite(options, device, document, time.perf_counter())
    cases = TINY if options.tiny else FULL
    for case in cases:
        suite.part(f"step_{case.name}", partial(compare_steps, suite, case))
    large = cases[-1]
    suite.part(f"kernels_{large.name}", partial(kernel_times, suite, large))
    shape, parameters = ((2, 8, 16, 16), 10_000) if options.tiny else ((8, 432, 128, 128), 2**27)
    suite.part("elementwise", partial(elementwise, suite, shape, parameters))
    for recompute in ("none", "bn_act", "block"):
        suite.part(f"kept_{recompute}", partial(kept, suite, replace(large, recompute=recompute)))
    for recompute, teacher in (("none", "live"), ("bn_act", "live"), ("block", "live"), ("block", "deferred")):
        case = replace(large, recompute=recompute, mu=8)
        suite.part(f"largest_{recompute}_{teacher}", partial(largest, suite, case, teacher))
    print(f"written: {options.output} after {time.perf_counter() - suite.began:.0f} s")
    if owns_group:
        dist.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further part starts")
    parser.add_argument("--parts", nargs="*", help="only parts whose names begin so")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of a turn, about")
    parser.add_argument("--limit", type=int, default=64, help="largest labelled batch that is tried")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_suite.json"))
    return parser


def compare_steps(suite: Suite, case: Case) -> dict[str, Any]:
    """Graph, eager and reference in turns; each that cannot be prepared (memory) is named and left out."""
    device = suite.device
    failures: dict[str, str] = {}
    notes: dict[str, str] = {}
    peaks: dict[str, int] = {}
    steps: dict[str, Callable[[], Any]] = {}

    def prepare(name: str, make: Callable[[], Callable[[], Any]]) -> None:
        reset_peak(device)
        try:
            step = make()
            for _ in range(5 if device.type == "cuda" else 1):  # a graph is captured at the fourth
                step()
            Clock(device).together()
        except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
            failures[name] = _first_line(error)
            return
        steps[name], peaks[name] = step, peak_bytes(device)

    loads: dict[str, Workload] = {}

    def ours(name: str, **parallel: Any) -> Callable[[], Any]:
        loads[name] = make_workload(suite.config(case, **parallel), device=device)
        return loads[name].step

    if case.reference:
        prepare("reference", lambda: _reference(suite, case))
    prepare("eager", lambda: ours("eager", graph="off"))
    if "eager" in loads:  # the same networks, so that both fit
        prepare("graph", lambda: _replayed(loads["eager"], notes))
    prepare("plain", lambda: ours("plain", **PLAIN))
    if not steps:
        return {"failures": failures}
    counts = {name: _count(step, suite, device) for name, step in steps.items()}
    seconds = interleave(steps, rounds=suite.options.rounds, count=min(counts.values()), device=device)
    base = loads.get("eager") or next(iter(loads.values()), None)
    flops = None if base is None else base.flops()
    peak = suite.document["peak_tflops"]
    rows: dict[str, dict[str, Any]] = {}
    for name, found in seconds.items():
        median = sorted(found)[len(found) // 2]
        rows[name] = {
            "seconds_per_step": found,
            "images_per_second": case.labelled * (1 + case.mu) / median,
            "mfu": None if flops is None or peak is None else flops / median / (peak * 1e12),
            "peak_bytes": peaks[name],
        }
    result: dict[str, Any] = {
        "case": vars(case),
        "rows": rows,
        "time_ratios": ratios(seconds),
        "failures": failures,
        "notes": notes,
    }
    if "eager" in loads:
        result |= {"flops_per_step": flops, "eager_phases_ms": phases(loads["eager"], 3, device=device)}
    return result


def _reference(suite: Suite, case: Case) -> Callable[[], Any]:
    """Built from the same configuration, on a batch of the same size."""
    run = suite.config(replace(case, recompute="none"))
    reference, batch = ReferenceStep(run, device=suite.device), _batch(run, case, suite.device)
    return lambda: reference(batch)


def _replayed(load: Workload, notes: dict[str, str]) -> Callable[[], Any]:
    """The step of a workload's state as a graph; on a CPU the same runner calls it."""
    on_gpu = load.mesh.device.type == "cuda"
    notes["graph"] = "replayed" if on_gpu else "called on static slots: a CPU has no graphs"
    runner = StepRunner(
        load.phase.method.step, load.state, capture=on_gpu
    )  # a capture that fails is this row's failure
    return lambda: runner(next(load.source))


def _batch(run: RunConfig, case: Case, device: torch.device) -> Any:
    from mpl_scale.config import check
    from mpl_scale.mesh import build_mesh
    from mpl_scale.trainer.phases import plan_phases

    batches = check(run, world=1, cuda=device.type == "cuda")
    phase = plan_phases(run.mpl, batches, max_steps=None)[-1]
    return synthetic_batch(run, phase, build_mesh(device=device))


def _count(step: Callable[[], Any], suite: Suite, device: torch.device) -> int:
    """Steps that fill a turn."""
    seconds = interleave({"step": step}, rounds=1, count=1, device=device)["step"][0]
    return max(1, min(50, int(suite.options.turn / seconds)))


def kernel_times(suite: Suite, case: Case) -> dict[str, Any]:
    """Time by kernel class of eager steps, and the step's own time beside it."""
    load = make_workload(suite.config(case, graph="off"), device=suite.device)
    for _ in range(2):
        load.step()
    whole = interleave({"step": load.step}, rounds=3, count=1, device=suite.device)["step"]
    return {"case": vars(case), "seconds_per_step": whole, **time_by_class(load.step, steps=2, device=suite.device)}


def elementwise(suite: Suite, shape: tuple[int, int, int, int], parameters: int) -> dict[str, Any]:
    """Kernels that memory bounds; on a GPU also as a share of 4.3 TB/s."""
    rows = elementwise_speed(shape=shape, parameters=parameters, device=suite.device)
    if suite.device.type == "cuda":
        for row in rows.values():
            row["share_of_4.3_TB_per_second"] = row["terabytes_per_second"] / COPY_TERABYTES
    return {"shape": shape, "parameters": parameters, "rows": rows}


def kept(suite: Suite, case: Case) -> dict[str, Any]:
    """Bytes per image between forward and backward by shapes alone, and the static bytes of the student."""
    run, count = suite.config(case), 2
    model = build_model(run.mpl.model.student, run.mpl.model, field="kept", seed=0, device="meta")
    parameters, buffers = (sum(t.numel() for t in tensors) for tensors in (model.parameters(), model.buffers()))
    images = torch.empty(count, 3, case.size, case.size, dtype=torch.bfloat16, device="meta")
    model = to_compute_dtype(apply_recompute(model, case.recompute), torch.bfloat16)  # type: ignore[arg-type]
    static = static_bytes(
        parameters,
        buffers,
        stage=0,
        shard_size=1,
        engine="flat",
        weights_dtype=torch.bfloat16,
        optimizer=case.optimizer,
        ema=True,
    )
    return {"case": vars(case), "kept_bytes_per_image_bf16": kept_bytes(model, images) / count, "static_bytes": static}


def largest(suite: Suite, case: Case, teacher: str) -> dict[str, Any]:
    """The largest labelled batch whose eager step fits: doubled until it does not, then halved in between."""
    device = suite.device
    load = make_workload(suite.config(replace(case, labelled=1), graph="off", teacher=teacher), device=device)
    tried: dict[int, int | None] = {}

    def fits(labelled: int) -> bool:
        reset_peak(device)
        batch = synthetic_batch(load.run, replace(load.phase, labelled=labelled, unlabelled=8 * labelled), load.mesh)
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
        return tried[labelled] is not None

    low = 0
    for labelled in itertools.takewhile(lambda b: b <= suite.options.limit, (2**n for n in itertools.count())):
        if not fits(labelled):
            high = labelled
            while high - low > max(1, low // 4):
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            break
        low = labelled
    return {"case": vars(case), "largest_labelled": low, "peak_bytes_by_labelled": tried}


def _shown(result: dict[str, Any]) -> str:
    for key in ("error", "skipped"):
        if key in result:
            return f"{key}: {result[key]}"
    if "time_ratios" in result:
        rows = ", ".join(f"{name} {row['images_per_second']:.1f} img/s" for name, row in result["rows"].items())
        return rows + "".join(f"; {name} failed: {why}" for name, why in result["failures"].items())
    if "ms_per_step" in result:
        return ", ".join(f"{name} {ms:.1f} ms" for name, ms in result["ms_per_step"].items())
    if "rows" in result:
        return ", ".join(f"{name} {row['terabytes_per_second']:.3g} TB/s" for name, row in result["rows"].items())
    return ", ".join(f"{key} {value}" for key, value in result.items() if isinstance(value, int | float))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sys.exit(main())
