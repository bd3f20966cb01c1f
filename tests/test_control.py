"""STOP, PAUSE and SAVE in the output folder, and the heartbeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpl_scale.checkpoint import find
from mpl_scale.config import load_config
from mpl_scale.monitor import ControlFiles, Heartbeat, Request
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.ranks import pool


def run(config: str, output: str) -> Any:
    return train(load_config(config), Options(Path(output)))


def make_config(folder: Path) -> str:
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["checkpoint"] = {"every": 0, "keep": 9}
    return write(folder, raw)


def saved_steps(output: Path) -> list[int]:
    return sorted(int(folder.name[5:13]) for folder in find(output / "checkpoints"))


def test_save_saves_once_and_goes_on(tmp_path: Path) -> None:
    config, output = make_config(tmp_path), tmp_path / "out"
    output.mkdir()
    (output / "SAVE").touch()
    assert pool(2).run(run, config, str(output))[1]["steps"] == 16
    assert saved_steps(output) == [1, 4, 12, 16]  # 4, 12 and 16 are the ends of the phases
    assert not (output / "SAVE").exists()


def test_stop_stays_and_pause_goes_and_neither_changes_the_result(tmp_path: Path) -> None:
    config, output = make_config(tmp_path), tmp_path / "out"
    whole = pool(2).run(run, config, str(tmp_path / "whole"))[0]
    output.mkdir()
    (output / "STOP").touch()
    for steps in ([1], [1, 2]):  # a run that is started in spite of STOP does a step
        assert pool(2).run(run, config, str(output)) == [None, None]
        assert saved_steps(output) == steps
        assert (output / "STOP").exists()
    (output / "STOP").rename(output / "PAUSE")
    assert pool(2).run(run, config, str(output)) == [None, None]
    assert not (output / "PAUSE").exists()
    assert pool(2).run(run, config, str(output))[0]["results"] == whole["results"]


def test_files_are_looked_at_once_a_second_and_a_request_holds(tmp_path: Path) -> None:
    now = [0.0]
    control = ControlFiles(tmp_path, clock=lambda: now[0])
    assert control() == Request.NONE
    (tmp_path / "SAVE").touch()
    now[0] = 0.9
    assert control() == Request.NONE
    now[0] = 1.0
    assert control() == Request.SAVE
    (tmp_path / "PAUSE").touch()
    assert control() == Request.SAVE
    now[0] = 2.0
    assert control() == Request.STOP
    (tmp_path / "PAUSE").unlink()
    now[0] = 3.0
    assert control() == Request.STOP
    control.answered(Request.STOP)
    assert list(tmp_path.iterdir()) == []
    now[0] = 4.0
    assert control() == Request.NONE


def test_the_heartbeat_of_a_finished_run(tmp_path: Path) -> None:
    run(make_config(tmp_path), str(tmp_path / "out"))
    beat = json.loads((tmp_path / "out" / "heartbeat.json").read_text())
    found = {name: beat[name] for name in ("doing", "phase", "step", "steps", "global_step")}
    assert found == {"doing": "done", "phase": "finetune", "step": 4, "steps": 4, "global_step": 16}
    assert beat["images_per_second"] > 0


def test_beats_are_seconds_apart_unless_the_work_changes(tmp_path: Path) -> None:
    now = [0.0]
    heartbeat = Heartbeat(tmp_path, clock=lambda: now[0])
    seen = []
    for seconds, doing in ((0.0, "train"), (4.9, "train"), (5.0, "train"), (5.1, "save"), (9.0, "train")):
        now[0] = seconds
        heartbeat.beat(doing, phase="train", step=int(seconds), steps=9, global_step=0)
        line = json.loads((tmp_path / "heartbeat.json").read_text())
        seen.append((line["doing"], line["monotonic"]))
    assert seen == [("train", 0.0), ("train", 0.0), ("train", 5.0), ("save", 5.1), ("train", 9.0)]


def test_a_heartbeat_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "gone")
    heartbeat.beat("train", phase="train", step=1, steps=2, global_step=1)
    with pytest.raises(FileNotFoundError):
        (tmp_path / "gone" / "heartbeat.json").read_text()
