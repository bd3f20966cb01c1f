"""The reshard table: saved under one engine, ZeRO stage, world and width, loaded under any other, trained on the same.

What is compared is a source that saves and continues for three MPL steps with a target that loads and takes the same
three steps: with dropout, momentum, the student's average and the feedback's baseline. A graph and eager steps share
one state, so that axis has nothing of its own to load.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpl_scale.checkpoint import load, save
from mpl_scale.config.schema import ModelConfig, NetworkConfig, OptimConfig
from mpl_scale.engine import build_network
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.mpl import METHODS, Network, State
from mpl_scale.spatial import input_columns, parallelize
from mpl_scale.trainer.snapshots import state_entries
from mpl_scale.types import Batch
from tests.support.ranks import pool
from tests.support.reference import Settings, make_batches
from tests.support.sharded import full_state, make_state, rank_batch, zero

CPU = torch.device("cpu")
BEFORE, AFTER = 2, 3
SETTINGS = Settings(steps=BEFORE + AFTER, size=8, classes=5, lr=0.0625)


@dataclass(frozen=True)
class Layout:
    """One way to run; shard: ranks that share a copy of the state, None: all. The flat engine's stage 0 is shard 1."""

    world: int
    engine: str
    stage: int
    width: int
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.world}x{self.engine}{self.stage}-width{self.width}" + (f"-shard{self.shard}" * bool(self.shard))


def layouts(world: int) -> list[Layout]:
    """All of a world. The flat engine runs stages 1 and 2 alike; in a world of one it has one layout."""
    widths = (1,) if world == 1 else (1, 2)
    flat = [Layout(world, "flat", 2, width) for width in widths]
    flat += [Layout(world, "flat", 0, width, 1) for width in widths if world > 1]
    flat += [Layout(world, "flat", 2, width, 2) for width in widths if world > 2]
    return flat + [Layout(world, "deepspeed", stage, width) for stage in range(4) for width in widths]


class Run:
    """Teacher and student under a layout."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.mesh = build_mesh(device=CPU, width=layout.width, shard_size=layout.shard)
        self.dtype = dtype
        teacher, student = (self._network(layout, seed) for seed in (1, 2))
        self.state: State = make_state(SETTINGS, teacher, student, self.mesh)
        self.columns = input_columns(SETTINGS.size, layout.width)[self.mesh.width_index] if layout.width > 1 else None

    def _network(self, layout: Layout, seed: int) -> Network:
        section = NetworkConfig(name="digits_cnn", dropout=0.2, kwargs={"widths": [3, 5]})
        shared = ModelConfig(
            teacher=section, student=section, num_classes=SETTINGS.classes, image_size=SETTINGS.size, bn_decay=0.9
        )
        model = build_model(section, shared, field="model", seed=seed, group=self.mesh.world_group).to(self.dtype)
        if layout.width > 1:
            model = parallelize(model, mesh=self.mesh, image_size=SETTINGS.size)
        return build_network(
            model,
            engine=layout.engine,
            optim=OptimConfig(lr=SETTINGS.lr, momentum=0.9, weight_decay=1e-3),
            ds_config=zero(layout.stage) if layout.engine == "deepspeed" else {},
            mesh=self.mesh,
        )

    def step(self, begin: int, end: int) -> None:
        """Steps [begin, end)."""
        for batch in make_batches(SETTINGS, self.dtype)[begin:end]:
            METHODS["mpl"].step(self.state, self._own_columns(rank_batch(batch, self.mesh)))

    def _own_columns(self, batch: Batch) -> Batch:
        if self.columns is None:
            return batch
        own = slice(*self.columns)
        views = {name: getattr(batch, name)[..., own].contiguous() for name in ("labelled", "weak", "strong")}
        return replace(batch, **views)

    def whole(self) -> dict[str, torch.Tensor]:
        """Everything a step reads, gathered: weights, momentum, buffers, average, baseline, counters."""
        state, mesh = self.state, self.mesh
        assert state.student is not None
        assert state.student_average is not None
        assert state.teacher is not None
        values = {"step": state.step, "b": state.baseline.average, "t": state.baseline.steps}
        for name, network in (("teacher", state.teacher), ("student", state.student)):
            kinds = {"master": network.master, **network.optimizer_state}
            buffers = dict(network.module.named_buffers())
            for kind, shards in kinds.items():
                found = full_state(network, shards, buffers, mesh)
                values |= {f"{name}/{kind}/{key}": value for key, value in found.items()}
        average = state.student_average
        found = full_state(state.student, average.shards, average.buffers, mesh)
        values |= {f"ema/{key}": value for key, value in found.items()}
        return {key: value.detach().clone().contiguous() for key, value in values.items()}


def save_all(sources: list[Layout], root: str, dtype: torch.dtype) -> None:
    """Train, save, and train on, under each layout; rank 0 leaves the states at saving and at the end."""
    for source in sources:
        run, folder = Run(source, dtype), Path(root) / str(source)
        run.step(0, BEFORE)
        entries = state_entries(run.state, mesh=run.mesh)
        save(folder, step=BEFORE, entries=entries, metadata={}, mesh=run.mesh, keep=1)
        saved = run.whole()
        run.step(BEFORE, BEFORE + AFTER)
        ended = run.whole()
        if run.mesh.is_main:
            save_file(saved, folder / "saved.safetensors")
            save_file(ended, folder / "ended.safetensors")


def load_all(target: Layout, sources: list[str], root: str, dtype: torch.dtype) -> dict[str, float]:
    """Load each source under the target and train on: the largest difference to the source that went on itself.

    One set of engines loads them all: what a load leaves of the state before it would show.
    """
    run, result = Run(target, dtype), {}
    entries = state_entries(run.state, mesh=run.mesh)
    for source in sources:
        folder = Path(root) / source
        load(folder / f"step_{BEFORE:08d}", entries, mesh=run.mesh)
        for network in (run.state.teacher, run.state.student):
            assert network is not None
            network.refresh_weights()
        saved, loaded = load_file(folder / "saved.safetensors"), run.whole()
        assert loaded.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(loaded[key], value), f"{source} -> {target}: {key} was not loaded bit for bit"
        run.step(BEFORE, BEFORE + AFTER)
        ended, found = load_file(folder / "ended.safetensors"), run.whole()
        moved = max((ended[k] - v).abs().max().item() for k, v in saved.items() if k.startswith("student/master"))
        assert moved > 1e-3  # three steps that do something
        result[source] = max((found[k].double() - v.double()).abs().max().item() for k, v in ended.items())
    return result


LOADS = 31 if os.environ.get("MPL_SCALE_TEST_ALL") else 1
"""Sources that each target loads: every one on request."""
pytestmark = pytest.mark.timeout(300 if LOADS == 1 else 3600)


def table(root: Path, wanted: list[Layout], dtype: torch.dtype, loads: int) -> dict[tuple[str, str], float]:
    """Differences by (source, target): each target loads `loads` sources, and each source is loaded by as many targets.

    7 divides no number of layouts here, so index -> 7 index + shift meets every source once.
    """
    for world in (1, 2, 4):
        pool(world).run(save_all, [layout for layout in wanted if layout.world == world], str(root), dtype)
    result = {}
    for index, target in enumerate(wanted):
        shifts = [round(turn * len(wanted) / loads) for turn in range(loads)]
        sources = [str(wanted[(7 * index + shift) % len(wanted)]) for shift in shifts]
        for found in pool(target.world).run(load_all, target, sources, str(root), dtype):
            result |= {(source, str(target)): difference for source, difference in found.items()}
    return result


def check(differences: dict[tuple[str, str], float], tolerance: float) -> None:
    worst = max(differences, key=lambda pair: differences[pair])
    assert differences[worst] <= tolerance, f"{worst[0]} -> {worst[1]}: {differences[worst]:.2e}"


def test_flat_layouts_go_on_from_each_other(tmp_path: Path) -> None:
    """float64: roundings of 1e-16, which three steps of a small net enlarge far less than a million times."""
    wanted = [layout for world in (1, 2, 4) for layout in layouts(world) if layout.engine == "flat"]
    loads = min(LOADS, len(wanted))
    differences = table(tmp_path, wanted, torch.float64, loads)
    assert len(differences) == loads * len(wanted)
    check(differences, 1e-10)


@pytest.mark.full
def test_engines_stages_worlds_and_widths_go_on_from_each_other(tmp_path: Path) -> None:
    """float32, every layout as source and as target: roundings of 6e-8 of values below 1."""
    wanted = [layout for world in (1, 2, 4) for layout in layouts(world)]
    loads = min(LOADS, len(wanted))
    differences = table(tmp_path, wanted, torch.float32, loads)
    assert len(differences) == loads * len(wanted)
    assert {source for source, _ in differences} == {target for _, target in differences} == set(map(str, wanted))
    check(differences, 1e-6)
