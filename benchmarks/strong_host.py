"""What a device's host does for one batch of strong views: grouped by operation, and with fixed shapes.

    python -m benchmarks.strong_host --images 896 --size 32 --rounds 15

No device is needed. "operators" and "transfers" (host tensors that enter the device) are counted on torch's meta
device. "queueing" is the host's time for these operators, in CPU milliseconds, measured with almost no arithmetic in
them: for the grouped form on as many images of 4x4 pixels, for the static one, whose operators do not depend on the
number of images, on one image. It includes neither a GPU's launches nor the grouped form's waits. "parameters" is what
the host computes before the static form, and all it does where a CUDA graph contains the rest. "computing" is both
forms' time on this CPU, why a CPU keeps the grouped form. The least of ROUNDS; one thread. Prints a table and writes
OUTPUT.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import report
from mpl_scale.augment import StrongView, registry
from mpl_scale.config.schema import StrongConfig

CPU, META = torch.device("cpu"), torch.device("meta")
FEW_PIXELS = 4


class Grouped(StrongView):
    """Grouped by operation on every device."""

    def _is_static(self, images: torch.Tensor) -> bool:
        return False


class Operators(TorchDispatchMode):
    """Counts operators, and those that bring a host tensor to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts["operators"] += 1
        devices = [
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in (args, result)
        ]
        self.counts["transfers"] += "cpu" in devices[0] and "meta" in devices[1]
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=896)
    parser.add_argument("--size", type=int, default=32, help="height and width, pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("runs/strong_host.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for op_set in ("no_pairing", "cifar10"):
        results.append({"op_set": op_set, **measured(op_set, options.images, options.size, options.rounds)})
        show(results[-1])
    document = {
        **report.provenance("benchmarks.strong_host", CPU),
        "unit": "CPU milliseconds per batch",
        "images": options.images,
        "size": options.size,
        "results": results,
    }
    report.write(options.output, document)
    return 0


def measured(op_set: str, count: int, size: int, rounds: int) -> dict[str, Any]:
    """Both forms' counts and times for batches of `count` images."""
    arguments: dict[str, Any] = {"seed": 0, "stream": 0, "candidates": np.arange(50_000)}
    grouped, view = (kind(StrongConfig(op_set=op_set), **arguments) for kind in (Grouped, StrongView))
    assert view.static is not None
    static, ids = view.static, np.arange(count)

    def images(number: int, side: int, device: torch.device = CPU) -> torch.Tensor:
        return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, device=device)

    def epoch(number: int) -> np.ndarray:
        return np.full(count, number)

    def parameters(number: int) -> torch.Tensor:
        return view.parameters(ids, epoch(number), size=(size, size), device=CPU)

    abstract, few, one, whole = (
        images(count, size, META),
        images(count, FEW_PIXELS),
        images(1, size),
        images(count, size),
    )
    drawn = parameters(0)
    result: dict[str, Any] = {
        "grouped": counted(lambda: grouped(abstract, ids, epoch(0), abstract)),
        "static": counted(lambda: view(abstract, ids, epoch(0), abstract)),
    }
    chunk, registry.CHUNK_BYTES = registry.CHUNK_BYTES, count * few[0].numel()  # as on a device: a group at once
    result["grouped"]["queueing"] = least(lambda number: grouped(few, ids, epoch(number), few), rounds)
    registry.CHUNK_BYTES = chunk
    result["static"]["queueing"] = least(lambda number: static(one, drawn[:1], one), rounds)
    result["static"]["parameters"] = least(parameters, rounds)
    result["grouped"]["computing"] = least(lambda number: grouped(whole, ids, epoch(number), whole), rounds)
    result["static"]["computing"] = least(lambda number: static(whole, drawn, whole), rounds)
    return result


def counted(run: Callable[[], object]) -> dict[str, Any]:
    with Operators() as operators:
        run()
    return dict(operators.counts)


def least(run: Callable[[int], object], rounds: int) -> float:
    """CPU milliseconds of one call; it is given the number of the round."""
    milliseconds = []
    for number in range(rounds + 1):
        began = time.thread_time()
        run(number)
        milliseconds.append((time.thread_time() - began) * 1e3)
    return round(min(milliseconds[1:]), 3)


def show(row: dict[str, Any]) -> None:
    for form in ("grouped", "static"):
        print(
            f"{row['op_set']:10s} {form:8s}",
            "  ".join(f"{name} {value}" for name, value in row[form].items()),
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
