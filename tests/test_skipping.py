"""Steps that are skipped, and losses from which the run goes back: bit by bit as if they had not been."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mpl_scale.checkpoint import find, read_prefix
from mpl_scale.checkpoint.format import read_index
from mpl_scale.config import load_config
from mpl_scale.config.schema import RewindConfig
from mpl_scale.mesh import build_mesh
from mpl_scale.mpl import METHODS, State
from mpl_scale.mpl.methods import register_method
from mpl_scale.mpl.skipping import IN_A_ROW, SKIPPED, SkipNonfinite
from mpl_scale.trainer import data_source
from mpl_scale.trainer.loss_watch import LossWatch
from mpl_scale.trainer.prepare import Options, train
from mpl_scale.types import Batch, StepMetrics
from tests.support.batches import normalised
from tests.support.configs import tiny, write
from tests.support.faults import check_documented
from tests.support.ranks import pool
from tests.support.reference import Settings, make_batches
from tests.support.sharded import full_state, make_network, make_state, rank_batch, zero
from tests.support.tiers import full

PREFIXES = ("teacher", "student", "ema", "state")


def make_config(folder: Path, *, phases: dict[str, Any], stage: int = 0, engine: str = "flat", **sections: Any) -> str:
    raw = tiny(zero_optimization={"stage": stage})
    section = raw["mpl_scale"]
    section["phases"] = phases
    section["parallel"] = {"engine": engine}
    section |= {"logging": {"every": 1, "cost": "on"}, "checkpoint": {"every": 1, "keep": 40}, **sections}
    return write(folder, raw)


@contextmanager
def spoilt_batches(numbers: range, *, rank: int) -> Iterator[None]:
    """One pixel of these batches of a run is NaN, on one rank."""
    drawn = iter(range(1, 10**6))

    class Spoilt(data_source.Prefetcher):
        def __next__(self) -> Batch:
            batch = normalised(super().__next__())
            if next(drawn) in numbers and (rank == 0) == (batch.labelled_rows[0] == 0):
                batch = replace(batch, labelled=batch.labelled.clone())
                batch.labelled[0, 0, 0, 0] = float("nan")
            return batch

    with mock.patch.object(data_source, "Prefetcher", Spoilt):
        yield


def run_spoilt(config: str, output: str, numbers: range, rank: int) -> str:
    """What the run ended with: nothing, or its error."""
    with spoilt_batches(numbers, rank=rank):
        try:
            train(load_config(config), Options(Path(output)))
        except ValueError as error:
            return str(error)
    return ""


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything of the checkpoint after a global step but the step counter."""
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    held = {f"{prefix}/{name}": value for prefix in PREFIXES for name, value in read_prefix(checkpoint, prefix).items()}
    assert held.pop("state/step") == step
    return held


@pytest.mark.parametrize(
    ("world", "engine", "stage"), [full(1, "flat", 0), (2, "flat", 2), full(2, "deepspeed", 1), full(2, "deepspeed", 3)]
)
def test_a_step_with_a_nan_changes_nothing_on_any_rank(tmp_path: Path, world: int, engine: str, stage: int) -> None:
    """The third of five batches has it, on the last rank."""
    config = make_config(
        tmp_path, phases={"train": {"steps": 5}}, stage=stage, engine=engine, guard={"nonfinite": "skip"}
    )
    given = (config, str(tmp_path / "out"), range(3, 4), world - 1)
    said = pool(world).run(run_spoilt, *given) if world > 1 else [run_spoilt(*given)]
    assert said == [""] * world
    held = [weights(tmp_path / "out", step) for step in range(2, 6)]
    assert all(value.isfinite().all() for value in held[-1].values() if value.is_floating_point())
    for name, value in held[0].items():
        assert torch.equal(value, held[1][name]), name
    for name in held[0]:
        if name.endswith(("classifier.weight", "running_mean")) or name == "state/baseline":
            assert not torch.equal(held[1][name], held[2][name]), name
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["skipped_steps"] for line in lines if "skipped_steps" in line]
    assert skipped == [0, 0, 1, 1, 1]


def test_skipped_steps_are_named_and_too_many_in_a_row_end_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    guard = {"nonfinite": "skip", "max_skipped": 3}
    config = make_config(tmp_path, phases={"train": {"steps": 12}}, guard=guard)
    said = run_spoilt(config, str(tmp_path / "out"), range(4, 9), 0)
    assert said.startswith(
        "3 steps in a row had NaN or infinity (mpl_scale.guard.max_skipped = 3) after step 6 of train"
    )
    check_documented(said, folder=tmp_path)
    named = [line for line in capfd.readouterr().err.splitlines() if "is skipped" in line]
    assert [line.split(" of ")[0].rpartition("step ")[2] for line in named] == ["4", "5", "6"]
    check_documented(named[0].partition("step")[1] + named[0].partition("step")[2], folder=tmp_path)


def test_a_run_without_such_a_step_is_the_same_and_its_copies_are_planned(tmp_path: Path) -> None:
    held, static = {}, {}
    for nonfinite in ("stop", "skip"):
        folder = tmp_path / nonfinite
        folder.mkdir()
        config = make_config(folder, phases={"train": {"steps": 6}}, guard={"nonfinite": nonfinite})
        train(load_config(config), Options(folder / "out"))
        held[nonfinite] = weights(folder / "out", 6)
        static[nonfinite] = json.loads((folder / "out" / "summary.json").read_text())["cost"]["bytes"]["static"]
    for name, value in held["stop"].items():
        assert torch.equal(value, held["skip"][name]), name
    planned, measured = (static["skip"][key] - static["stop"][key] for key in ("planned", "measured"))
    assert 0 <= measured - planned < 1024  # counters, and the numbers of the last 64 skipped steps


def infinite_gradient(engine: str, stage: int) -> tuple[list[int], list[bool], list[bool]]:
    """Four steps; in the third the teacher's gradient is infinite on the last rank, and nothing else is.

    Returns: skipped steps after each, whether all metrics of it are finite, whether it left everything as it was.
    """
    s, mesh = Settings(), build_mesh(device=torch.device("cpu"))
    config = zero(stage) if engine == "deepspeed" else {}
    teacher, student = (make_network(seed, s, torch.float32, 5, engine, config, mesh) for seed in (1, 2))
    state = make_state(s, teacher, student, mesh)
    step = SkipNonfinite(METHODS["mpl"].step, state)
    batch = rank_batch(make_batches(s, torch.float32)[0], mesh)
    skipped, finite, same, before = [], [], [], None
    for number in range(4):
        spoilt = number == 2 and mesh.rank == mesh.world - 1
        classifier = [parameter for parameter in teacher.module.parameters() if parameter.requires_grad][-1]
        hook = classifier.register_hook(lambda gradient, factor=torch.inf if spoilt else 1.0: gradient * factor)
        metrics = dict(step(state, batch))
        hook.remove()
        skipped.append(int(metrics.pop(SKIPPED)))
        metrics.pop(IN_A_ROW)
        finite.append(all(bool(value.isfinite()) for value in metrics.values()))
        after = {
            f"{index}/{kind}/{name}": value.clone()
            for index, network in enumerate((teacher, student))
            for kind, shards in {"master": network.master, **network.optimizer_state}.items()
            for name, value in full_state(network, shards, dict(network.module.named_buffers()), mesh).items()
        }
        same.append(before is not None and all(torch.equal(value, before[name]) for name, value in after.items()))
        before = after
    return skipped, finite, same


@pytest.mark.parametrize(("world", "engine", "stage"), [(1, "flat", 0), (2, "deepspeed", 1), full(2, "deepspeed", 3)])
def test_a_gradient_that_no_loss_betrays_is_seen(world: int, engine: str, stage: int) -> None:
    """DeepSpeed leaves out the update of that one network, whose weights stay finite: the other has moved by then."""
    results = pool(world).run(infinite_gradient, engine, stage) if world > 1 else [infinite_gradient(engine, stage)]
    for skipped, finite, same in results:
        assert skipped == [0, 0, 1, 1]
        assert finite == [True] * 4
        assert same == [False, False, True, False]


# ---- rewind


def test_a_jump_is_one_when_it_lasts() -> None:
    watch = LossWatch(RewindConfig(factor=2.0, window=3, patience=2), step=0)
    lines = [9.0, 1.0, 1.0, 1.0, 2.5, 1.2, 2.3, float("nan")]  # there is no mean before three lines
    said = [watch({"student_loss": loss}, step=number + 1) for number, loss in enumerate(lines)]
    assert said[:7] == [None] * 7  # 2.5 is high, and alone
    assert said[7] == "student_loss = nan is over 2 times 1.067, its mean of 3 lines"
    assert watch.last_good == 6
    known = json.loads(json.dumps(watch.state_dict()))
    again = LossWatch(RewindConfig(factor=2.0, window=3, patience=3), step=8)
    again.load_state_dict(known)  # a resume knows as much
    assert again({"student_loss": 2.3}, step=9) == "student_loss = 2.3 is over 2 times 1.067, its mean of 3 lines"
    watch.start_anew(4)
    assert watch({"student_loss": float("nan")}, step=5) is None  # no mean yet: it is no part of one either
    assert watch.last_good == 4
    assert watch({"teacher_loss": 1e9}, step=5) is None
    assert watch.last_good == 5


SEEN: list[tuple[int, float]] = []
JUMPS: set[float] = set()
FAULTS: set[int] = set()


@register_method("test_jumping", teacher=False, student=True, unlabelled=False)
def jumping(state: State, batch: Batch) -> StepMetrics:
    """Supervised learning that notes what it sees, and says of some that their loss is 100 times what it is.

    JUMPS: of these batches. FAULTS: of these calls, counted from 1; where negative, the process ends in it instead.
    """
    number, mean = int(state.step), batch.labelled.double().mean().item()
    SEEN.append((number, mean))
    metrics = METHODS["supervised"].step(state, batch)
    high = mean in JUMPS or len(SEEN) in FAULTS
    if -len(SEEN) in FAULTS:
        raise InterruptedError("killed")
    return {**metrics, "student_loss": metrics["student_loss"] * (100 if high else 1)}


def jumping_config(folder: Path, **rewind: Any) -> str:
    guard = {"rewind": {"factor": 3.0, "window": 4, "patience": 2, **rewind}}
    config: dict[str, Any] = {"data": {"labelled_per_class": 20}, "method": {"name": "test_jumping"}, "guard": guard}
    raw = json.loads(Path(make_config(folder, phases={"train": {"steps": 20}}, **config)).read_text())
    raw["mpl_scale"]["checkpoint"] = {"every": 4, "keep": 9}
    return write(folder, raw)


def run_jumping(config: str, output: Path, *, stop_after: int | None = None) -> list[tuple[int, float]]:
    """What the steps saw, in order."""
    SEEN.clear()
    train(load_config(config), Options(output), stop_requested=lambda: len(SEEN) == stop_after)
    return list(SEEN)


def test_the_run_goes_back_and_on_with_other_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The batches of steps 11 and 12 (from 1) are high: back from 12 to the checkpoint of 8, on with batches 13 ..."""
    JUMPS.clear()
    FAULTS.clear()
    config = jumping_config(tmp_path)
    plain = run_jumping(config, tmp_path / "plain")
    means = [mean for _, mean in run_jumping(config, tmp_path / "longer", stop_after=20)]
    assert plain == list(enumerate(means))
    JUMPS.update(means[10:12])
    seen = run_jumping(config, tmp_path / "out")
    assert [number for number, _ in seen] == [*range(12), *range(8, 20)]
    assert [mean for _, mean in seen[:16]] == [*means[:12], *means[12:16]]
    said = next(line for line in capfd.readouterr().err.splitlines() if "rewind 1 of 3" in line)
    assert "step_00000008, step 8, and on with the images that follow" in said
    check_documented("student_loss" + said.partition("student_loss")[2], folder=tmp_path)
    saved = [folder.name.lstrip("step_0") for folder in find(tmp_path / "out" / "checkpoints")]
    assert saved == ["20", "16", "12", "8.2", "4"]  # 8 is saved again, with the offset
    # stopped after it went back, and gone on: the same to the bit
    part = run_jumping(config, tmp_path / "parts", stop_after=17)
    assert part + run_jumping(config, tmp_path / "parts") == seen
    # killed in the first step after it: what is left out stays left out
    FAULTS.add(-13)
    with pytest.raises(InterruptedError):
        run_jumping(config, tmp_path / "killed")
    assert seen[:13] == SEEN
    FAULTS.clear()
    assert run_jumping(config, tmp_path / "killed") == seen[12:]
    whole, parts = (read_prefix(find(tmp_path / name / "checkpoints")[0], "student") for name in ("out", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_what_hardware_spoilt_is_done_again(tmp_path: Path) -> None:
    """skip_batches = false: the same images, and the same weights as if nothing had been."""
    JUMPS.clear()
    FAULTS.clear()
    config = jumping_config(tmp_path, skip_batches=False)
    plain = run_jumping(config, tmp_path / "plain")
    FAULTS.update((11, 12))
    assert run_jumping(config, tmp_path / "out") == plain[:12] + plain[8:]
    whole, parts = (read_prefix(find(tmp_path / name / "checkpoints")[0], "student") for name in ("plain", "out"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def run_with_a_jump(config: str, output: str) -> list[tuple[int, float]]:
    """The loss jumps on the last rank only."""
    JUMPS.clear()
    FAULTS.clear()
    FAULTS.update((11, 12) if dist.get_rank() == 1 else ())
    return run_jumping(config, Path(output))


def test_all_ranks_go_back_together(tmp_path: Path) -> None:
    for seen in pool(2).run(run_with_a_jump, jumping_config(tmp_path), str(tmp_path / "out")):
        assert [number for number, _ in seen] == [*range(12), *range(8, 20)]
        assert len({mean for _, mean in seen}) == 24  # no batch is seen twice
    newest = find(tmp_path / "out" / "checkpoints")[0]
    assert read_index(newest).metadata["data_offset"] == 4


def test_it_goes_back_as_often_as_it_may(tmp_path: Path) -> None:
    JUMPS.clear()
    FAULTS.clear()
    config = jumping_config(tmp_path, max_rewinds=1)
    means = [mean for _, mean in run_jumping(config, tmp_path / "plain")]
    JUMPS.update([*means[10:12], *means[16:18]])  # back at 8 it sees 13 to 16, which fill the window, then these
    with pytest.raises(ValueError, match=r"with .*max_rewinds = 1 used up, after step 14 of train") as caught:
        run_jumping(config, tmp_path / "out")
    check_documented(str(caught.value), folder=tmp_path)


def test_without_a_checkpoint_from_before_it_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    JUMPS.clear()
    FAULTS.clear()
    config = jumping_config(tmp_path)
    means = [mean for _, mean in run_jumping(config, tmp_path / "plain")]
    JUMPS.update(means[4:6])  # step 4's checkpoint is from before: it is not there
    raw = json.loads(Path(config).read_text())
    raw["mpl_scale"]["checkpoint"]["every"] = 0
    seen = run_jumping(write(tmp_path, raw, "never.json"), tmp_path / "out")
    assert [number for number, _ in seen] == list(range(20))
    assert "there is no earlier checkpoint of it, so training continues" in capfd.readouterr().err
