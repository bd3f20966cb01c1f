"""Bad input that one rank finds is said by all, in its own words; other failures: see checkpoint/agree.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from mpl_scale.checkpoint import CheckpointError
from mpl_scale.checkpoint.agree import on_main, together
from mpl_scale.mesh import Mesh
from mpl_scale.monitor import config_hash

R = TypeVar("R")
_SHOWN_FIELDS = 3


def check_same_on_all_ranks(settings: Mapping[str, Any]) -> None:
    """Refuse to start where a rank was given other settings: its collectives would not fit, or its weights.

    Compared by hash; only where these differ are the fields looked for. settings: plain JSON, the whole configuration.
    Collective over the default group. Raises CheckpointError, the same on every rank, with the first such rank, its
    host and its fields.
    """
    own = (config_hash(settings), os.uname().nodename)
    found: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    other = next((rank for rank, (digest, _) in enumerate(found) if digest != found[0][0]), None)
    if other is None:
        return
    both: list[Any] = [settings if dist.get_rank() == 0 else None, settings if dist.get_rank() == other else None]
    for index, source in enumerate((0, other)):
        part = both[index : index + 1]
        dist.broadcast_object_list(part, src=source)
        both[index] = part[0]
    fields = [f"{name} = {json.dumps(new)}, not {json.dumps(old)}" for name, old, new in differences(both[0], both[1])]
    more = f" and {len(fields) - _SHOWN_FIELDS} more" if len(fields) > _SHOWN_FIELDS else ""
    raise CheckpointError(
        f"rank {other} on {found[other][1]} runs configuration {found[other][0]}, rank 0 on {found[0][1]} "
        f"{found[0][0]}: {', '.join(fields[:_SHOWN_FIELDS])}{more}; start all ranks with one file and the same options"
    )


def differences(first: Any, second: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted name and both values of the leaves that differ; a leaf that is absent on one side is None there."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys((*first, *second)):
            yield from differences(first.get(key), second.get(key), f"{name}.{key}" if name else str(key))
    elif first != second:
        yield name, first, second


def value_on_main(mesh: Mesh, work: Callable[[], R]) -> R:
    """checkpoint.agree.on_main, but a ValueError is raised unchanged on every rank."""

    def attempt() -> R | ValueError:
        try:
            return work()
        except ValueError as error:
            return error

    found = on_main(mesh, attempt)
    if isinstance(found, ValueError):
        raise _agreed(found)
    return found


def do_together(mesh: Mesh, work: Callable[[], None]) -> None:
    """Do `work` on every rank; the first ValueError of any is raised on all."""

    def attempt() -> ValueError | None:
        try:
            work()
        except ValueError as error:
            return error
        return None

    found = together(mesh, attempt, lambda errors: next((error for error in errors if error is not None), None))
    if found is not None:
        raise _agreed(found)


def _agreed(error: ValueError) -> ValueError:
    error.agreed = True  # type: ignore[attr-defined]
    return error


def is_agreed(error: ValueError) -> bool:
    """Whether all ranks raise this error, so that one of them says it for all."""
    return getattr(error, "agreed", False)
