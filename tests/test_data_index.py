"""Building, resuming, opening and relocating an index; and what it costs in memory."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from benchmarks.index_scale import measure
from mpl_scale.cli import main
from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images
from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.descriptors import Descriptors
from mpl_scale.data.index.format import FORMATS
from mpl_scale.data.index.progress import IndexProgress
from mpl_scale.data.index.reader import IndexedImages, StaleIndex, verify
from tests.support import mini_imagenet as mini


def content(folder: Path) -> dict[str, bytes]:
    """All files of an index."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["webdataset", "cifar10 python"])
def test_an_index_does_not_depend_on_the_workers(tmp_path: Path, kind: str) -> None:
    source, write = mini.WRITERS[kind]
    write(tmp_path / "data")
    for workers in (1, 3):
        build_index(source, tmp_path / "data", output=tmp_path / f"{workers}", workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "3")
    verify(tmp_path / "3")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["1", "3", "data"]


def test_a_stopped_build_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mini.write_cifar_python(tmp_path / "data")
    build_index("cifar10", tmp_path / "data", output=tmp_path / "whole")
    scanned: list[str] = []
    original = type(FORMATS["cifar10"]).scan

    def counted(self: object, root: Path, shard: object, **options: object) -> object:
        scanned.append(shard.name)
        if len(scanned) == 4:
            raise KeyboardInterrupt
        return original(self, root, shard, **options)

    monkeypatch.setattr(type(FORMATS["cifar10"]), "scan", counted)
    with pytest.raises(KeyboardInterrupt):
        build_index("cifar10", tmp_path / "data", output=tmp_path / "index")
    assert not (tmp_path / "index").exists()
    os.utime(tmp_path / "data" / "data_batch_2", ns=(1, 1))  # changed since: read again
    built = build_index("cifar10", tmp_path / "data", output=tmp_path / "index")
    assert scanned[4:] == ["data_batch_2", "data_batch_4", "data_batch_5", "test_batch"]
    assert built.reused == 2
    whole, resumed = content(tmp_path / "whole"), content(tmp_path / "index")
    assert {name for name in whole if whole[name] != resumed[name]} == {"meta.json"}  # the time of batch 2
    assert not (tmp_path / "index.partial").exists()


def test_a_killed_worker_is_one_clear_error(tmp_path: Path) -> None:
    mini.write_webdataset(tmp_path / "data", shards=48)
    others = multiprocessing.active_children()  # the rank pools of other tests

    def kill_workers(done: int, total: int, images: int) -> None:
        for child in set(multiprocessing.active_children()) - set(others):
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(ValueError, match=r"--workers was killed .*run the same command again"):
        build_index("webdataset", tmp_path / "data", output=tmp_path / "index", workers=2, report=kill_workers)
    built = build_index("webdataset", tmp_path / "data", output=tmp_path / "index")
    assert 1 <= built.reused < 48


@pytest.mark.parametrize("change", ["longer", "touched", "gone"])
def test_a_changed_shard_is_named_with_the_command(tmp_path: Path, change: str) -> None:
    mini.write_webdataset(tmp_path / "data")
    build_index("webdataset", tmp_path / "data", output=tmp_path / "index")
    shard = tmp_path / "data" / "train-000002.tar"
    if change == "longer":
        times = (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
        shard.write_bytes(shard.read_bytes() + bytes(512))
        os.utime(shard, ns=times)
    elif change == "touched":
        os.utime(shard, ns=(1, 1))
    else:
        shard.unlink()
    config = DataConfig(source="webdataset", index=str(tmp_path / "index"))
    with pytest.raises(StaleIndex) as caught:
        load_images(config)
    assert f"shard '{shard}'" in str(caught.value)
    command = f"mpl-scale index '{tmp_path}/data' --source webdataset --output '{tmp_path}/index'"
    assert command in str(caught.value)
    assert main(["index", f"{tmp_path}/data", "--source", "webdataset", "--output", f"{tmp_path}/index"]) == 0
    assert len(load_images(config)) == (32 if change == "gone" else 48)


def test_a_folder_that_got_another_file_is_stale(tmp_path: Path) -> None:
    mini.write_folder(tmp_path / "data")
    build_index("folder", tmp_path / "data", output=tmp_path / "index")
    (tmp_path / "data" / "class3" / "999.png").write_bytes(mini.files()[0])
    with pytest.raises(StaleIndex, match="class3' has changed"):
        IndexedImages(tmp_path / "index")


def test_data_may_move(tmp_path: Path) -> None:
    mini.write_tfrecord(tmp_path / "data")
    build_index("tfrecord", tmp_path / "data", output=tmp_path / "index")
    (tmp_path / "data").rename(tmp_path / "moved")
    config = DataConfig(source="tfrecord", index=str(tmp_path / "index"))
    with pytest.raises(StaleIndex, match=r"set mpl_scale\.data\.root to where the shards are"):
        load_images(config)
    moved = load_images(config.model_copy(update={"root": str(tmp_path / "moved")}))
    assert moved.read(7).tobytes() == mini.files()[7]
    with pytest.raises(ValueError, match=r"built from source tfrecord, not mpl_scale\.data\.source = 'folder'"):
        load_images(config.model_copy(update={"source": "folder", "root": str(tmp_path / "moved")}))


def test_a_sample_that_changed_behind_the_index_is_unreadable(tmp_path: Path) -> None:
    mini.write_folder(tmp_path / "data")
    build_index("folder", tmp_path / "data", output=tmp_path / "index")
    images = IndexedImages(tmp_path / "index")
    path = Path(images.name(5))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnreadableImage, match="were indexed: the file has changed"):
        images.read(5)
    path.unlink()
    with pytest.raises(UnreadableImage, match="cannot be read: No such file"):
        images.read(5)
    assert images.read(6).tobytes() == Path(images.name(6)).read_bytes()


def _spoil_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text()) | changes
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no meta": (lambda f: (f / "meta.json").unlink(), "is no index"),
    "not JSON": (lambda f: (f / "meta.json").write_text("{"), "is no index"),
    "version": (lambda f: _spoil_meta(f, version=99), "version 99, not mpl_scale.index 2"),
    "array cut": (
        lambda f: (f / "label.npy").write_bytes((f / "label.npy").read_bytes()[:-8]),
        "label.npy' is damaged",
    ),
    "array of another length": (lambda f: np.save(f / "size.npy", np.zeros((3, 2), "<i4")), "size.npy' is damaged"),
    "pickled array": (
        lambda f: np.save(f / "shard.npy", np.array([{}] * 48, object), allow_pickle=True),
        "shard.npy' is damaged",
    ),
    "path outside": (lambda f: _spoil_meta(f, shards=[["../../etc", "train", 0, 0, False]]), "leaves its folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_index_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    spoil, message = DAMAGE[kind]
    mini.write_tfrecord(tmp_path / "data")
    build_index("tfrecord", tmp_path / "data", output=tmp_path / "index")
    spoil(tmp_path / "index")
    with pytest.raises(ValueError, match=re.escape(message)):
        IndexedImages(tmp_path / "index")


def test_verify_finds_a_flipped_bit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mini.write_tfrecord(tmp_path / "data")
    build_index("tfrecord", tmp_path / "data", output=tmp_path / "data.index")
    command = ["index", str(tmp_path / "data"), "--source", "tfrecord", "--verify"]
    assert main(command) == 0
    array = tmp_path / "data.index" / "offset.npy"
    spoiled = bytearray(array.read_bytes())
    spoiled[-1] ^= 1
    array.write_bytes(spoiled)
    assert main(command) == 2
    assert "offset.npy' is damaged; rebuild it: mpl-scale index" in capfd.readouterr().err


def test_the_command_builds_lists_and_skips(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mini.write_webdataset(tmp_path / "data")
    bad = mini.tar_of([("1.png", b"GIF"), ("1.cls", b"0"), ("2.png", mini.files()[2][:-200]), ("2.cls", b"1")])
    (tmp_path / "data" / "train-000003.tar").write_bytes(bad)
    command = ["index", str(tmp_path / "data"), "--source", "webdataset", "--workers", "2"]
    assert main(command) == 0
    captured = capfd.readouterr()
    output = tmp_path / "data.index"
    assert "50 images of 4 shards in" in captured.out
    assert "2 refused, listed in" in captured.out
    assert "1  neither a PNG nor a JPEG file" in captured.out
    assert "[index 4/4 shards] 50 images" in captured.err.splitlines()[-1]
    lines = [json.loads(line) for line in (output / "refused.jsonl").read_text().splitlines()]
    assert [(line["file"], line["sample"], line["offset"]) for line in lines] == [
        ("train-000003.tar", 48, 512),
        ("train-000003.tar", 49, 2560),
    ]
    assert main(command) == 0
    assert "is up to date; --force builds it again" in capfd.readouterr().out
    assert main([*command, "--output", str(tmp_path / "data")]) == 2
    assert "is there and is no index" in capfd.readouterr().err
    assert main(["index", str(tmp_path / "data"), "--source", "webdatset"]) == 2
    assert "--source = 'webdatset' is unknown; did you mean webdataset?" in capfd.readouterr().err


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe, now = Terminal(), io.StringIO(), [0.0]
    for stream in (terminal, pipe):
        now[0] = 0.0
        progress = IndexProgress(stream, clock=lambda: now[0])
        for done in range(1, 101):
            now[0] += 0.125  # exact in binary
            progress(done, 100, 10 * done)
        progress.close()
    assert "100/100" in terminal.getvalue()
    assert [line.split()[1] for line in pipe.getvalue().splitlines()] == ["1/100", "41/100", "81/100", "100/100"]


def _open_cached(root: str, cache: str, start: object, results: object) -> None:
    os.environ["MPL_SCALE_DATA"] = cache
    start.wait()
    images = load_images(DataConfig(source="cifar10", root=root))
    results.put((len(images), (images.folder / "meta.json").stat().st_mtime_ns))


def test_ranks_that_start_at_once_build_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))
    mini.write_cifar_python(tmp_path / "data")
    context = multiprocessing.get_context("forkserver")
    start, results = context.Barrier(3), context.Queue()
    ranks = [
        context.Process(target=_open_cached, args=(str(tmp_path / "data"), str(tmp_path / "cache"), start, results))
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert found == [found[0]] * 3
    assert found[0][0] == 48
    assert len(list((tmp_path / "cache").glob("*.index"))) == 1
    os.utime(tmp_path / "data" / "test_batch", ns=(1, 1))  # a cache heals itself
    assert len(load_images(DataConfig(source="cifar10", root=str(tmp_path / "data")))) == 48


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "file" / "cache"))
    mini.write_tfrecord(tmp_path / "data")
    with pytest.raises(ValueError, match="set MPL_SCALE_DATA to a folder with room"):
        load_images(DataConfig(source="tfrecord", root=str(tmp_path / "data")))


def test_reading_from_threads_while_descriptors_fall_out_of_the_cache(tmp_path: Path) -> None:
    paths = []
    for number in range(8):
        path = tmp_path / f"{number}"
        path.write_bytes(bytes([number]) * 1000)
        paths.append(str(path))
    cache, wrong = Descriptors(most=2), []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 8, 2000).tolist():
            if cache.read(paths[number], offset=10, length=100) != bytes([number]) * 100:
                wrong.append(number)

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_large_index_holds_no_object_per_sample(tmp_path: Path) -> None:
    measure(
        tmp_path / "small" / "index", samples=20_000, steps=50, batch=4096
    )  # numpy's buffers and code are in memory
    found = measure(tmp_path / "large" / "index", samples=200_000, steps=50, batch=4096)
    # The least Python object takes 28 bytes and a reference of 8. What is mapped is the system's to drop. The parts of
    # the split are int64 ids, 8 bytes; the allocator may keep as much again of what passed through.
    assert found["open_private_bytes"] + found["draw_private_bytes"] < 200_000 * 8
    assert found["split_private_bytes"] < 200_000 * 24
    assert found["unlabelled"] > 0.87 * 200_000


def test_the_built_index_survives_the_removal_of_what_it_replaced(tmp_path: Path) -> None:
    """A run that has an index open keeps reading it while another one replaces it."""
    mini.write_cifar_python(tmp_path / "data")
    build_index("cifar10", tmp_path / "data", output=tmp_path / "index")
    images = IndexedImages(tmp_path / "index")
    first = images.read(0).tobytes()
    build_index("cifar10", tmp_path / "data", output=tmp_path / "index")
    assert images.labels.tolist() == mini.pictures()[1].tolist()
    assert images.read(0).tobytes() == first
    shutil.rmtree(tmp_path / "data")


def _build_slowly(root: Path, output: Path, reached: Connection) -> None:
    def report(done: int, total: int, images: int) -> None:
        reached.send(done)
        if done == 3:
            time.sleep(600)

    build_index("webdataset", root, output=output, report=report)


def test_a_build_that_is_killed_leaves_no_index_and_no_lock(tmp_path: Path) -> None:
    mini.write_webdataset(tmp_path / "data", shards=24)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_build_slowly, args=(tmp_path / "data", tmp_path / "index", theirs))
    process.start()
    while ours.recv() < 3:
        pass
    process.kill()
    process.join()
    assert not (tmp_path / "index").exists()
    built = build_index("webdataset", tmp_path / "data", output=tmp_path / "index")  # waits for no lock of the dead
    assert built.reused == 3
    assert built.images == 48
