"""Kills and failing disks: whatever happens while saving, the last good checkpoint loads."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpl_scale.checkpoint import CheckpointError, find
from mpl_scale.mesh import build_mesh
from tests.support.checkpoints import CPU, check_load, load_newest_here, save_step
from tests.support.ranks import pool


def save_with_one_rank_failing(root: str) -> str:
    """Rank 1 may write no file longer than 100 bytes: its disk is full."""
    mesh = build_mesh(device=CPU)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        save_step(root, 20)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def test_a_full_disk_on_one_rank_is_one_error_on_all(tmp_path: Path) -> None:
    pool(2).run(save_step, str(tmp_path), 10)
    messages = pool(2).run(save_with_one_rank_failing, str(tmp_path))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"cannot write a checkpoint to {tmp_path}: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010"]
    assert load_newest_here(str(tmp_path))[1] == 10


def test_a_file_in_place_of_the_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=rf"cannot write a checkpoint to {tmp_path}/run: .*File exists"):
        save_step(str(tmp_path / "run"), 1)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def test_a_kill_at_any_file_operation_leaves_a_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, kill_at = 0, 0

    def watched(operation: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed
            return operation(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    save_step(str(tmp_path / "before"), 10, keep=1)
    seen = set()
    for attempt in range(1, 100):
        calls, kill_at = 0, 0
        root = tmp_path / f"attempt_{attempt}"
        shutil.copytree(tmp_path / "before", root)
        try:
            calls, kill_at = 0, attempt
            save_step(str(root), 20, keep=1)
            break
        except Killed:
            kill_at = 0
        _, loaded, warnings = load_newest_here(str(root))
        seen.add(loaded)
        assert warnings == []
        complete = find(root)
        assert (root / (root / "latest").read_text().strip()) in complete
        for folder in complete:
            check_load(str(folder), int(folder.name[5:13]))
        save_step(str(root), 30, keep=1)
        assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000030"]  # leftovers are gone
    assert attempt > 10
    assert seen == {10, 20}


def kill_saves(root: str, kills: int) -> list[int]:
    """Fork a child that saves in a loop, SIGKILL it after 0 to 60 ms, load; the steps loaded after each kill."""
    steps, moments = [], random.Random(0)
    for _ in range(kills):
        first = max([0, *steps])
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(first + 1, first + 10_000):
                save_step(root, step, keep=1)
                os.write(writable, b".")
            os._exit(1)
        os.read(readable, 1)
        time.sleep(moments.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writable)
        published = 1 + len(os.read(readable, 1 << 16))
        os.close(readable)
        _, step, warnings = load_newest_here(root)
        assert warnings == []
        assert step >= first + published
        steps.append(step)
    return steps


def test_sigkill_at_random_moments_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    steps = pool(1).run(kill_saves, str(tmp_path), 8)[0]
    assert steps == sorted(steps)
