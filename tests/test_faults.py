"""Faults that are put into a run: each says what docs/faults.md shows. Full disks, hangs and kills are elsewhere.

test_checkpoint_writing.py has the full disk, test_watchdog.py the rank that sleeps, test_kills.py the killed one.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpl_scale.checkpoint import find, read_prefix
from mpl_scale.config import load_config
from mpl_scale.monitor import Progress
from mpl_scale.trainer import data_source
from mpl_scale.trainer.prepare import Options, train
from mpl_scale.types import Batch
from tests.support.batches import normalised
from tests.support.configs import DIGITS, tiny, write
from tests.support.faults import check_documented
from tests.support.ranks import pool
from tests.support.runs import StopAfter, final_state

HOUR = 3600.0


def make_config(folder: Path) -> str:
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["logging"] = {"every": 1, "progress": "lines"}
    return write(folder, raw)


def run(config: str, output: str, stop: Callable[[], bool] = lambda: False, overrides: tuple[str, ...] = ()) -> Any:
    return train(load_config(config, overrides=overrides), Options(Path(output)), stop_requested=stop)


class AtStep:
    """Asked at the end of each step, never stops the run; does something at the end of some steps."""

    def __init__(self, actions: dict[int, Callable[[], object]]) -> None:
        self._actions, self._steps = actions, 0

    def __call__(self) -> bool:
        self._steps += 1
        self._actions.get(self._steps, lambda: None)()
        return False


class ReadOnly:
    """A folder that refuses writing while it is switched on: root's mount, any other user's permissions."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self._mounted = not os.geteuid() and not self._run("mount", "-t", "tmpfs", "tmpfs")

    def _run(self, *command: str) -> int:
        return subprocess.run([*command, str(self._folder)], capture_output=True, check=False).returncode

    def switch(self, on: bool) -> None:
        if self._mounted:
            assert self._run("mount", "-o", f"remount,{'ro' if on else 'rw'}") == 0
        else:
            self._folder.chmod(0o555 if on else 0o755)

    def close(self) -> None:
        if self._mounted:
            self._run("umount", "-l")


@contextmanager
def read_only(folder: Path) -> Iterator[ReadOnly]:
    """For the duration; not switched on yet."""
    made = ReadOnly(folder)
    try:
        yield made
    finally:
        made.switch(False)
        made.close()


def test_a_read_only_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    with read_only(tmp_path / "out") as folder:
        folder.switch(True)
        with pytest.raises(ValueError, match="--output") as caught:
            run(make_config(tmp_path), str(tmp_path / "out"))
    check_documented(str(caught.value), folder=tmp_path)


def test_a_folder_that_turns_read_only_is_a_warning_and_loses_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It refuses the checkpoints of steps 9 and 12, and takes that of step 15."""
    config, output = make_config(tmp_path), tmp_path / "out"
    good: list[Path] = []
    with read_only(output / "checkpoints") as folder:

        def refuse() -> None:
            good.extend(find(output / "checkpoints"))
            folder.switch(True)

        run(config, str(output), AtStep({8: refuse, 14: lambda: folder.switch(False)}))
        said = [line for line in capfd.readouterr().err.splitlines() if "training continues" in line]
        assert len(said) == 2
        assert [path.name for path in good] == ["step_00000006", "step_00000004", "step_00000003"]
        assert [path.name for path in find(output / "checkpoints")] == [f"step_{n:08d}" for n in (16, 15, 6)]
        found = final_state(output)
    known = r"\[Errno \d+\] (Permission denied|Read-only file system): '[^']*'"  # the first where this is not root
    check_documented(re.sub(known, "[Errno 30] Read-only file system: 'F'", said[0]), folder=tmp_path)
    run(config, str(tmp_path / "whole"))
    expected = final_state(tmp_path / "whole")
    assert all(found[name].equal(value) for name, value in expected.items())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_serves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    config, output = make_config(tmp_path), tmp_path / "out"
    run(config, str(output), StopAfter(8))
    damaged = find(output / "checkpoints")[0]
    damage(damaged / "rank_00000.safetensors")
    capfd.readouterr()
    run(config, str(output), StopAfter(1))
    said = capfd.readouterr().err.splitlines()
    check_documented(next(line for line in said if "damaged" in line), folder=tmp_path)
    assert "resuming from" in said[said.index(next(line for line in said if "damaged" in line)) + 1]
    for folder in find(output / "checkpoints"):
        if folder != damaged:
            damage(folder / "rank_00000.safetensors")
    with pytest.raises(ValueError, match="no usable checkpoint in") as caught:
        run(config, str(output))
    check_documented(str(caught.value).split(":")[0], folder=tmp_path)


def test_a_batch_with_a_nan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoilt(data_source.Prefetcher):
        """One pixel of the seventh batch is NaN: of the main phase's third."""

        drawn = 0

        def __next__(self) -> Batch:
            batch = normalised(super().__next__())
            Spoilt.drawn += 1
            if Spoilt.drawn == 7:
                batch = replace(batch, labelled=batch.labelled.clone())
                batch.labelled[0, 0, 0, 0] = float("nan")
            return batch

    monkeypatch.setattr(data_source, "Prefetcher", Spoilt)
    with pytest.raises(ValueError, match="after step 3 of train") as caught:
        run(make_config(tmp_path), str(tmp_path / "out"))
    check_documented(str(caught.value), folder=tmp_path)
    good = find(tmp_path / "out" / "checkpoints")
    assert [folder.name for folder in good] == ["step_00000006", "step_00000004", "step_00000003"]
    for folder in good:
        weights = read_prefix(folder, "teacher").values()
        assert all(bool(value.isfinite().all()) for value in weights if value.is_floating_point())


def run_with_another_config_on_rank_1(config: str, output: str) -> str:
    other = ("mpl_scale.parallel.width=2", "mpl_scale.optim.student.lr=0.3")
    overrides = other if os.environ["RANK"] == "1" else ()
    try:
        run(config, output, overrides=overrides)
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_with_another_config_is_refused_at_the_start(tmp_path: Path) -> None:
    """A width of its own would have it make other process groups than its neighbours, and all wait for ever."""
    said = pool(2).run(run_with_another_config_on_rank_1, make_config(tmp_path), str(tmp_path / "out"))
    assert said[0] == said[1]
    check_documented(said[0], folder=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_clock_that_jumps_changes_no_rate_and_no_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The time of day goes back by an hour in the main phase, then forward by two."""
    real, offset = time.time, [0.0]
    for place in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(place, lambda: real() + offset[0])

    def jump(seconds: float) -> Callable[[], None]:
        return lambda: offset.__setitem__(0, offset[0] + seconds)

    output = tmp_path / "out"
    summary = run(make_config(tmp_path), str(output), AtStep({6: jump(-HOUR), 10: jump(2 * HOUR)}))
    assert offset == [HOUR]
    assert 0 < summary["seconds"] < HOUR / 2
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(row["images_per_second"] > 0 and 0 <= row["data_wait_share"] <= 1 for row in rows if "bad_images" in row)
    left = re.findall(r" eta (\S+)", capfd.readouterr().err)
    assert len(left) >= 16
    assert all(re.fullmatch(r"(\d+m)?\d+s", text) for text in left)  # below an hour, not negative
    assert [folder.name for folder in find(output / "checkpoints")] == [f"step_{n:08d}" for n in (16, 15, 12)]
    stream = io.StringIO()
    progress = Progress("bar", show=(), stream=stream)
    progress.start("train", total=10, done=0, images_per_step=8)
    for step in range(1, 10):
        jump(-HOUR)()
        progress.report({}, step=step)
    progress.close()
    bars = stream.getvalue().replace("\r", "\n").split("\n")
    assert re.fullmatch(r"train 9/10 eta 0s \d+ img/s \|.*\|", bars[-2] or bars[-3]), bars


def status(folder: Path) -> str:
    script = DIGITS.parents[1] / "slurm" / "status.sh"
    return subprocess.run([str(script), str(folder)], capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_status_of_a_run_whose_clock_jumped(tmp_path: Path) -> None:
    """On the run's own host its age is right; on another host a time in the future is said to be none."""
    output = tmp_path / "out"
    run(make_config(tmp_path), str(output), StopAfter(6))
    path = output / "heartbeat.json"
    beat = {**json.loads(path.read_text()), "wall": time.time() + HOUR}
    path.write_text(json.dumps(beat) + "\n")
    state, age = status(output).splitlines()[1].split()[1:3]
    assert state == beat["doing"]
    assert 0 <= int(age.removesuffix("s")) < 60
    path.write_text(json.dumps({**beat, "host": "elsewhere"}) + "\n")
    said = status(output)
    assert said.splitlines()[1].split()[1:3] == ["unknown", "?"]
    check_documented(said, folder=tmp_path)
