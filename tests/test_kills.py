"""One chain of runs in which a random rank is killed again and again, and whose weights end as if none had been.

    make test-kills        30 kills; pytest alone two, both inside the writing of a checkpoint

Two real processes, started as srun would; every second start writes its checkpoints while training continues. Each is
killed some steps after it has begun: a pair of starts when a checkpoint's temporary folder appears, the next pair after
a random delay.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_scale.checkpoint import find, read_prefix
from mpl_scale.checkpoint.folders import read_latest
from mpl_scale.config import load_config
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.faults import check_documented
from tests.support.launched import ROOT, SECONDS, environment, free_port
from tests.support.ranks import pool

KILLS = int(os.environ.get("MPL_SCALE_TEST_KILLS", "2"))
MORE_KILLS = 6  # where the writing was over before the signal came
STEPS_A_START = (3, 5)  # before the moment is awaited: what the main phase alone has is lost where it is not saved
IN_WRITING, ANYWHERE = "when a checkpoint is being written", "at a random moment"


@dataclass(frozen=True)
class Kill:
    """One kill as it happened. inside: a draft of a checkpoint lay there before the kill and stayed."""

    start: int
    asynchronous: bool
    when: str
    rank: int
    step: int
    inside: bool


def make_config(folder: Path) -> str:
    """A checkpoint after every step; the main phase is long enough for the kills."""
    raw = tiny()
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["phases"] = {
        "teacher_warmup": {"steps": 1},
        "train": {"steps": 24 + 4 * KILLS, "evaluate_every": 0},
        "finetune": {"steps": 0},  # the last checkpoint has both networks, the average, the baseline, the counters
    }
    section["checkpoint"] = {"every": 1, "keep": 2}
    section["logging"] = {"every": 1, "progress": "lines"}
    return write(folder, raw)


class Start:
    """Two ranks of train.py on the same folder, without a launcher."""

    def __init__(self, config: str, output: Path, *, asynchronous: bool) -> None:
        self.log = output.parent / "log"
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, str(ROOT / "train.py"), "--ds_config", config, "--output", str(output)]
        command += ["--resume", "auto", "--set", f"mpl_scale.checkpoint.asynchronous={json.dumps(asynchronous)}"]
        with self.log.open("w") as log:
            self.ranks = [
                subprocess.Popen(
                    command, env=environment(**job, RANK=str(rank), LOCAL_RANK=str(rank)), stdout=log, stderr=log
                )
                for rank in range(2)
            ]

    def finish(self) -> list[int]:
        """Wait for both: their statuses. A rank whose neighbour was killed leaves by itself."""
        try:
            return [rank.wait(SECONDS) for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()

    def check_running(self, deadline: float) -> None:
        assert all(rank.poll() is None for rank in self.ranks), self.log.read_text()
        assert time.monotonic() < deadline, self.log.read_text()


def drafts(checkpoints: Path) -> set[str]:
    """Folders a checkpoint is being written in: of a step beyond the newest complete one."""
    try:
        names = [name for name in os.listdir(checkpoints) if name.startswith("step_")]
    except FileNotFoundError:
        return set()
    newest = max((name for name in names if ".tmp-" not in name), default="")
    return {name for name in names if ".tmp-" in name and name.split(".")[0] > newest.split(".")[0]}


def last_step(output: Path) -> int:
    """Of metrics.jsonl, whose last line may be in the making."""
    path = output / "metrics.jsonl"
    rows = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(json.loads(rows[-1])["global_step"]) if rows else 0


def run_until_killed(config: str, output: Path, *, number: int, moments: random.Random) -> Kill:
    """Start, let it train for some steps, kill a rank, wait for the other."""
    checkpoints, asynchronous = output / "checkpoints", number % 2 == 1
    left = drafts(checkpoints)  # of the kill before; the first save deletes them
    when = IN_WRITING if number >= KILLS or number // 2 % 2 == 0 else ANYWHERE
    start = Start(config, output, asynchronous=asynchronous)
    deadline = time.monotonic() + SECONDS
    before = last_step(output)
    # the metrics are first cut back to the checkpoint a start resumes from
    while (output / "heartbeat.json").exists() and f'"pid": {start.ranks[0].pid}' not in _heartbeat(output):
        start.check_running(deadline)
        time.sleep(0.01)
    first = min(before, last_step(output))
    target = first + (moments.randint(*STEPS_A_START) if number < KILLS else 1)
    while last_step(output) < target:
        start.check_running(deadline)
        time.sleep(0.002)
    if when == ANYWHERE:
        time.sleep(moments.uniform(0, 0.2))  # two steps and two saves
    else:
        while not drafts(checkpoints) - left:
            start.check_running(deadline)
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.004))
    rank = moments.randrange(2)
    seen = drafts(checkpoints) - left
    step = last_step(output)
    start.ranks[rank].kill()
    statuses = start.finish()
    inside = bool(seen & drafts(checkpoints))
    assert statuses[rank] == -signal.SIGKILL, start.log.read_text()
    assert statuses[1 - rank] != 0, start.log.read_text()
    return Kill(number, asynchronous, when, rank, step, inside)


def _heartbeat(output: Path) -> str:
    return (output / "heartbeat.json").read_text()


def train_here(config: str, output: str) -> Any:
    return train(load_config(config), Options(Path(output)))


def all_weights(output: Path) -> dict[str, torch.Tensor]:
    folder = find(output / "checkpoints")[0]
    prefixes = ("teacher", "student", "ema", "state")
    return {f"{prefix}/{key}": value for prefix in prefixes for key, value in read_prefix(folder, prefix).items()}


def learnt(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the timings."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("wall", "images_per_second", "data_wait_share")} for row in rows]


@pytest.mark.timeout(300 + 30 * KILLS)
def test_a_chain_of_killed_runs_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    config, output = make_config(tmp_path), tmp_path / "killed"
    summary = pool(2).run(train_here, config, str(tmp_path / "whole"))[0]
    moments, kills = random.Random(1), list[Kill]()  # 1: the first two kills are of different ranks
    for number in range(KILLS + MORE_KILLS):
        if number >= KILLS and {kill.asynchronous for kill in kills if kill.inside} == {False, True}:
            break
        newest = read_latest(output / "checkpoints")
        kills.append(run_until_killed(config, output, number=number, moments=moments))
        said = (tmp_path / "log").read_text()
        print(kills[-1], flush=True)
        assert newest is None or f"resuming from {output / 'checkpoints' / newest}: " in said, said
        assert "damaged" not in said
        assert "missing" not in said
    last = Start(config, output, asynchronous=False)
    assert last.finish() == [0, 0], last.log.read_text()
    resumed = next(line for line in last.log.read_text().splitlines() if line.startswith("resuming from"))
    check_documented(resumed.split(": ")[0], folder=tmp_path)
    inside = Counter(kill.asynchronous for kill in kills if kill.inside)
    print(f"{len(kills)} kills, inside a checkpoint's writing {inside[False]}, in the background {inside[True]}")
    assert inside[False]
    assert inside[True]
    assert {kill.rank for kill in kills} == {0, 1}
    expected, found = all_weights(tmp_path / "whole"), all_weights(output)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert learnt(output) == learnt(tmp_path / "whole")
    assert json.loads((output / "summary.json").read_text())["results"] == summary["results"]
