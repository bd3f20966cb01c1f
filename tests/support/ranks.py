"""A pool of local ranks that is started once and reused by every test: importing torch and deepspeed costs seconds.

`pool(4).run(function, *args)` calls `function(*args)` on each of 4 processes joined by gloo and returns the four
results. The function and its arguments must pickle (top-level functions of a test module do).
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 240


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
        context = multiprocessing.get_context("spawn")
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
            pool.cache_clear()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()
            process.join(5)


@functools.cache
def pool(world: int) -> RankPool:
    """The session's pool of that size."""
    sys.stdout.flush()
    return RankPool(world)
