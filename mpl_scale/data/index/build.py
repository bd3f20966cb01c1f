"""Build an index: scan every shard, in parallel, then lay the results behind one another and publish by one rename.

Each scanned shard leaves a part in `OUTPUT.partial/`; a build that was stopped takes up the parts of shards that have
not changed since. One build at a time per output: others wait, and find it done.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpl_scale.config.names import require_known
from mpl_scale.data.index import sidecars
from mpl_scale.data.index.contents import digest_of_file, digest_of_folder
from mpl_scale.data.index.format import ENTRY, FORMATS, LOST_WHOLE, Refusal, Scan, ScanOptions, Shard, shards_of
from mpl_scale.data.index.labels import count_from_zero, first_label, refuse_unused
from mpl_scale.data.index.reader import VERSION, IndexedImages, StaleIndex, read_meta
from mpl_scale.data.index.writer import Identity, PartFiles, write_index
from mpl_scale.files import FULL, expanded, lock, refuse_inside
from mpl_scale.workers import deaf_to_interrupts, end_with_parent

Report = Callable[[int, int, int], None]
"""Called after each shard: shards done, shards in all, images found so far."""


@dataclass(frozen=True)
class Built:
    """The result of a build."""

    folder: Path
    images: int
    shards: int
    reused: int  # shards that an earlier, stopped build had scanned
    refused: int
    reasons: Counter[str]  # refusals by kind of reason


def build_index(
    source: str,
    root: Path,
    *,
    output: Path,
    workers: int = 1,
    options: ScanOptions | None = None,
    report: Report = lambda done, total, images: None,
) -> Built:
    """Index the data set of format `source` below `root` into the folder `output`, replacing an older index there.

    Args:
        source: a registered format.
        root: the data set.
        output: the index; its parent folder is made.
        workers: processes.
        options: settings of the scan.
        report: progress.

    Raises:
        ValueError: unknown format, no shards, nothing usable in them, an option without effect, or `output` is
            something else than an index, or lies in the data set.
    """
    require_known("--source", source, FORMATS)
    options = options or ScanOptions()
    refuse_unused(source, label_offset=options.label_offset, check_data=None if options.check_data else False)
    root, output = expanded(root).resolve(), expanded(output).absolute()
    if not root.is_dir():
        raise ValueError(f"'{root}' is no folder; give the one that holds the data set")
    if output.exists() and not (output / "meta.json").is_file():
        raise ValueError(f"--output '{output}' is there and is no index; choose another folder, or remove it")
    shards = shards_of(source, root, options)
    if FORMATS[source].layout in ("file", "encoded"):  # others look for the names of their files alone
        refuse_inside(output, root)
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock(output.with_name(f".{output.name}.lock")):
        partial = output.with_name(f"{output.name}.partial")
        # Before the scan: a change while it is read makes the index stale.
        beside = sidecars.record(root, FORMATS[source].sidecars(root))
        identity = {"source": source, "root": str(root), "options": options.to_json(), "sidecars": beside}
        _prepare(partial, identity)
        reused = _scan_all(source, root, shards, partial, workers=workers, options=options, report=report)
        images, refused, reasons = write_index(output, partial=partial, shards=shards, identity=identity)
        shutil.rmtree(partial)
    return Built(output, images, len(shards), reused, refused, reasons)


def open_or_build(
    source: str, root: Path, *, output: Path, workers: int, options: ScanOptions, report: Report
) -> IndexedImages:
    """The index at `output`, built first where there is none or the data set has changed. One process builds.

    Raises:
        ValueError: as build_index.
    """
    try:
        return IndexedImages(output)
    except ValueError:
        pass  # none, or stale; told below, once
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock(output.with_name(f".{output.name}.open.lock")):
        try:
            return IndexedImages(output)  # another process was faster
        except StaleIndex as error:
            print(f"[index] {error.reason}: indexing again", file=sys.stderr, flush=True)
        except ValueError:
            pass
        build_index(source, root, output=output, workers=workers, options=options, report=report)
    try:
        return IndexedImages(output)
    except StaleIndex as error:
        raise ValueError(f"{error}; or it is being written to right now") from error


class _Task(NamedTuple):
    source: str
    root: Path
    number: int
    shard: Shard
    partial: Path
    options: ScanOptions


def _prepare(partial: Path, identity: dict[str, Any]) -> None:
    """An empty folder for the parts, or the one that a stopped build of the same index left."""
    plan = partial / "plan.json"
    try:
        same = json.loads(plan.read_text(encoding="utf-8")) == identity
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        plan.write_text(json.dumps(identity), encoding="utf-8")


def _scan_all(
    source: str,
    root: Path,
    shards: Sequence[Shard],
    partial: Path,
    *,
    workers: int,
    options: ScanOptions,
    report: Report,
) -> int:
    """Leave a part for every shard; returns how many were there already."""
    tasks = [_Task(source, root, number, shard, partial, options) for number, shard in enumerate(shards)]
    done, images = 0, 0
    missing = []
    for task in tasks:
        found = PartFiles(partial, task.number).images_of(task.shard, *_identity(root, task.shard))
        if found is None:
            missing.append(task)
        else:
            done, images = done + 1, images + found
    reused = done
    if reused:
        report(done, len(tasks), images)
    for found in _scanned(missing, workers):
        done, images = done + 1, images + found
        report(done, len(tasks), images)
    return reused


def _scanned(tasks: Sequence[_Task], workers: int) -> Iterator[int]:
    """The images of each shard, as its scan ends."""
    if workers == 1 or len(tasks) < 2:
        yield from map(_scan, tasks)
        return
    # A fork of this process may inherit a lock that one of DALI's threads holds, and hang: that was seen. So a server
    # is started that runs nothing, imports this module once (torch and DALI come with it), and is forked per worker.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=end_with_parent)
    ended = False
    try:
        with deaf_to_interrupts():
            futures = [pool.submit(_scan, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
        ended = True
    except BrokenProcessPool as error:
        raise ValueError(
            "a process of --workers was killed (out of memory?); run the same command again, with fewer: shards that "
            "are done are not read again"
        ) from error
    finally:
        for process in [] if ended else list((pool._processes or {}).values()):
            process.terminate()  # a shard can take minutes; an unfinished one is scanned again next time
        pool.shutdown(cancel_futures=True)


def _scan(task: _Task) -> int:
    """Scan one shard and leave its part; returns its images."""
    part = PartFiles(task.partial, task.number)
    size, mtime_ns = _identity(task.root, task.shard)  # before: a change while it is read makes the index stale
    try:
        scan = FORMATS[task.source].scan(task.root, task.shard, options=task.options, unpacked=part.pixels)
    except OSError as error:
        if error.errno in FULL:  # not the shard's fault: what is unpacked of it has no room
            error.filename = error.filename or str(part.pixels)
            raise
        reason = f"{LOST_WHOLE}: cannot be read: {error.strerror}"
        scan = Scan(np.zeros(0, ENTRY), [Refusal(task.shard.name, None, reason)])
    if task.options.labels:
        first, classes = first_label(task.source, task.options), FORMATS[task.source].classes(task.root)
        labels = count_from_zero(scan, task.shard, first=first, classes=classes)
    else:
        scan.entries["label"], scan.class_names, labels = 0, {}, None
    identity = Identity(size, mtime_ns, _digest(task.root / task.shard.name, scan))
    part.write(scan, task.shard, identity, labels=labels)
    return len(scan.entries)


def _digest(path: Path, scan: Scan) -> str | None:
    """Tells the shard's content; None where it cannot be read."""
    try:
        if not path.is_dir():
            return digest_of_file(path)
        bounds = [0, *scan.name_ends.tolist()]
        return digest_of_folder(str(path), [scan.names[a:b] for a, b in itertools.pairwise(bounds)])
    except OSError:
        return None


def _identity(root: Path, shard: Shard) -> tuple[int, int]:
    """Bytes and modification time of a shard."""
    try:
        status = (root / shard.name).stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def why_not_current(folder: Path, *, source: str, root: Path, options: ScanOptions) -> str | None:
    """Why an index has to be built: "" where there is none; None: the folder holds an up-to-date one of just that."""
    if not (folder / "meta.json").is_file():
        return ""
    try:
        meta = read_meta(folder)
        found = IndexedImages(folder)
    except StaleIndex as error:
        return error.reason
    except ValueError as error:
        return str(error)
    for name, asked in {"source": source, "root": str(root), "options": options.to_json()}.items():
        if meta[name] != asked:
            return f"it was built with {name} {meta[name]}, not {asked}"
    if meta["version"] != VERSION:
        return f"it is of version {meta['version']}, which does not check labels"
    indexed = {shard.name: shard.part for shard in found.shards}
    now = {shard.name: shard.part for shard in shards_of(source, root, options)}
    for name in sorted(indexed.keys() | now.keys()):
        if name not in now:
            return f"shard '{name}' is no longer read"
        if name not in indexed:
            return f"shard '{name}' is new"
        if indexed[name] != now[name]:
            return f"shard '{name}' was taken for part {indexed[name]}, not {now[name]}"
    return None
