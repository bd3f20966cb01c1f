"""The parallel mesh: world = data x width, width innermost (DESIGN 3), and the process groups along its axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """One rank's place in the mesh.

    Groups are None in a single process; callers then skip the collective. Replica groups hold the ranks that own the
    same shard; they are None when the state is sharded over the whole world.
    """

    device: torch.device
    rank: int
    world: int
    data: int
    width: int
    data_index: int
    width_index: int
    world_group: dist.ProcessGroup | None
    width_group: dist.ProcessGroup | None
    shard_group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None
    shard_size: int
    shard_index: int

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes."""
        return self.rank == 0


def build_mesh(*, device: torch.device, width: int = 1, shard_size: int | None = None) -> Mesh:
    """The mesh of this process, from torch.distributed if it is initialised, else of one process.

    Args:
        device: where this rank computes.
        width: ranks that share one image; divides the world.
        shard_size: consecutive ranks that share one copy of the state; divides the world; None: all of them.
    """
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    shard_size = shard_size or world
    for name, size in (("width", width), ("shard_size", shard_size)):
        if world % size:
            raise ValueError(f"mpl_scale.parallel.{name} = {size} does not divide the {world} ranks; use a divisor of {world}")

    def group(members: list[list[int]]) -> dist.ProcessGroup | None:
        """The group of this rank among disjoint member lists; None for groups of one."""
        if not distributed or len(members[0]) == 1:
            return None
        if len(members) == 1:
            return dist.group.WORLD
        groups = [dist.new_group(ranks) for ranks in members]  # every rank must take part in making every group
        return next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)

    def blocks(size: int) -> list[list[int]]:
        return [list(range(start, start + size)) for start in range(0, world, size)]

    def strided(copies: int) -> list[list[int]]:
        return [list(range(start, world, copies)) for start in range(copies)]

    return Mesh(
        device=device,
        rank=rank,
        world=world,
        data=world // width,
        width=width,
        data_index=rank // width,
        width_index=rank % width,
        world_group=group([list(range(world))]),
        width_group=group(blocks(width)),
        shard_group=group(blocks(shard_size)),
        replica_group=group(strided(shard_size)),
        shard_size=shard_size,
        shard_index=rank % shard_size,
    )
