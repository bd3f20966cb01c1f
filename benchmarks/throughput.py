"""Images per second, milliseconds by phase, MFU and memory of a configuration's step, on a CPU or GPUs, any launcher.

    python -m benchmarks.throughput --ds_config ds_configs/digits.json --set mpl_scale.parallel.engine=flat
    deepspeed --num_accelerators 2 --module benchmarks.throughput --ds_config ds_configs/digits.json
    python -m benchmarks.throughput --ds_config ds_configs/digits.json \
        --compare "sgd: --set mpl_scale.parallel.engine=flat" \
        --compare "zero3: --set mpl_scale.parallel.engine=deepspeed --set zero_optimization.stage=3"

--compare runs configurations in one process, A B A B ..., and reports time ratios within rounds against the first.
The step is timed whole, as a run makes it (replayed where it can be); phases are timed afterwards on eager steps with
the two networks wrapped from outside, so the whole is not slowed by it. MFU divides the FLOPs that the method asks for
(multiply-accumulates counted by hooks, recomputation left out) by the peak. Prints a line each; --output writes JSON.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import report
from benchmarks.timing import Clock, PhaseTimer, interleave, ratios
from benchmarks.workload import Workload, make_workload, peak_bytes, peak_tflops, reset_peak
from mpl_scale.config import RunConfig, load_config
from mpl_scale.mesh import adopt_slurm_environment, choose_device, start_process_group


def main(arguments: list[str] | None = None) -> int:
    """Parse the options and measure; returns the exit status."""
    options = _parser().parse_args(arguments)
    adopt_slurm_environment(os.environ)
    device = choose_device(os.environ)
    owns_group = not dist.is_initialized()
    if owns_group:
        start_process_group(device, timeout_seconds=600)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    document = measure(options, device=device)
    if dist.get_rank() == 0:
        for name, row in document["configurations"].items():
            print(_line(name, row, document["ratios"]))
        if options.output is not None:
            report.write(options.output, document)
            print(f"written: {options.output}")
    if owns_group:
        dist.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", required=True)
    parser.add_argument("--set", action="append", default=[], help="as train.py's, for every configuration")
    parser.add_argument("--compare", action="append", default=[], metavar='"NAME: --set X=Y ..."')
    parser.add_argument("--data", choices=("synthetic", "real"), default="synthetic")
    parser.add_argument("--warmup", type=int, default=5, help="steps, not timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--phase_steps", type=int, default=10, help="eager steps timed by phase; 0: none")
    parser.add_argument("--peak_tflops", type=float, help="of one device in the run's precision; known for some GPUs")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser


def measure(options: argparse.Namespace, *, device: torch.device) -> dict[str, Any]:
    """The document; the same times on no two ranks, rank 0's is the one that is kept."""
    loads: dict[str, Workload] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, overrides in configurations(options).items():
        run = load_config(options.ds_config, overrides=overrides)
        loads[name], rows[name] = _prepared(run, options, device=device)
    if len({load.resolved.numerics for load in loads.values()}) > 1:
        raise ValueError(
            "--compare: mpl_scale.parallel.tf32 and deterministic are of a process; run one after the other"
        )
    seconds = interleave(
        {name: load.step for name, load in loads.items()}, rounds=options.rounds, count=options.steps, device=device
    )
    dtypes = {name: torch.bfloat16 if row["bf16"] else torch.float32 for name, row in rows.items()}
    peaks = {dtype: options.peak_tflops or peak_tflops(device, dtype) for dtype in set(dtypes.values())}
    for name, load in loads.items():
        rows[name] |= _rates(load, seconds[name], peak=peaks[dtypes[name]])
        if options.phase_steps:
            rows[name]["phases_ms"] = phases(load, options.phase_steps, device=device)
    return {
        "kind": "throughput",
        **report.provenance("benchmarks.throughput", device, commit=options.commit),
        "ds_config": options.ds_config,
        "data": options.data,
        "configurations": rows,
        "ratios": ratios(seconds),
    }


def configurations(options: argparse.Namespace) -> dict[str, list[str]]:
    """Overrides by name; one named "run" without --compare.

    Raises:
        ValueError: a --compare that cannot be read.
    """
    if not options.compare:
        return {"run": options.set}
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--set", action="append", default=[])
    found: dict[str, list[str]] = {}
    for text in options.compare:
        name, colon, rest = text.partition(":")
        try:
            own, unknown = parser.parse_known_args(shlex.split(rest))
        except argparse.ArgumentError as error:
            raise ValueError(f'--compare "{text}": {error}; write "NAME: --set X=Y ..."') from None
        if not colon or unknown or name in found:
            raise ValueError(f'--compare "{text}": write "NAME: --set X=Y ...", each name once')
        found[name.strip()] = [*options.set, *own.set]
    return found


def _prepared(run: RunConfig, options: argparse.Namespace, *, device: torch.device) -> tuple[Workload, dict[str, Any]]:
    """Built and warmed up; its memory is what it adds to the configurations before it (GPU)."""
    reset_peak(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    began = time.perf_counter()
    load = make_workload(run, device=device, data=options.data)
    for _ in range(options.warmup):
        load.step()
    Clock(device).together()
    config, cuda = run.mpl, device.type == "cuda"
    return load, {
        "method": config.method.name,
        "teacher": config.model.teacher.name,
        "student": config.model.student.name,
        "image_size": config.model.image_size,
        "labelled": load.phase.labelled,
        "unlabelled": load.phase.unlabelled,
        "engine": load.resolved.engine,
        "zero_stage": load.resolved.stage,
        "bf16": load.resolved.bf16,
        "resolved": load.resolved.summary(),
        "parallel": config.parallel.model_dump(mode="json"),
        "graph": "replayed" if load.eager_because is None else f"eager: {load.eager_because}",
        "ready_after_seconds": time.perf_counter() - began,
        "peak_bytes": peak_bytes(device) - before,
        "peak_bytes_are": "allocated by this configuration" if cuda else "largest resident size of the process so far",
    }


def _rates(load: Workload, seconds: list[float], *, peak: float | None) -> dict[str, Any]:
    median = statistics.median(seconds)
    flops = load.flops()
    return {
        "seconds_per_step": seconds,
        "ms_per_step": 1e3 * median,
        "images_per_second": load.images / median,
        "flops_per_step_and_rank": flops,
        "peak_tflops": peak,
        "mfu": None if peak is None else flops / median / (peak * 1e12),
    }


def phases(load: Workload, steps: int, *, device: torch.device) -> dict[str, float]:
    """Milliseconds by phase of eager steps (median of each), their whole in `step`."""
    timer = PhaseTimer(device)
    with timer.attached(load.state):
        for _ in range(steps):
            timer.begin()
            batch = next(load.source)
            timer.mark("input")
            load.phase.method.step(load.state, batch)
            timer.mark("other")
    return timer.milliseconds()


def _line(name: str, row: dict[str, Any], found: dict[str, dict[str, float]]) -> str:
    mfu = "unknown" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
    shares = ", ".join(f"{phase} {ms:.1f}" for phase, ms in row.get("phases_ms", {}).items() if phase != "step")
    ratio = found[name]
    return (
        f"{name}: {row['images_per_second']:.1f} img/s, {row['ms_per_step']:.1f} ms a step ({row['graph']}), "
        f"MFU {mfu}, peak {row['peak_bytes'] / 2**20:.0f} MiB; time {ratio['median']:.3f} of the first "
        f"({ratio['min']:.3f} to {ratio['max']:.3f}); ms by phase: {shares or 'not measured'}"
    )


if __name__ == "__main__":
    sys.exit(main())
