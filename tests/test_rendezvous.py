"""Ranks that meet, and what is said of those that do not come."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mpl_scale.mesh import adopt_slurm_environment
from mpl_scale.rendezvous import RanksMissing, meet, name_ranks

BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "4",
}
"""Of a batch script; srun adds SLURM_STEP_ID and more for each task."""


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_ranks_meet_in_any_order_and_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    port, world = free_port(), 3
    with ThreadPoolExecutor(world) as threads:
        late = [threads.submit(meet, environment(rank, world, port), timeout_seconds=60) for rank in (2, 1)]
        late.append(threads.submit(meet, environment(0, world, port), timeout_seconds=60))
        stores = [future.result() for future in late]
    stores[0].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * world
    assert capfd.readouterr() == ("", "")


def test_missing_ranks_are_named_rarely_and_then_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()

    def other() -> None:
        with contextlib.suppress(RanksMissing):
            meet(environment(1, 6, port), timeout_seconds=3)

    one = threading.Thread(target=other)
    one.start()
    with pytest.raises(RanksMissing, match=r"2 of 6 ranks have joined; missing: ranks 2 to 5, after 3 s; .*srun") as e:
        meet(environment(0, 6, port), timeout_seconds=3, first_line=0.5)
    assert e.value.status == 75
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("mpl-scale: 2 of 6 ranks have joined; missing: ranks 2 to 5, after ")
    assert lines[0].endswith("; waiting for up to 3 s")
    assert 1 < len(lines) < 5  # after 0.5, 1 and 2 s
    one.join()


def test_without_rank_0_the_others_say_where_they_look() -> None:
    port = free_port()
    with pytest.raises(RanksMissing, match=rf"rank 1: nobody listens at 127.0.0.1:{port}; rank 0 is missing"):
        meet(environment(1, 2, port), timeout_seconds=0.3)


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "batch"}, {"SLURM_STEP_ID": str(2**32 - 6)}])
def test_a_batch_script_is_no_rank_of_several(step: dict[str, str]) -> None:
    """The last: the shell of salloc."""
    found = {**BATCH, **step}
    with pytest.raises(ValueError, match=r"4 tasks .*ranks 1 to 3 of 4 .*`srun python train.py \.\.\.`"):
        adopt_slurm_environment(found)
    assert "RANK" not in found


@pytest.mark.parametrize(
    "own",
    [
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_STEPID": "3"},
        {"SLURM_PROCID": "2"},  # the batch script is task 0
        {"SLURM_NTASKS": "1"},
    ],
)
def test_tasks_of_srun_are_ranks(own: dict[str, str]) -> None:
    found = {**BATCH, **own}
    adopt_slurm_environment(found)
    assert (found["RANK"], found["WORLD_SIZE"]) == (found["SLURM_PROCID"], found["SLURM_NTASKS"])


def test_ranks_are_named_by_ranges() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([1, 2, 3, 7, 9, 10]) == "ranks 1 to 3, 7, 9 to 10"
    assert name_ranks(range(0, 40, 2)).endswith("14 and 12 more ranges")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
        ({"WORLD_SIZE": "2" * 5000}, "WORLD_SIZE = '222222222222222222...'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE = '0'"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK = 5 with WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK = '-1'"),
        ({"RANK": "1"}, "RANK = 1 with WORLD_SIZE = 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK = 'x'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT = '99999'"),
        ({**BATCH, "SLURM_NTASKS": "x"}, "SLURM_NTASKS = 'x'"),
        ({**BATCH, "SLURM_JOB_ID": "7_1"}, "SLURM_JOB_ID = '7_1'"),
    ],
)
def test_variables_that_no_launcher_sets_so_are_named(variables: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named}.*unset it to run alone") as caught:
        adopt_slurm_environment(variables)
    assert caught.value.__notes__ == [f"rank {variables.get('RANK', 0)}"]  # so that every rank prints it
