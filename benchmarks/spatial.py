"""What the width partition costs: traffic per image, imbalance of the columns, and step time against whole images.

    torchrun --nproc_per_node 4 -m benchmarks.spatial --model digits_cnn --size 64 --batch 16 --widths 1 2 4

All widths run in one process per rank, on the same ranks and the same global batch of random pixels, with the rest of
the ranks as data parallel: width 1 is plain data parallelism. A step is forward, backward and update of one network
under the flat engine. Widths take turns (A B C A B C ...), so that drift of the machine cancels in the ratios; a ratio
is taken within each round. Prints a table and writes OUTPUT: command, commit, versions, every measured second.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mpl_scale.config.schema import ModelConfig, NetworkConfig, OptimConfig
from mpl_scale.device import Numerics
from mpl_scale.engine import build_network
from mpl_scale.mesh import Mesh, adopt_slurm_environment, build_mesh, choose_device, start_process_group
from mpl_scale.models import Pass, build_model
from mpl_scale.monitor import versions
from mpl_scale.spatial import input_columns, parallelize, traffic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits_cnn")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images, pixels")
    parser.add_argument("--batch", type=int, default=16, help="images of a step over all ranks")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4], help="the first is what others divide by")
    parser.add_argument("--switch_at", default="auto")
    parser.add_argument("--halo", default="plain", choices=("plain", "block_input"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="steps of each width in a round")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/spatial.json"))
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    options = parser.parse_args()

    adopt_slurm_environment(os.environ)
    device = choose_device(os.environ)
    Numerics().apply(device)
    start_process_group(device, timeout_seconds=600)
    world = dist.get_world_size()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if bad := [width for width in options.widths if world % width or options.batch % (world // width)]:
        parser.error(f"--widths {bad} do not divide {world} ranks, or leave no equal share of --batch {options.batch}")
    steps, rows = {}, {}
    for width in options.widths:
        mesh = build_mesh(device=device, width=width)
        steps[width], rows[width] = _prepare(options, mesh)
    seconds = _measure(steps, rounds=options.rounds, count=options.steps, device=device)
    if dist.get_rank() == 0:
        _report(options, rows, seconds, world=world, device=device)
    dist.destroy_process_group()
    return 0


def _prepare(options: argparse.Namespace, mesh: Mesh) -> tuple[Callable[[], None], dict[str, Any]]:
    """A step of this width, warmed up, and what it sends and owns."""
    section = NetworkConfig(name=options.model)
    shared = ModelConfig(teacher=section, student=section, num_classes=options.classes, image_size=options.size)
    model = build_model(section, shared, field="--model", seed=0, group=mesh.world_group)
    columns = input_columns(options.size, mesh.width)
    model = parallelize(model, mesh=mesh, image_size=options.size, switch_at=options.switch_at, halo=options.halo)
    optim = OptimConfig(lr=0.0, momentum=0.9)
    network = build_network(model.to(mesh.device), engine="flat", optim=optim, ds_config={}, mesh=mesh)
    batch = options.batch // mesh.data
    first = mesh.data_index * batch
    start, stop = columns[mesh.width_index]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(options.batch, 3, options.size, options.size, generator=generator)
    images = pixels[first : first + batch, ..., start:stop].contiguous().to(mesh.device)
    labels = (torch.arange(first, first + batch) % options.classes).to(mesh.device)
    number, lr = torch.zeros((), dtype=torch.int64, device=mesh.device), torch.zeros((), device=mesh.device)
    global_rows = torch.arange(first, first + batch, device=mesh.device)

    def step() -> None:
        logits = network.forward(images, Pass(seed=0, stream=0, step=number, rows=global_rows))
        network.accumulate(F.cross_entropy(logits, labels))
        network.reduce()
        network.apply(lr)

    step()
    found = {"columns": [stop - start for start, stop in columns], "rows": batch}
    if mesh.width > 1:
        sent = traffic(model)
        sent.reset()
        step()
        counts = torch.tensor([sent.bytes, sent.messages, sent.exchanges], dtype=torch.float64)
        dist.all_reduce(counts)
        total, messages, exchanges = (counts / mesh.world).tolist()
        found |= {
            "bytes_per_image_and_rank": total / batch,
            "messages_per_step_and_rank": messages,
            "exchanges_per_step": exchanges,
        }
    owned = found["columns"]
    found["imbalance"] = max(owned) * len(owned) / sum(owned)
    return step, found


def _measure(
    steps: dict[int, Callable[[], None]], *, rounds: int, count: int, device: torch.device
) -> dict[int, list[float]]:
    """Seconds per step of each width and round; the slowest rank's, by barriers."""

    def together() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()
        return time.perf_counter()

    seconds: dict[int, list[float]] = {width: [] for width in steps}
    for _ in range(rounds):
        for width, step in steps.items():
            began = together()
            for _ in range(count):
                step()
            seconds[width].append((together() - began) / count)
    return seconds


def _report(
    options: argparse.Namespace,
    rows: dict[int, Any],
    seconds: dict[int, list[float]],
    *,
    world: int,
    device: torch.device,
) -> None:
    base = options.widths[0]
    for width, found in rows.items():
        ratios = sorted(own / other for own, other in zip(seconds[width], seconds[base], strict=True))
        found |= {"seconds_per_step": seconds[width], "ratio_median": statistics.median(ratios)}
        sent = found.get("bytes_per_image_and_rank", 0.0) / 1e6
        print(
            f"width {width} (data {world // width}): {1e3 * statistics.median(seconds[width]):.1f} ms a step, "
            f"{found['ratio_median']:.3f} of width {base} (rounds {ratios[0]:.3f} to {ratios[-1]:.3f}); "
            f"{sent:.3f} MB an image and rank in {found.get('exchanges_per_step', 0):.0f} exchanges, "
            f"{found.get('messages_per_step_and_rank', 0):.1f} messages; "
            f"columns {found['columns']}, imbalance {found['imbalance']:.3f}"
        )
    document = {
        "command": f"torchrun --nproc_per_node {world} -m benchmarks.spatial {shlex.join(sys.argv[1:])}",
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--short").splitlines(),
        "options": {name: str(value) for name, value in vars(options).items()},
        "ranks": world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "versions": versions(),
        "widths": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written: {options.output}")


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
