"""A training step of any configuration, ready to be called again and again: state, batches, runner.

Imports neither DALI nor DeepSpeed unless the configuration asks for them (real data, engine deepspeed).
"""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import torch

from mpl_scale.config import RunConfig
from mpl_scale.engine.graph import StepRunner
from mpl_scale.mesh import Mesh, build_mesh
from mpl_scale.models import build_model
from mpl_scale.mpl import State
from mpl_scale.planner import StepImages, count_macs, step_flops
from mpl_scale.resolve import Resolved, choose_layout, resolve
from mpl_scale.spatial import input_columns
from mpl_scale.trainer.phases import Phase, build_state, plan_phases
from mpl_scale.types import Batch


@dataclass
class Workload:
    """The main phase of a configuration on this process's ranks."""

    run: RunConfig
    mesh: Mesh
    phase: Phase
    state: State
    runner: StepRunner
    source: Iterator[Batch]
    resolved: Resolved
    eager_because: str | None
    """Why the step is not replayed as a graph; None: it is. Set when a capture fails."""

    def step(self) -> Any:
        """Run one step as a run does; returns its metrics."""
        return self.runner(next(self.source))

    @property
    def images(self) -> int:
        """Images of a step over all ranks, labelled and unlabelled, each counted once whatever its number of views."""
        return self.phase.labelled + self.phase.unlabelled

    def flops(self, *, recompute: bool = False) -> int:
        """Floating-point operations of a step on one rank (its share of images, its columns)."""
        config, method = self.run.mpl, self.run.mpl.method
        macs = {
            name: count_macs(
                build_model(section, config.model, field=name, seed=0, device="meta"), config.model.image_size
            )
            for name, section in (("teacher", config.model.teacher), ("student", config.model.student))
        }
        phase = self.phase
        images = StepImages.of(method, method=method.name, labelled=phase.labelled, unlabelled=phase.unlabelled)
        total = step_flops(
            images,
            teacher_macs=macs["teacher"],
            student_macs=macs["student"],
            deferred=self.state.deferred_teacher,
            recompute=recompute and config.parallel.recompute != "none",
        )
        return total // self.mesh.world


def make_workload(
    run: RunConfig, *, device: torch.device, data: Literal["synthetic", "real"] = "synthetic"
) -> Workload:
    """Networks under their engines and batches on the device, which computes as the run's would.

    Args:
        run: as loaded.
        device: of this rank; the process group is joined already where there are several.
        data: synthetic: one random batch, on the device before the first step; real: the configuration's loader.

    Raises:
        ValueError: what a run of the configuration would refuse.
    """
    resolved = resolve(run, world=int(os.environ.get("WORLD_SIZE", "1")), device=device.type)
    resolved.numerics.apply(device)
    mesh = build_mesh(device=device, width=run.mpl.parallel.width, shard_size=resolved.shard_size)
    phase = next(phase for phase in plan_phases(run.mpl, resolved.batches, max_steps=None) if phase.name == "train")
    source: Iterator[Batch]
    if data == "synthetic":
        source, images = repeat(synthetic_batch(run, phase, mesh)), phase.unlabelled
    else:
        source, images = _batches(run, phase, mesh)
    state = build_state(phase, run, mesh=mesh, weights={}, resolved=resolved, unlabelled_images=images)
    workload = Workload(run, mesh, phase, state, None, source, resolved, resolved.eager_because)  # type: ignore[arg-type]

    def fall_back(reason: str) -> None:
        workload.eager_because = reason

    workload.runner = StepRunner(phase.method.step, state, capture=resolved.replayed, fall_back=fall_back)
    return workload


def synthetic_batch(run: RunConfig, phase: Phase, mesh: Mesh) -> Batch:
    """Random pixels and labels: this rank's rows and columns of one global batch."""
    size, device = run.mpl.model.image_size, mesh.device
    start, stop = input_columns(size, mesh.width)[mesh.width_index]
    generator = torch.Generator(device).manual_seed(1234 + mesh.rank)
    wide, _ = choose_layout(run.mpl.parallel, device.type)
    memory_format = torch.channels_last if wide else torch.contiguous_format

    def rows(total: int) -> torch.Tensor:
        count = total // mesh.data
        return torch.arange(mesh.data_index * count, (mesh.data_index + 1) * count, device=device)

    def images(count: int) -> torch.Tensor:
        shape = (count, 3, size, stop - start)
        values = torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)
        return values.contiguous(memory_format=memory_format)

    labelled, unlabelled = rows(phase.labelled), rows(phase.unlabelled)
    labels = labelled % run.mpl.model.num_classes  # the same on all ranks of a width group
    return Batch(
        labelled=images(len(labelled)),
        labels=labels,
        labelled_rows=labelled,
        weak=images(len(unlabelled)),
        strong=images(len(unlabelled)),
        unlabelled_rows=unlabelled,
        unlabelled_ids=unlabelled,
        normalise=_normalised,
    )


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Stands in for mpl_scale.data's normalisation, which needs DALI: as many operations."""
    return pixels.float().sub_(127.5).div_(64.0)


def _batches(run: RunConfig, phase: Phase, mesh: Mesh) -> tuple[Iterator[Batch], int]:
    """The batches of the configured run, from files or resident, and its number of unlabelled images."""
    from mpl_scale.data import Quarantine  # imports DALI
    from mpl_scale.data.resident_parts import ResidentParts
    from mpl_scale.trainer.data_source import DataSource
    from mpl_scale.trainer.preflight import load_splits

    config, splits, quarantine = run.mpl, load_splits(run), Quarantine()
    resident = ResidentParts(
        config.data, splits, image_size=config.model.image_size, device=mesh.device, quarantine=quarantine
    )
    batches = DataSource(config, splits, mesh, resident, quarantine).batches(phase, start_step=0)
    return batches, len(splits.unlabelled)


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far (GPU), and free what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """GPU: the allocator's peak since reset_peak; CPU: the process's largest resident size, ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 tensor-core rates of the vendors' datasheets (SXM)."""


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of the device in bf16: the datasheet's; on a CPU what a matrix product reaches now. None: unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((value for key, value in _PEAK_TFLOPS.items() if key in name), None)
    from benchmarks.timing import interleave

    n = 1024
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    torch.mm(a, b)
    seconds = interleave({"mm": lambda: torch.mm(a, b)}, rounds=5, count=2, device=device)["mm"]
    return 2 * n**3 / min(seconds) / 1e12
