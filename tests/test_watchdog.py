"""A rank that stands still is named, with what the others wait in, and the run ends with a status of its own."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch

from mpl_scale.config import check, load_config
from mpl_scale.mesh import build_mesh
from mpl_scale.trainer.prepare import Options, train
from mpl_scale.trainer.watchdog import HANG_STATUS, Sighting, Watchdog, verdict
from tests.support.configs import tiny, write
from tests.support.faults import check_documented
from tests.support.launched import free_port
from tests.support.tiers import full

HANG_AFTER = 7


class Hang:
    """Asked once at the end of each step; one rank then stays in it, asleep or frozen."""

    def __init__(self, how: str) -> None:
        self._steps, self._how = 0, how

    def __call__(self) -> bool:
        self._steps += 1
        if self._steps == HANG_AFTER:
            if self._how == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        return False


def hang(rank: int, port: int, config: str, output: str, how: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(f"{output}.log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    stop = Hang(how) if rank == 1 else lambda: False
    train(load_config(config), Options(Path(output)), stop_requested=stop)


@pytest.fixture
def hung(tmp_path: Path, how: str) -> Iterator[tuple[Path, list[SpawnProcess]]]:
    """The folder of a run whose rank 1 hangs, and its two ranks."""
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["guard"] = {"hang_seconds": 10.0}  # hundreds of these steps: a busy machine took 3 s for one
    context = multiprocessing.get_context("spawn")
    given = (free_port(), write(tmp_path, raw), str(tmp_path / "out"), how)
    ranks = [context.Process(target=hang, args=(rank, *given)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    yield tmp_path, ranks
    for rank in ranks:
        rank.kill()


@pytest.mark.parametrize("how", ["asleep", full("frozen")])
def test_the_rank_that_hangs_is_named(hung: tuple[Path, list[SpawnProcess]], how: str) -> None:
    folder, ranks = hung
    output = folder / "out"
    ranks[0].join(200)
    said = Path(f"{output}.log0").read_text()
    assert ranks[0].exitcode == HANG_STATUS, said
    if how == "frozen":
        ranks[1].kill()
    ranks[1].join(60)
    assert ranks[1].exitcode == (HANG_STATUS if how == "asleep" else -signal.SIGKILL)
    expected = f"mpl-scale: error: no step ended for 10 s, the last was step {HANG_AFTER}. Not arrived: "
    assert expected + f"rank 1 (process {ranks[1].pid} on {os.uname().nodename}), " in said
    assert ("in no collective at " if how == "asleep" else "which gives no sign") in said
    assert "Waiting for it: rank 0, in all_reduce (collective " in said
    assert "at mpl_scale/trainer/requests.py:" in said
    assert "(agreed)" in said
    line = next(line for line in said.splitlines() if "no step ended" in line)
    check_documented(re.sub(r" at mpl_scale/\S+ \(.*?\)", "", line), folder=folder)
    stack = (output / "stacks" / "rank00000.txt").read_text()
    assert "all_reduce" in stack
    assert (output / "stacks" / "rank00001.txt").exists() == (how == "asleep")
    if how == "asleep":
        assert "in __call__" in (output / "stacks" / "rank00001.txt").read_text()  # of Hang


def test_a_patience_beyond_the_collectives_own_is_refused(tmp_path: Path) -> None:
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"timeout_seconds": 60.0}
    for seconds, refused in ((59.0, False), (60.0, True)):
        raw["mpl_scale"]["guard"] = {"hang_seconds": seconds}
        config = load_config(write(tmp_path, raw))
        if not refused:
            check(config, world=1, cuda=False)
            continue
        with pytest.raises(ValueError, match=r"hang_seconds = 60 comes too late: .*timeout_seconds = 60") as caught:
            check(config, world=1, cuda=False)
        check_documented(str(caught.value), folder=tmp_path)


def test_it_sleeps_while_work_without_steps_goes_on(tmp_path: Path) -> None:
    now, ended = [0.0], threading.Event()
    mesh = build_mesh(device=torch.device("cpu"))
    looked = threading.Semaphore(0)

    def clock() -> float:
        looked.release()
        return now[0]

    watchdog = Watchdog(tmp_path, seconds=0.2, mesh=mesh, clock=clock, end=lambda status: ended.set())
    watchdog.beat(1)
    watchdog.rest()
    now[0] = 100.0
    assert not ended.wait(0.5)  # some twenty looks
    watchdog.beat(2)
    now[0] = 100.1
    assert not ended.wait(0.5)
    now[0] = 100.3
    assert ended.wait(20)
    assert (tmp_path / "stacks" / "rank00000.txt").read_text().splitlines()[0].endswith("after step 2")


def at(rank: int, **fields: object) -> Sighting:
    return Sighting(rank=rank, host="n1", pid=10 + rank, **{"step": 5, "hangs": True, **fields})  # type: ignore[arg-type]


WAITS = {"collective": 9, "call": "all_reduce", "place": "mpl_scale/x.py:1 (f)"}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (
            [at(0, **WAITS), at(1, hangs=False), at(2, **WAITS)],
            "rank 1 (process 11 on n1), which gives no sign",
        ),
        ([at(0, **WAITS), at(1, step=4, **WAITS)], "Not arrived: rank 1 (process 11 on n1), in all_reduce"),
        (
            [at(0, collective=8, call="broadcast"), at(1, **WAITS)],
            "arrived: rank 0 (process 10 on n1), in broadcast",
        ),
        (
            [at(0, call="all_reduce"), at(1)],
            "arrived: rank 1 (process 11 on n1), in no collective. Waiting for it: ",
        ),
        (
            [at(0, **WAITS), at(1, **WAITS)],
            "No rank is behind: all are in all_reduce (collective 9) at mpl_scale/x.py",
        ),
        ([at(0)], "No rank is behind: all are in no collective"),
    ],
)
def test_who_is_behind(seen: list[Sighting], expected: str) -> None:
    said = verdict(seen, seconds=30)
    assert said.startswith("no step ended for 30 s, the last was step 5. ")
    assert expected in said


def test_a_thousand_ranks_are_told_in_a_line() -> None:
    said = verdict([at(rank, hangs=rank % 2 == 0, **WAITS) for rank in range(1000)], seconds=30)
    assert "and 492 more. Waiting for it: ranks 0, 2, 4, 6, 8, 10, 12, 14 and 492 more, in all_reduce" in said
