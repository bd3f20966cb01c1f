"""Whole runs whose steps are captured: beside DALI, phase after phase, and short of memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_scale.config import load_config
from mpl_scale.engine.graph import StepRunner
from mpl_scale.mesh import build_mesh
from mpl_scale.monitor import Writers
from mpl_scale.resolve import resolve
from mpl_scale.trainer.gauge import Gauge
from mpl_scale.trainer.prepare import Options, train
from mpl_scale.types import Batch, StepMetrics
from tests.support.configs import DIGITS, tiny, write
from tests.support.dispatch import CpuGraphs
from tests.support.steps import CPU, on_each_device


def run_digits(folder: Path, device: torch.device, *, graph: str) -> dict[str, Any]:
    """The results of a run of three phases whose images DALI decodes."""
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat", "graph": graph}
    raw["mpl_scale"]["phases"] |= {"teacher_warmup": {"steps": 5}, "finetune": {"steps": 5, "optim": {"lr": 0.002}}}
    raw["mpl_scale"]["data"]["resident"] = "off"
    folder.mkdir()
    summary = train(load_config(write(folder, raw)), Options(folder / "out"))
    assert summary is not None
    assert summary["device"] == ("cpu" if device.type == "cpu" else torch.cuda.get_device_name(device))
    return summary["results"]


@on_each_device
def test_a_run_beside_dali_captures_each_phase(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI decodes on its own threads while a step is captured, in each of three phases; equals the eager run."""
    pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda120 or nvidia-dali-cuda130")
    expected = run_digits(tmp_path / "eager", device, graph="off")
    graphs = CpuGraphs()
    if device.type == "cpu":
        pretend_to_capture(graphs, monkeypatch)
    found = run_digits(tmp_path / "graph", device, graph="auto" if device.type == "cpu" else "required")
    if device.type == "cpu":
        assert found == expected
        assert len(graphs.recorded) == 3
        assert graphs.released == 3
    else:  # float32 rounding over 18 steps moves few of 599 test images
        for name, values in expected.items():
            assert found[name]["loss"] == pytest.approx(values["loss"], rel=0.02)


def pretend_to_capture(graphs: CpuGraphs, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have runs on a CPU record their steps; the list gets their notes."""
    notes: list[str] = []
    monkeypatch.setattr("mpl_scale.engine.graph.why_not_captured", lambda **_: None)
    monkeypatch.setattr("mpl_scale.engine.graph.CudaGraphs", lambda: graphs)
    monkeypatch.setattr(Writers, "note", lambda _, line: notes.append(line))
    return notes


def test_a_run_says_once_that_it_is_eager_and_what_takes_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first phase's capture has no memory; the two phases that follow do not try again."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    notes = pretend_to_capture(CpuGraphs(fail_at=50, error=full), monkeypatch)
    found = run_digits(tmp_path / "full", CPU, graph="auto")
    (line,) = [note for note in notes if "captured" in note]
    assert "runs eagerly: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.; mpl-scale plan " in line
    monkeypatch.undo()
    assert found == run_digits(tmp_path / "eager", CPU, graph="off")


def test_a_step_without_memory_ends_the_run_with_what_takes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(runner: StepRunner, batch: Batch) -> StepMetrics:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(StepRunner, "__call__", full)
    with pytest.raises(
        ValueError,
        match=r"^no memory for step 1 of teacher_warmup: OutOfMemoryError: .* 2.00 GiB.; mpl-scale plan",
    ):
        run_digits(tmp_path / "full", CPU, graph="off")


def test_what_takes_less_memory_is_named_by_its_settings() -> None:
    """A large batch at once: micro-batches take less, if nothing else does."""
    run = load_config(DIGITS, overrides=["train_batch_size=65536"])
    line = Gauge(run, resolve(run, world=1, device="cpu"), build_mesh(device=CPU)).advice()
    found = re.fullmatch(r"mpl-scale plan would set (.*): ([\d.]+) GB a rank in place of ([\d.]+)", line)
    assert found is not None
    assert re.search(r"(gradient_accumulation_steps|mpl_scale.parallel.\w+) = ", found[1])
    assert float(found[2]) <= 0.9 * float(found[3])
