"""Where ranks meet: a store on rank 0, and who has joined it.

torch waits for missing ranks in silence. Here a line says after FIRST_LINE seconds how many have joined and which have
not, again each time the wait has doubled, and a run whose ranks stay away ends with RanksMissing.
"""

from __future__ import annotations

import datetime
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

FIRST_LINE = 20.0
"""Seconds of waiting before the first line."""
POLL_SECONDS = 0.1
SHOWN = 8
"""Ranks and ranges of ranks that a message lists."""
ADVICE = "look above for what ended them, and start every rank (deepspeed, torchrun and srun do)"


class RanksMissing(RuntimeError):
    """Not all ranks have joined. A fault of the machines, not of the input: a batch job is requeued."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again


def meet(environment: Mapping[str, str], *, timeout_seconds: float, first_line: float = FIRST_LINE) -> Store:
    """The store that all ranks have joined.

    Args:
        environment: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as a launcher sets them.
        timeout_seconds: to wait for the others.
        first_line: seconds before it is said that ranks are missing.

    Raises:
        RanksMissing: with the ranks that have not joined in time.
    """
    import torch.distributed as dist

    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    at_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has a store already
    waiting = _Waiting(timeout_seconds, first_line, aloud=rank == 0 or environment.get("LOCAL_RANK", "0") == "0")
    if rank and not at_agent:
        waiting.until(
            lambda: _listens(host, port),
            lambda: f"rank {rank}: nobody listens at {host}:{port}; rank 0 is missing, or cannot be reached there",
        )
    store = dist.TCPStore(
        host,
        port,
        world,
        rank == 0 and not at_agent,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        multi_tenant=not at_agent,
    )
    joining = dist.PrefixStore(f"joining/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    joining.set(str(rank), "here")
    joining.add("joined", 1)
    if rank:
        _wait_for_word(joining, rank, waiting)
        return store

    def missing() -> str:
        absent = [other for other in range(world) if not joining.check([str(other)])]
        return f"{world - len(absent)} of {world} ranks have joined; missing: {name_ranks(absent)}"

    waiting.until(lambda: joining.add("joined", 0) >= world, missing)
    joining.set("all", "here")
    return store


def _wait_for_word(joining: Store, rank: int, waiting: _Waiting) -> None:
    """Wait until rank 0 has seen all ranks; rank 0 names the missing ones."""
    import torch.distributed as dist

    try:
        joining.wait(["all"], datetime.timedelta(seconds=waiting.seconds_left() + 5))
    except dist.DistError as error:
        why = str(error).splitlines()[0]
        raise RanksMissing(f"rank {rank}: rank 0 has left, or ranks are missing: {why}") from error


class _Waiting:
    """Waits for a condition, with a message now and then."""

    def __init__(self, timeout_seconds: float, first_line: float, *, aloud: bool) -> None:
        self._timeout, self._next, self._aloud = timeout_seconds, first_line, aloud
        self._began = time.monotonic()

    def seconds_left(self) -> float:
        return max(0.0, self._timeout - (time.monotonic() - self._began))

    def until(self, there: Callable[[], bool], why_not: Callable[[], str]) -> None:
        """Wait until `there` holds; RanksMissing, with `why_not`, at the end of the timeout."""
        while not there():
            waited = time.monotonic() - self._began
            if waited > self._timeout:
                error = RanksMissing(f"{why_not()}, after {waited:.0f} s; {ADVICE}")
                if self._aloud:
                    error.add_note("waiting for ranks")
                raise error
            if waited > self._next:
                self._next = 2 * waited
                if self._aloud:
                    line = f"{why_not()}, after {waited:.0f} s; waiting for up to {self._timeout:.0f} s"
                    print(f"mpl-scale: {line}", file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", or "ranks 1 to 5, 7"; ascending."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and ranges[-1][-1] == rank - 1:
            ranges[-1][1:] = [rank]
        else:
            ranges.append([rank])
    words = [" to ".join(map(str, found)) for found in ranges[:SHOWN]]
    more = f" and {len(ranges) - SHOWN} more ranges" if len(ranges) > SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}{more}"


def refuse_batch_step(environment: Mapping[str, str]) -> None:
    """A batch script, and the shell of an allocation, have the variables of task 0, but nobody starts the others.

    srun numbers its steps from 0; the script and the shell have no step, or one of Slurm's own, above 2**32 - 8. The
    tasks after 0 are srun's in any case.

    Raises:
        ValueError: this is no task of srun, and the job has several.
    """
    step, tasks = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", "")), environment["SLURM_NTASKS"]
    started = step.isdecimal() and int(step) < 2**32 - 8
    if started or environment["SLURM_PROCID"] != "0" or tasks == "1":
        return
    raise ValueError(
        f"this Slurm job has {tasks} tasks (SLURM_NTASKS), but srun has not started this process, and "
        f"{name_ranks(range(1, int(tasks)))} of {tasks} would be missing; start all with `srun python train.py ...`, "
        "or one rank alone with `srun --ntasks=1 python train.py ...`"
    )
