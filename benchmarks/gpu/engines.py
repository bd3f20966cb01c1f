"""The flat engine on two ranks of one device against one rank, and DeepSpeed's stages against the flat engine."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu.parts import Part, Result, Setting, first_line, start
from benchmarks.gpu.steps import Case
from benchmarks.timing import interleave, ratios
from benchmarks.workload import Workload, make_workload, synthetic_batch
from mpl_scale.config import RunConfig
from mpl_scale.device import Numerics
from mpl_scale.trainer.phases import collect_weights

STEPS = 3
PATIENCE = 60.0
"""Seconds for the ranks of one try: where NCCL refuses, it may also hang."""


def parts(tiny: bool) -> list[Part]:
    """The parts of this module, the most valuable first."""
    return [
        Part("two_ranks", two_ranks, 120, joins=False),
        Part("deepspeed_stages", deepspeed_stages, 150, needs=("deepspeed",)),
    ]


def two_ranks(setting: Setting) -> Result:
    """Largest difference from one rank, fp32: over NCCL, which usually refuses two ranks on a GPU, else over gloo."""
    expected = _weights(setting, backend="gloo", world=1)
    failures: dict[str, str] = {}
    for backend in ("nccl", "gloo") if setting.device == "cuda" else ("gloo",):
        try:
            found = _weights(setting, backend=backend, world=2)
        except RuntimeError as error:
            failures[backend] = str(error)
            continue
        return {"backend": backend, "failures": failures, "differences": _differences(expected, found)}
    return {"error": "no backend lets two ranks share the device", "failures": failures}


def _weights(setting: Setting, *, backend: str, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of both networks after some steps on ranks of their own.

    Raises:
        RuntimeError: a rank failed or did not end in time.
    """
    folder = setting.folder / f"{backend}-{world}"
    folder.mkdir()
    ranks = [start(_rank, setting, folder, backend, rank, world) for rank in range(world)]
    end = time.monotonic() + PATIENCE
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    said = [path.read_text() for path in sorted(folder.glob("failed-*"))]
    if said:
        raise RuntimeError(said[0])
    if late:
        raise RuntimeError(
            f"{backend}: of {world} ranks, {late} did not end in {PATIENCE:g} s; the log has their stacks"
        )
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"{backend}: the ranks ended with statuses {[process.exitcode for process in ranks]}")
    return torch.load(folder / "weights.pt", weights_only=True)


def _rank(setting: Setting, folder: Path, backend: str, rank: int, world: int) -> None:
    faulthandler.dump_traceback_later(0.9 * PATIENCE)  # where it waits, if it does not end
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
    device = setting.torch_device
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        Numerics(tf32=False).apply(device)
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
        case = Case("digits_cnn", 8, 8, 3)
        run = case.config(replace(setting, device="cpu"), graph="off", kernels="eager", tf32=False)  # cpu: fp32
        run = _sharded(run, stage=2)
        load = make_workload(run, device=device)
        alone = replace(load.mesh, rank=0, world=1, data=1, data_index=0)
        batch = synthetic_batch(run, load.phase, alone).split(world)[rank]
        for _ in range(STEPS):
            load.runner(batch)
        weights = collect_weights(load.state, mesh=load.mesh)
        if rank == 0:
            torch.save({name: dict(network) for name, network in weights.items()}, folder / "weights.pt")
        dist.barrier()
    except Exception as error:
        (folder / f"failed-{rank}").write_text(first_line(error))
        os._exit(1)
    os._exit(0)


def deepspeed_stages(setting: Setting) -> Result:
    """One rank: time of a step in turns with the flat engine's, and weights after the same few steps on one batch."""
    device = setting.torch_device
    case = Case("digits_cnn", 8, 4, 3) if setting.tiny else Case("resnet50", 224, 16, 3)
    loads = {"flat": make_workload(case.config(setting, graph="off"), device=device)}
    failures: dict[str, str] = {}
    for stage in (1, 2, 3):
        run = _sharded(case.config(setting, engine="deepspeed"), stage=stage)
        try:
            loads[f"stage {stage}"] = make_workload(run, device=device)
        except (RuntimeError, ValueError) as error:
            failures[f"stage {stage}"] = first_line(error)
    before = _weights_of(loads["flat"])
    for load in loads.values():
        for _ in range(STEPS):
            load.step()
    after = {name: _weights_of(load) for name, load in loads.items()}
    result: Result = {
        "case": vars(case),
        "steps": STEPS,
        "failures": failures,
        "differences_from_flat": {name: _differences(after["flat"], weights) for name, weights in after.items()},
        "changes_of_flat": _differences(before, after["flat"]),
    }
    setting.keep(result)
    steps = {name: load.step for name, load in loads.items()}
    seconds = interleave(steps, rounds=setting.rounds, count=1 if setting.tiny else 5, device=device)
    return result | {"seconds_per_step": seconds, "time_ratios": ratios(seconds)}


def _sharded(run: RunConfig, *, stage: int) -> RunConfig:
    return replace(run, deepspeed={**run.deepspeed, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0})


def _weights_of(load: Workload) -> dict[str, dict[str, torch.Tensor]]:
    return {name: dict(network) for name, network in collect_weights(load.state, mesh=load.mesh).items()}


def _differences(
    expected: Mapping[str, Mapping[str, torch.Tensor]], found: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, float]:
    """The largest of each network's weights and statistics."""
    return {
        network: max(
            (found[network][name].double() - value.double()).abs().max().item()
            for name, value in own.items()
            if value.is_floating_point()
        )
        for network, own in expected.items()
    }
