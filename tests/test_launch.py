"""The same train.py under every launcher, killed and resumed: real processes, as a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mpl_scale.config import load_config
from mpl_scale.mesh import adopt_slurm_environment
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.launched import (
    ROOT,
    SECONDS,
    command,
    environment,
    finish,
    free_port,
    kill_after,
    start_and_wait,
)
from tests.support.ranks import pool
from tests.support.tiers import full


def make_config(tmp_path: Path, engine: str, steps: int = 8) -> str:
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": engine}
    raw["mpl_scale"]["phases"]["train"] = {"steps": steps, "evaluate_every": 0}
    raw["mpl_scale"]["logging"]["progress"] = "lines"
    return write(tmp_path, raw)


def summary(output: Path) -> dict[str, Any]:
    assert (output / "DONE").exists()
    return json.loads((output / "summary.json").read_text())


def train_here(config: str, output: str) -> Any:
    return train(load_config(config), Options(Path(output)))


@pytest.mark.full
def test_deepspeed_killed_at_any_moment_ends_like_an_uninterrupted_run(tmp_path: Path) -> None:
    """SIGKILL of every process in the main phase, then SIGTERM to the launcher, then to the end."""
    config = make_config(tmp_path, "deepspeed", steps=40)
    whole = pool(2).run(train_here, config, str(tmp_path / "whole"))[0]
    output = tmp_path / "killed"
    assert kill_after(command("deepspeed", config, output), output, '"step": 8', signal.SIGKILL) != 0
    assert kill_after(command("deepspeed", config, output), output, '"step": 14', signal.SIGTERM) != 0
    assert not (output / "DONE").exists()  # the ranks save and leave, while the next run waits for the folder
    finish(command("deepspeed", config, output, "--resume", "auto"))
    assert summary(output)["results"] == whole["results"]
    assert summary(output)["engine"] == "deepspeed"


@pytest.mark.parametrize("launcher", ["python", full("torchrun"), full("deepspeed")])
def test_ctrl_c_saves_and_stops(tmp_path: Path, launcher: str) -> None:
    """As a terminal sends it, to the launcher and to each rank. The launchers may print tracebacks of their own."""
    config, output = make_config(tmp_path, "flat", steps=100_000), tmp_path / "out"
    process = start_and_wait(command(launcher, config, output), output, '"step": 8')
    os.killpg(process.pid, signal.SIGINT)
    status = process.wait(timeout=SECONDS)
    log, deadline = tmp_path / "log", time.monotonic() + SECONDS
    while "stopped as asked after step" not in log.read_text():  # deepspeed's runner does not wait for its ranks
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    said = log.read_text()
    assert said.count("mpl-scale: stopping after this step; press Ctrl-C again to end at once") == 1, said
    step = re.search(r"stopped as asked after step (\d+) of", said)
    assert step is not None
    saved = [path.name for path in (output / "checkpoints").glob("step_*")]
    assert any(int(name[5:13]) == 4 + int(step[1]) for name in saved), saved  # after 4 of teacher_warmup
    assert f"{ROOT}/mpl_scale/" not in said.replace(str(output), ""), said  # no stack of ours
    if launcher == "python":
        assert status == 0
        assert "Traceback" not in said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A config, and the summary of its run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    config = make_config(folder, "flat")
    train_here(config, str(folder / "out"))
    return config, summary(folder / "out")


def check_two_ranks(output: Path, one: dict[str, Any]) -> None:
    """The global batch, the pseudo labels and the dropout masks do not depend on the number of ranks."""
    two = summary(output)
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for network, result in one["results"].items():
        # float32 sums in another order, over 16 steps
        assert result["loss"] == pytest.approx(two["results"][network]["loss"], rel=1e-3)


@pytest.mark.parametrize("launcher", [full("torchrun"), "deepspeed"])
def test_two_ranks_under_a_launcher_agree_with_one(
    tmp_path: Path, alone: tuple[str, dict[str, Any]], launcher: str
) -> None:
    config, one = alone
    finish(command(launcher, config, tmp_path / "two"))
    check_two_ranks(tmp_path / "two", one)


@pytest.mark.full
def test_srun_variables_start_two_ranks_that_agree_with_one(tmp_path: Path, alone: tuple[str, dict[str, Any]]) -> None:
    """What srun sets for each task, without Slurm itself."""
    (config, one), output = alone, tmp_path / "out"
    job = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0", "MASTER_PORT": str(free_port())}
    tasks = [
        subprocess.Popen(
            command("python", config, output),
            env=environment(**job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for task in tasks:
        said, _ = task.communicate(timeout=SECONDS)
        assert task.returncode == 0, said
    check_two_ranks(output, one)


def test_slurm_variables_give_way_to_a_launchers() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    before = dict(variables)
    adopt_slurm_environment(variables)
    assert variables == before
    variables = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    adopt_slurm_environment(variables)
    assert variables["RANK"] == "1"
    assert variables["WORLD_SIZE"] == "2"
    assert variables["LOCAL_RANK"] == "0"
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("127.0.0.1", "20007")
