"""One rank of healthcheck.sh: joins the others and sums numbers with them, on this rank's GPU if there is one.

Started by srun, one task per GPU, or one per node on CPUs. A rank that gets into contact with the first prints
"HOST joined as rank N": who does not is to blame, not those who wait for it. Then "HOST FAIL ...", or once
a node "HOST ok ...".
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

ELEMENTS = 4 << 20  # 16 MiB of fp32: long enough to use the fabric, short enough for a check
ROUNDS = 5


def main() -> int:
    """0 if the sum is right, else 1."""
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    seconds = float(os.environ.get("MPL_SCALE_CHECK_SECONDS", "60"))
    try:
        device = torch.device("cpu")
        if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
            device = torch.device("cuda", int(os.environ["SLURM_LOCALID"]) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        limit = datetime.timedelta(seconds=seconds)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, world, rank == 0, limit, wait_for_workers=False)
        print(f"{host} joined as rank {rank}", flush=True)
        if not _all_here(store, rank, world, seconds / 2):
            return 1
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        values = torch.full((ELEMENTS,), float(rank + 1), device=device)
        began = time.perf_counter()
        for _ in range(ROUNDS):
            values.fill_(float(rank + 1))
            dist.all_reduce(values)
        expected = world * (world + 1) / 2  # exact in fp32 below 5,700 ranks
        right = bool((values == expected).all())  # waits for the device
        gigabytes = ROUNDS * values.nbytes / (time.perf_counter() - began) / 1e9
        dist.destroy_process_group()
    except Exception as error:  # whatever is wrong with a node, the line names it
        print(f"{host} FAIL all-reduce: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return 1
    if not right:
        print(f"{host} FAIL all-reduce: the sum is {values[0].item()}, not {expected}", flush=True)
        return 1
    if os.environ["SLURM_LOCALID"] == "0":
        print(f"{host} ok all-reduce of {world} ranks: {gigabytes:.2f} GB/s", flush=True)
    return 0


def _all_here(store: dist.Store, rank: int, world: int, seconds: float) -> bool:
    """Whether every rank joins in time; the first decides for all."""
    store.set(f"here/{rank}", "")
    if rank == 0:
        deadline = time.monotonic() + seconds
        here = False
        while not here and time.monotonic() < deadline:
            here = store.check([f"here/{other}" for other in range(world)])
            time.sleep(0.1)
        store.set("all", "yes" if here else "no")
        if not here:
            time.sleep(3)  # the store goes with this process: the others are still reading
    return bool(store.get("all") == b"yes")


if __name__ == "__main__":
    sys.exit(main())
