"""An index of ten million samples: what opening it and drawing from it costs in memory and time.

    python -m benchmarks.index_scale --samples 10000000

The arrays of an index are written directly (no images), then opened and split as a run does it (ImageNet-10% of 1,024
shards), and SamplePlan draws batches of the unlabelled part. Prints one JSON object; bytes are of this process, from
/proc/self/smaps_rollup: `private` counts what it alone holds, `mapped` the pages of the index that it has touched,
which the ranks of a node share and the system may drop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.index.reader import ARRAYS, IndexedImages
from mpl_scale.data.samples.plan import SamplePlan
from mpl_scale.data.samples.splits import make_splits
from mpl_scale.data.samples.streams import Purpose, stream_of
from tests.support.image_sets import describe_index

SHARDS = 1024
IMAGE_BYTES = 110_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=4096, help="samples drawn per step")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="where the index is written; default: a temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="index_scale", dir=options.folder))
    try:
        found = measure(folder / "index", samples=options.samples, steps=options.steps, batch=options.batch)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"command": " ".join(["python -m benchmarks.index_scale", *sys.argv[1:]]), **_about(), **found}))
    return 0


def measure(folder: Path, *, samples: int, steps: int, batch: int) -> dict[str, Any]:
    """Write an index of `samples` samples below `folder`'s parent, open it, draw `steps` batches; what it took."""
    write(folder, samples=samples)
    before = memory()
    start = time.perf_counter()
    images = IndexedImages(folder)
    opened = time.perf_counter() - start
    at_open = memory()
    start = time.perf_counter()
    config = DataConfig(split="imagenet_10", evaluate_on="held_out")
    splits = make_splits(images, config=config, seed=0)
    splitting = time.perf_counter() - start
    at_split = memory()
    plan = SamplePlan(
        splits.unlabelled,
        batch=batch,
        rows=np.arange(batch, dtype=np.int64),
        columns=3,
        seed=0,
        order_stream=stream_of(Purpose.UNLABELLED_ORDER),
        view_stream=stream_of(Purpose.UNLABELLED_VIEW),
    )
    start = time.perf_counter()
    checksum = 0
    for step in range(steps):
        drawn = plan.draw(step).ids
        checksum += int(images.labels[drawn].sum()) + int(images.sizes[drawn].sum())
    drawing = time.perf_counter() - start
    start = time.perf_counter()
    places = [images.name(int(sample)) for sample in drawn]
    placing = time.perf_counter() - start
    after = memory()
    assert len(places) == batch
    return {
        "samples": samples,
        "bytes_on_disk_per_sample": sum(path.stat().st_size for path in folder.glob("*.npy")) / samples,
        "open_seconds": round(opened, 4),
        "open_private_bytes": at_open["private"] - before["private"],
        "split_seconds": round(splitting, 4),
        "split_private_bytes": at_split["private"] - at_open["private"],
        "unlabelled": len(splits.unlabelled),
        "batch": batch,
        "steps": steps,
        "draws_per_second": round(steps * batch / drawing),
        "places_per_second": round(batch / placing),
        "private_bytes_before": before["private"],
        "draw_private_bytes": after["private"] - at_split["private"],
        "mapped_bytes_grown": after["mapped"] - before["mapped"],
        "rss_bytes": after["rss"],
        "checksum": checksum,
    }


def write(folder: Path, *, samples: int) -> None:
    """An index of `samples` images in empty shards, a piece at a time."""
    shards = [(f"train-{shard:05d}-of-{SHARDS:05d}", "train") for shard in range(SHARDS)]
    describe_index(folder, shards, classes=[f"class {label}" for label in range(1000)], count=samples)
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(samples, 2) if name == "size" else (samples,)
        )
        for name, dtype in ARRAYS.items()
    }
    for start in range(0, samples, 1 << 20):
        ids = np.arange(start, min(samples, start + (1 << 20)), dtype=np.int64)
        rows = slice(int(ids[0]), int(ids[-1]) + 1)
        arrays["shard"][rows] = ids * SHARDS // samples
        arrays["offset"][rows] = ids % (samples // SHARDS + 1) * IMAGE_BYTES
        arrays["length"][rows] = IMAGE_BYTES
        arrays["label"][rows] = ids % 1000
        arrays["size"][rows] = np.stack([300 + ids % 300, 300 + ids % 200], axis=1)
    for array in arrays.values():
        array.flush()
    np.save(folder / "refused.npy", np.zeros(0, np.int64))


def memory() -> dict[str, int]:
    """Bytes of this process: resident, private (its own), and of mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    rss, private = kilobytes["Rss"], kilobytes["Anonymous"]
    return {"rss": rss * 1024, "private": private * 1024, "mapped": (rss - private) * 1024}


def _about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip(),
        "machine": f"{models[0].partition(':')[2].strip() if models else platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


if __name__ == "__main__":
    sys.exit(main())
