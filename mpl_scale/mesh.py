"""The parallel mesh: world = data x width, width innermost, its process groups, and the launcher's environment."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mpl_scale.rendezvous import meet, refuse_batch_step


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

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor of each rank, all of one shape. Collective."""
        if self.world_group is None:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.world_group)
        return total


def adopt_slurm_environment(environment: MutableMapping[str, str]) -> None:
    """Under plain `srun`, set the variables that torchrun and deepspeed set; theirs win where RANK is set.

    MASTER_ADDR is the job's first host and MASTER_PORT follows from the job id, unless the batch script exports them.

    Raises:
        ValueError: in the script of a job of several tasks, which srun has not started; or variables that no launcher
            sets so.
    """
    _check_ranks(environment)
    if "RANK" in environment or "SLURM_PROCID" not in environment or "SLURM_NTASKS" not in environment:
        return
    refuse_batch_step(environment)
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_slurm_host(environment)
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))


_FROM_ONE = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS", "MASTER_PORT")
_FROM_ZERO = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
_LEAST = dict.fromkeys(_FROM_ONE, 1) | dict.fromkeys(_FROM_ZERO, 0)
_MOST = {"MASTER_PORT": 65535}
_DIGITS = 18


def _check_ranks(environment: Mapping[str, str]) -> None:
    """ValueError, printed by this rank: a launcher's variable is out of its range, or RANK is not below WORLD_SIZE."""
    faults = []
    for name, least in _LEAST.items():
        text, most = environment.get(name), _MOST.get(name)
        number = int(text) if text is not None and text.isdecimal() and len(text) <= _DIGITS else -1
        if text is not None and not least <= number <= (most or number):
            shown = text if len(text) <= _DIGITS else f"{text[:_DIGITS]}..."
            faults.append(f"{name} = {shown!r}, not a whole number from {least}{f' to {most}' if most else ''}")
    for size in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environment.get(size, "1") != "1" and "RANK" not in environment and "SLURM_PROCID" not in environment:
            faults.append(f"{size} = {environment[size]!r}, and RANK is not set: mpirun's ranks would each train alone")
    if not faults and (rank := int(environment.get("RANK", 0))) >= (world := int(environment.get("WORLD_SIZE", 1))):
        faults.append(f"RANK = {rank} with WORLD_SIZE = {world}: ranks count from 0")
    if faults:
        error = ValueError(f"{'; '.join(faults)}; start with deepspeed, torchrun or srun, or unset it to run alone")
        error.add_note(f"rank {environment.get('RANK', 0)}")
        raise error


def _first_slurm_host(environment: MutableMapping[str, str]) -> str:
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    if environment.get("SLURM_NNODES", "1") == "1" or not nodes:
        return "127.0.0.1"
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"MASTER_ADDR is not set and `scontrol show hostnames {nodes}` failed: {error}") from error
    return listed.stdout.split()[0]


def choose_device(environment: Mapping[str, str]) -> torch.device:
    """This rank's GPU, or the CPU where there is none or DS_ACCELERATOR=cpu asks for it.

    Where the launcher shows each rank one GPU of its own, that one. Whether it is its own is checked when the ranks
    have joined (`start_process_group`).
    """
    if environment.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(environment.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local < count:
        return torch.device("cuda", local)
    if count == 1 and _shown_one_gpu(environment):
        return torch.device("cuda", 0)
    raise ValueError(
        f"LOCAL_RANK = {local}, but this rank sees {count} {'GPU' if count == 1 else 'GPUs'}; start at most {count} "
        "on this node, or let each rank see one GPU of its own (srun --gpus-per-task=1, or CUDA_VISIBLE_DEVICES)"
    )


def _shown_one_gpu(environment: Mapping[str, str]) -> bool:
    """Whether Slurm or CUDA_VISIBLE_DEVICES picked the one visible GPU; else the node has no other."""
    picked = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    by_task = environment.get("SLURM_LOCALID") == environment.get("LOCAL_RANK") and (
        "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    )
    return len(picked) == 1 or by_task


def start_process_group(device: torch.device, *, timeout_seconds: float) -> None:
    """Join the ranks: NCCL for GPUs (gloo beside it for host values), gloo for CPUs; one process needs no launcher.

    Raises:
        RanksMissing: some have not come within timeout_seconds.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not set; start with deepspeed, torchrun, srun, or plain python")
    store = meet(os.environ, timeout_seconds=timeout_seconds)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    if device.type == "cuda":
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (os.uname().nodename, str(torch.cuda.get_device_properties(device).uuid)))
        refuse_shared_gpu(found)


def refuse_shared_gpu(found: Sequence[tuple[str, str]]) -> None:
    """Each rank has a GPU of its own; found: (host, the GPU's UUID) of every rank.

    Raises:
        ValueError: names two ranks that share one, on every rank; NCCL would fail without saying so, or hang.
    """
    first: dict[tuple[str, str], int] = {}
    for rank, gpu in enumerate(found):
        if gpu in first:
            raise ValueError(
                f"ranks {first[gpu]} and {rank} both compute on GPU {gpu[1]} of {gpu[0]}; start one rank for each GPU, "
                "or give each rank a GPU of its own (srun --gpus-per-task=1, or CUDA_VISIBLE_DEVICES)"
            )
        first[gpu] = rank


_GROUPS: dict[tuple[Any, ...], Any] = {}


def process_group(ranks: Sequence[int], *, local: bool = False) -> Any:
    """The group of these ranks, made once: a group is never freed, and gloo's keeps threads that wake all the time.

    Args:
        ranks: global ranks, ascending.
        local: only the group's own ranks call this; else all ranks do, in the same order.
    """
    key = (dist.group.WORLD, *ranks)
    if key not in _GROUPS:
        _GROUPS[key] = dist.new_group(list(ranks), use_local_synchronization=local)
    return _GROUPS[key]


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
            raise ValueError(
                f"mpl_scale.parallel.{name} = {size} does not divide the {world} ranks; use a divisor of {world}"
            )

    def group(members: list[list[int]]) -> Any:
        """The group of this rank among disjoint member lists; None for groups of one."""
        if not distributed or len(members[0]) == 1:
            return None
        if len(members) == 1:
            return dist.group.WORLD
        groups = [process_group(ranks) for ranks in members]  # every rank must take part in making every group
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
