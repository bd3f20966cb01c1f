"""Full disks, retries, writing while training continues, what is kept: no good checkpoint is lost, and none invented.

A disk is full by RLIMIT_FSIZE, which needs no privileges, and for real, on a small tmpfs, where root may mount one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_scale.checkpoint import (
    BackgroundSave,
    CheckpointError,
    DamagedCheckpoint,
    WriteFailed,
    background,
    find,
    read_prefix,
    save,
)
from mpl_scale.checkpoint.format import read_index
from mpl_scale.config import load_config
from mpl_scale.config.schema import CheckpointConfig
from mpl_scale.trainer import snapshots
from mpl_scale.trainer.prepare import Options, train
from tests.support.checkpoints import build, check_load, load_newest_here, save_step
from tests.support.configs import tiny, write
from tests.support.faults import check_documented, no_file_above
from tests.support.ranks import pool
from tests.support.runs import StopAfter, final_state

METADATA = {"step": 0, "baseline": 0.1 + 0.2}


def start(root: str, step: int, timeout_seconds: float = 60.0) -> BackgroundSave:
    """Begin a save of `step`, then change every value: what is written must be the copy."""
    mesh, network, entries = build()
    network.fill(step)
    settings, metadata = CheckpointConfig(timeout_seconds=timeout_seconds), {**METADATA, "step": step}
    saving = BackgroundSave(Path(root), settings, step=step, entries=entries, metadata=metadata, mesh=mesh)
    network.fill(999)
    return saving


def save_in_background(root: str, step: int) -> str:
    return str(start(root, step).finish())


def save_in_background_failing(root: str, limit: int) -> str:
    """Rank 1's disk is full."""
    mesh, _, _ = build()
    with no_file_above(limit if mesh.rank == 1 else resource.RLIM_INFINITY):
        saving = start(root, 20)
        try:
            saving.finish()
        except WriteFailed as error:
            return str(error)
    return ""


def save_in_background_without_rank_1(root: str) -> str:
    """Rank 1's thread hangs until rank 0 has given up."""
    mesh, _, _ = build()
    write_shard, released = background.write_shard, threading.Event()

    def hang(*args: Any) -> Any:
        released.wait(30)
        return write_shard(*args)

    background.write_shard = hang if mesh.rank == 1 else write_shard
    try:
        saving = start(root, 20, timeout_seconds=0.3)
        if mesh.rank == 0:
            saving._thread.join()
        torch.distributed.barrier()
        released.set()
        saving.finish()
    except WriteFailed as error:
        return str(error)
    finally:
        background.write_shard = write_shard
    return ""


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_copy_is_written_while_values_change(tmp_path: Path, world: int) -> None:
    path = pool(world).run(save_in_background, str(tmp_path), 7)[0]
    assert sorted(p.name for p in Path(path).iterdir()) == [
        "index.json",
        *(f"rank_{rank:05d}.safetensors" for rank in range(world)),
    ]
    pool(2).run(check_load, path, 7)


@pytest.mark.parametrize("limit", [100, 600])
def test_a_full_disk_in_the_background_publishes_nothing(tmp_path: Path, limit: int) -> None:
    pool(2).run(save_step, str(tmp_path), 10)
    messages = pool(2).run(save_in_background_failing, str(tmp_path), limit)
    assert messages[0] == messages[1]
    reason = f"cannot write a checkpoint to {tmp_path}: "
    if limit == 100:  # not even the reason has room
        assert messages[0].startswith(f"{reason}rank 1 has no room for its file")
    else:
        assert messages[0].startswith(f"rank 1: {reason}")
    assert [folder.name for folder in find(tmp_path)] == ["step_00000010"]
    assert pool(2).run(load_newest_here, str(tmp_path))[0][1] == 10
    pool(2).run(save_in_background, str(tmp_path), 30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010", "step_00000030"]


def test_a_rank_that_does_not_write_in_time_publishes_nothing(tmp_path: Path) -> None:
    messages = pool(2).run(save_in_background_without_rank_1, str(tmp_path))
    assert messages[0] == messages[1]
    assert "rank 1 has not written its file within mpl_scale.checkpoint.timeout_seconds = 0.3" in messages[0]
    assert find(tmp_path) == []
    assert pool(2).run(load_newest_here, str(tmp_path))[0] == (None, None, [])


def test_keeps_every_so_many_steps_for_good(tmp_path: Path) -> None:
    mesh, _, entries = build()
    for step in range(2, 17, 2):
        save(tmp_path, step=step, entries=entries, metadata={}, mesh=mesh, keep=2, keep_every=6)
    assert [int(folder.name[5:]) for folder in find(tmp_path)] == [16, 14, 12, 6]
    raw = tiny()
    raw["mpl_scale"]["checkpoint"] = {"every": 4, "keep_every": 6}
    with pytest.raises(ValueError, match="keep_every = 6 is no multiple of every = 4"):
        load_config(write(tmp_path, raw))


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alter an index and give it a checksum that fits."""
    path = folder / "index.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    checksum = f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
    path.write_text(json.dumps({**content, "checksum": checksum}))


def _rename(name: str) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        text = json.dumps(content).replace("rank_00000.safetensors", name)
        content.update(json.loads(text))
        content["files"] = {name: next(iter(content["files"].values()))}

    return change


def _first_entry(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["entries"]["student/master/0.weight"].update(fields)


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "parent": _rename("../elsewhere/rank_00000.safetensors"),
    "absolute": _rename("/etc/passwd"),
    "other_name": _rename("weights.pt"),
    "unlisted_file": lambda content: content["files"].clear(),
    "dtype": _first_entry(dtype="load"),
    "overlap": _first_entry(pieces=[{"file": "rank_00000.safetensors", "start": 0, "length": 40}]),
    "negative": _first_entry(shape=[-5, -7]),
    "no_table": lambda content: content.pop("entries"),
    "wrong_type": lambda content: content.update(files=3),
}


@pytest.mark.parametrize("kind", FORGED)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, kind: str) -> None:
    folder = Path(save_step(str(tmp_path / "run"), 7))
    shutil.copytree(folder, tmp_path / "run" / "elsewhere")
    forge(folder, FORGED[kind])
    for read in (read_index, lambda path: check_load(str(path), 7), lambda path: read_prefix(path, "student/master")):
        with pytest.raises(DamagedCheckpoint, match=r"index\.json is not one"):
            read(folder)


def run_config(tmp_path: Path, **checkpoint: Any) -> str:
    raw = tiny(zero_optimization={"stage": 2})
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["logging"]["progress"] = "lines"
    raw["mpl_scale"]["checkpoint"] = {"every": 3, "keep": 3, **checkpoint}
    return write(tmp_path, raw, f"run-{len(checkpoint)}.json")


def train_here(config: str, output: str, stop_after: int | None = None) -> Any:
    return train(load_config(config), Options(Path(output)), stop_requested=StopAfter(stop_after))


def test_a_run_that_writes_in_the_background_ends_and_resumes_bitwise(tmp_path: Path) -> None:
    plain = run_config(tmp_path)
    config = run_config(tmp_path, asynchronous=True)
    pool(2).run(train_here, plain, str(tmp_path / "plain"))
    pool(2).run(train_here, config, str(tmp_path / "whole"))
    for steps in (5, 6):
        assert pool(2).run(train_here, config, str(tmp_path / "stopped"), steps) == [None, None]
    pool(2).run(train_here, config, str(tmp_path / "stopped"))
    expected = final_state(tmp_path / "plain")
    for name in ("whole", "stopped"):
        found = final_state(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        kept = [folder.name for folder in find(tmp_path / name / "checkpoints")]
        assert kept == [folder.name for folder in find(tmp_path / "plain" / "checkpoints")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_warns_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], asynchronous: bool
) -> None:
    """Fails twice at step 6, then once at step 9: the second attempt is good."""
    config = run_config(tmp_path, asynchronous=asynchronous)
    module: Any = background if asynchronous else snapshots
    name = "write_shard" if asynchronous else "save"
    write_once, attempts = getattr(module, name), 0

    def on_full_disk(*args: Any, **kwargs: Any) -> Any:
        nonlocal attempts
        attempts += 1
        regular = 0 if asynchronous else 1  # the synchronous save of the warm-up's end, step 4, is an attempt too
        full = attempts - regular in (2, 3, 4)
        with no_file_above(300 if full else resource.RLIM_INFINITY):
            return write_once(*args, **kwargs)

    monkeypatch.setattr(module, name, on_full_disk)
    assert train_here(config, str(tmp_path / "out")) is not None
    said = capfd.readouterr().err
    assert said.count("training continues, the next checkpoint is tried as usual") == 1
    assert "free space there" in said
    kept = {int(folder.name[5:]) for folder in find(tmp_path / "out" / "checkpoints")}
    assert kept == {12, 15, 16}
    assert attempts > 5
    assert not list((tmp_path / "out" / "checkpoints").glob("*.tmp-*"))


def test_a_full_disk_at_the_end_is_an_error_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path)
    write_once = snapshots.save

    def on_full_disk(*args: Any, **kwargs: Any) -> Any:
        with no_file_above(300 if kwargs["step"] == 16 else resource.RLIM_INFINITY):
            return write_once(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(snapshots, "save", on_full_disk)
        with pytest.raises(WriteFailed, match="free space there or choose another output folder"):
            train_here(config, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "DONE").exists()
    assert train_here(config, str(tmp_path / "out")) is not None
    train_here(config, str(tmp_path / "whole"))
    expected, found = final_state(tmp_path / "whole"), final_state(tmp_path / "out")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path | None]]:
    """Mounts a tmpfs of a size for the checkpoints of tmp_path/out; None where this user may not."""
    folder = tmp_path / "out" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = []

    def mount(size: str) -> Path | None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            return None
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_too_small_for_one_checkpoint_is_an_error_at_the_start(
    tmp_path: Path, small_disk: Callable[[str], Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads(Path(run_config(tmp_path)).read_text())
    raw["mpl_scale"]["model"]["teacher"]["kwargs"] = {"widths": [64, 64]}  # 300 KB with its momentum
    if small_disk("8k") is None:  # no privileges: only the number of free bytes is made up
        usage = shutil.disk_usage(tmp_path)._replace(free=8192)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        CheckpointError, match=r"a checkpoint is [\d,]+ bytes, .* has [\d,]+ free: free space there"
    ) as caught:
        train_here(write(tmp_path, raw), str(tmp_path / "out"))
    check_documented(str(caught.value), folder=tmp_path)
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def test_a_real_full_disk_while_training_keeps_the_good_ones(
    tmp_path: Path, small_disk: Callable[[str], Path | None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Some checkpoints fit, not as many as are to be kept; the last save is an error."""
    if small_disk("64k") is None:  # no privileges: the tests above fill a disk by RLIMIT_FSIZE
        return
    with pytest.raises(WriteFailed, match="No space left on device"):
        train_here(run_config(tmp_path, keep=99), str(tmp_path / "out"))
    said = capfd.readouterr().err
    assert "mpl_scale.checkpoint.keep = 99 takes; keep less" in said
    warned = next(line for line in said.splitlines() if "training continues" in line)
    cause = r"(?<=checkpoints: ).*?No space left on device[^;]*"  # which call met it is chance
    check_documented(re.sub(cause, "[Errno 28] No space left on device", warned), folder=tmp_path)
    good = find(tmp_path / "out" / "checkpoints")
    assert good
    for folder in good:
        read_prefix(folder, "state")


def test_a_folder_that_cannot_be_written_to_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("a file in the way")
    with pytest.raises(ValueError, match="is a file, where a run keeps a folder"):
        train_here(run_config(tmp_path), str(tmp_path / "out"))
