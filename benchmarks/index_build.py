"""Indexing a large list of images: rows a second, processor time of a row, and whether memory grows with the rows.

    python -m benchmarks.index_build --rows 1000000 --sources parquet --output benchmarks/results/cpu/index_build.json

The images are random ones of 8 x 8 pixels, half PNG, half JPEG. `parquet`: shards as Hugging Face's `datasets` writes
them; `table.csv`, `table.parquet`: lists of files, in 100 folders, of which most are hard links to others. Each is
indexed with a tenth of the rows and with all of them, by a process of its own that calls build_index: with one worker,
where processor time is that of the whole build, and with more. A row in which other programs were busy shows it by
`seconds` above its processor time. `private_bytes`: the most that the process held of its own at any time (RssAnon,
sampled), less what it held before; `peak_rss_bytes` also counts its imports, and mapped pages of files, which the
system may drop.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from PIL import Image
from pyarrow import parquet

from benchmarks.report import provenance, write
from mpl_scale.data.index.build import build_index

SIDE, CLASSES, DISTINCT = 8, 100, 1000
SHARD_ROWS, LINKS = 50_000, 10_000
SECONDS = 0.01
"""Between two looks at the memory."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sources", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where the data are written; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="the result, JSON; default: it is printed")
    parser.add_argument("--measure", nargs=2, metavar=("SOURCE", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        source, workers = options.measure
        print(json.dumps(measure(source, options.folder, workers=int(workers))))
        return 0
    document: dict[str, Any] = {"kind": "index_build", **provenance("benchmarks.index_build", torch.device("cpu"))}
    document["builds"] = []
    for rows in (options.rows // 10, options.rows):
        with tempfile.TemporaryDirectory(prefix="index_build", dir=options.folder) as folder:
            for source in options.sources:
                root = Path(folder) / source.partition(".")[0]
                WRITERS[source](root, rows)
                for workers in options.workers:
                    document["builds"].append(_in_a_process(source, root, workers))
                    if options.output is not None:
                        write(options.output, document)
    if options.output is None:
        print(json.dumps(document))
    return 0


def _in_a_process(source: str, root: Path, workers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.index_build", "--folder", str(root)]
    found = subprocess.run([*command, "--measure", source, str(workers)], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def measure(source: str, root: Path, *, workers: int) -> dict[str, Any]:
    """Index the data below `root`; what it took."""
    with _peak() as peak:
        start, busy = time.perf_counter(), time.process_time()
        output = root.with_name(f"{source}.{workers}.index")
        built = build_index(source.partition(".")[0], root, output=output, workers=workers)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    assert not built.refused
    return {
        "source": source,
        "rows": built.images,
        "shards": built.shards,
        "workers": workers,
        "seconds": round(seconds, 3),
        "rows_per_second": round(built.images / seconds),
        "processor_us_per_row": round(busy / built.images * 1e6, 3) if workers == 1 else None,
        "private_bytes": peak(),
        "peak_rss_bytes": _memory("VmHWM"),
        "index_bytes": sum(path.stat().st_size for path in output.rglob("*") if path.parent.name != "pixels"),
    }


@contextmanager
def _peak() -> Iterator[Callable[[], int]]:
    """What the process holds of its own at most within the context, less what it held before; bytes."""
    before, ended = _memory("RssAnon"), threading.Event()
    most = [before]

    def look() -> None:
        while not ended.wait(SECONDS):
            most[0] = max(most[0], _memory("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: most[0] - before
    finally:
        ended.set()
        thread.join()


def _memory(name: str) -> int:
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def pictures() -> list[bytes]:
    """Encoded images, each another one."""
    drawn, files = np.random.default_rng(0), []
    for number in range(DISTINCT):
        file = io.BytesIO()
        image = Image.fromarray(drawn.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        image.save(file, "PNG" if number % 2 else "JPEG")
        files.append(file.getvalue())
    return files


def write_parquet(root: Path, rows: int) -> None:
    """Shards of images and labels; the images are not a dictionary, as those of a real data set are not."""
    root.mkdir(parents=True)
    pool, drawn = pyarrow.array(pictures(), pyarrow.binary()), np.random.default_rng(1)
    shards = max(2, rows // SHARD_ROWS)
    for shard in range(shards):
        count = (shard + 1) * rows // shards - shard * rows // shards
        content = pool.take(pyarrow.array(drawn.integers(0, DISTINCT, count)))
        images = pyarrow.StructArray.from_arrays([content, pyarrow.nulls(count, pyarrow.string())], ["bytes", "path"])
        table = pyarrow.table({"image": images, "label": drawn.integers(0, CLASSES, count)})
        name = f"train-{shard:05d}-of-{shards:05d}.parquet"
        parquet.write_table(table, root / name, row_group_size=100_000, use_dictionary=["label"])


def write_files(root: Path, rows: int) -> Iterator[tuple[str, str]]:
    """The path and the label of each row, whose files are then there: made once."""
    files, path, new = pictures(), Path(), not root.exists()
    for folder in range(CLASSES):
        (root / f"{folder:02d}").mkdir(parents=True, exist_ok=True)
    for row in range(rows):
        name = f"{row % CLASSES:02d}/image_{row:09d}"
        if new and row % LINKS == 0:
            path = root / name
            path.write_bytes(files[row // LINKS % DISTINCT])
        elif new:
            os.link(path, root / name)
        yield name, f"class {row % CLASSES}"


def write_csv_table(root: Path, rows: int) -> None:
    """A table.csv, and its files."""
    listed = list(write_files(root, rows))
    (root / "table.parquet").unlink(missing_ok=True)
    with open(root / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *listed])


def write_parquet_table(root: Path, rows: int) -> None:
    """A table.parquet, and its files."""
    paths, labels = zip(*write_files(root, rows), strict=True)
    (root / "table.csv").unlink(missing_ok=True)
    parquet.write_table(pyarrow.table({"path": paths, "label": labels}), root / "table.parquet")


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "parquet": write_parquet,
    "table.csv": write_csv_table,
    "table.parquet": write_parquet_table,
}


if __name__ == "__main__":
    sys.exit(main())
