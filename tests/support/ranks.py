"""Pools of local ranks that tests share: importing torch and deepspeed costs seconds, and half a gigabyte a process.

`pool(4).run(function, *args)` calls `function(*args)` on each of 4 processes joined by gloo and returns the four
results. The function and its arguments must pickle (top-level functions of a test module do). Ranks are forked from a
server that has imported everything and computed nothing, so they start in no time and share its memory.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from typing import Any

import pytest

TIMEOUT_SECONDS = 240
MOST_RANKS = 6
"""At once, in pools of this process: the one used longest ago ends first."""
PRELOADED = ("pytest", "deepspeed", "mpl_scale.trainer.prepare", "torch._dynamo", "torch.distributed.fsdp")
"""What the server imports. Not torch._inductor: it starts threads and processes."""


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    while (task := pipe.recv()) is not None:
        function, args, kwargs = task
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class RankPool:
    """`world` processes with an initialised gloo group."""

    def __init__(self, world: int) -> None:
        self.world = world
        folder = tempfile.mkdtemp(prefix="ranks")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DS_ACCELERATOR", "cpu")  # read when the server imports deepspeed
            multiprocessing.forkserver.ensure_running()
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, f"{folder}/store", theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        atexit.register(self.close)

    def run(self, function: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function on every rank; results by rank. One rank's exception fails the call with its traceback."""
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_SECONDS if not failures else 20):
                failures.append(f"rank {rank}: no answer")
                continue
            succeeded, value = pipe.recv()
            results.append(value)
            if not succeeded:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """End the processes."""
        _pools.pop(self.world, None)
        for process in self._processes:
            if process.is_alive():
                process.terminate()
            process.join(5)


_pools: dict[int, RankPool] = {}
"""By number of ranks; the one used last stands last."""


def pool(world: int) -> RankPool:
    """The pool of that size, started where there is none."""
    found = _pools.pop(world, None)
    if found is None:
        while _pools and sum(_pools) + world > MOST_RANKS:
            next(iter(_pools.values())).close()
        sys.stdout.flush()
        found = RankPool(world)
    _pools[world] = found
    return found
