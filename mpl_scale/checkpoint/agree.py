"""Ranks that decide together: one rank's failure becomes the same exception on every rank, so that nobody hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mpl_scale.checkpoint.format import CheckpointError
from mpl_scale.mesh import Mesh

T = TypeVar("T")
R = TypeVar("R")


def together(mesh: Mesh, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
    """Do `work` on every rank, `judge` the results (by rank) on rank 0, return its verdict on every rank.

    Raises the first exception of any rank, or else that of `judge`, on all ranks: a CheckpointError as it is, any
    other as a CheckpointError that names the rank. Collective over the world; work and judge must hold none.
    """
    result = _attempt(work, mesh.rank)
    results: list[Any] = [result] * mesh.world
    if mesh.world_group is not None:
        dist.gather_object(result, results if mesh.is_main else None, dst=0, group=mesh.world_group)
    verdict: list[Any] = [None]
    if mesh.is_main:
        failure = next((result for result in results if isinstance(result, CheckpointError)), None)
        verdict = [failure or _attempt(lambda: judge(results), mesh.rank)]
    if mesh.world_group is not None:
        dist.broadcast_object_list(verdict, src=0, group=mesh.world_group)
    if isinstance(verdict[0], CheckpointError):
        raise verdict[0]
    return verdict[0]


def on_main(mesh: Mesh, work: Callable[[], R]) -> R:
    """Do `work` on rank 0 only and return its result, or raise its exception, on every rank."""
    return together(mesh, lambda: None, lambda _: work())


def _attempt(work: Callable[[], T], rank: int) -> T | CheckpointError:
    """The result of work, or its exception as a value."""
    try:
        return work()
    except CheckpointError as error:
        return error
    except Exception as error:
        failure = CheckpointError(f"rank {rank}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
