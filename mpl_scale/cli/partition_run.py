"""`mpl-scale partition`: a model's width partition as a table, and its proof in float64 on local ranks."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.spatial import Differences, compare_partitioned, partition_table
from mpl_scale.workers import deaf_to_interrupts, end_with_parent

TOLERANCE = 1e-8
"""Of the largest relative difference: float64 roundings of 1e-16, enlarged by a deep net's many batch norms."""


def partition(options: argparse.Namespace) -> int:
    """Print the table; with --verify also compare. Returns 0, or 1 where partitioned and whole images differ.

    Raises:
        ValueError: a model that is unknown, or has a module without a partition rule; names the module.
    """
    if options.verify and options.width == 1:
        raise ValueError("--verify --width 1: nothing is partitioned; use a width of 2 or more")
    model = _model(options, device="meta")
    how = {"image_size": options.size, "width": options.width, "switch_at": options.switch_at, "halo": options.halo}
    print(partition_table(model, **how), flush=True)
    if not options.verify:
        return 0
    found = _on_local_ranks(options)
    for name, value in dataclasses.asdict(found).items():
        print(f"{name}: {value:.1e}" if isinstance(value, float) else f"{name}: {value}")
    equal = found.worst <= TOLERANCE
    print(f"partitioned over {options.width} ranks {'equals' if equal else 'DIFFERS FROM'} whole images in float64")
    return 0 if equal else 1


def _model(options: argparse.Namespace, *, device: str = "cpu", group: dist.ProcessGroup | None = None) -> nn.Module:
    section = NetworkConfig(name=options.model)
    shared = ModelConfig(teacher=section, student=section, num_classes=options.classes, image_size=options.size)
    return build_model(section, shared, field="--model", seed=0, group=group, device=device)


def _on_local_ranks(options: argparse.Namespace) -> Differences:
    """What `width` processes on this machine found, joined by gloo."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, str(Path(folder) / "store"), options, theirs), daemon=True)
            for rank in range(options.width)
        ]
        try:
            with deaf_to_interrupts():
                for rank in ranks:
                    rank.start()
            while not ours.poll(0.2):
                if any(rank.exitcode for rank in ranks):
                    raise ValueError("--verify: a rank failed; its traceback is above")
            found: Differences = ours.recv()
            for rank in ranks:
                rank.join()
        finally:
            for rank in ranks:
                rank.terminate()
    return found


def _rank(rank: int, store: str, options: argparse.Namespace, answer: Connection) -> None:
    end_with_parent()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.width))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.width)
    found = compare_partitioned(
        lambda group: _model(options, group=group),
        mesh=build_mesh(device=torch.device("cpu"), width=options.width),
        image_size=options.size,
        batch=options.batch,
        switch_at=options.switch_at,
        halo=options.halo,
    )
    if rank == 0:
        answer.send(found)
    dist.destroy_process_group()
