"""The batch scripts on a real Slurm: what interrupts a job never changes its result.

All scenarios run at the same time, so that one's waiting is another's work; a test looks at the result of one. The
engine is `flat`: importing deepspeed would cost seconds for each of some thirty processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_scale.checkpoint import find, read_prefix
from mpl_scale.cli import main
from mpl_scale.sweep import read_spec
from tests.slurm.cluster import Cluster, install, wait_for
from tests.support.configs import DIGITS, tiny

ROOT = DIGITS.parents[1]
STEPS = 80
NASTY = '$(touch pwned); `touch pwned` "two words" & *'
CPU = {
    "MPL_SCALE_ROOT": str(ROOT),
    "MPL_SCALE_PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}
TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1")
FOUR_RANKS = ("--nodes=2", "--ntasks-per-node=2")


class Jobs:
    """Submits runs of one tiny config; each has a folder of its own, with a blank in its name."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        raw = tiny()
        section = raw["mpl_scale"]
        section["parallel"] = {"engine": "flat"}
        section["logging"] = {"every": 2, "progress": "lines"}
        section["phases"] = {
            "teacher_warmup": {"steps": 0},
            "train": {"steps": STEPS},
            "finetune": {"steps": 4, "optim": {"lr": 0.002}},
        }
        section["checkpoint"] = {"every": 20, "keep": 2}
        self.config = folder / "the config.json"
        self.config.write_text(json.dumps(raw))

    def output(self, name: str) -> Path:
        return self.folder / f"run {name}"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def submit(self, name: str, *options: str, more: tuple[str, ...] = (), **environment: str) -> str:
        script = str(ROOT / "slurm" / "train.sbatch")
        words = [f"--job-name={name}", f"--output={self.log(name)}", *options, script, str(self.config)]
        return self.cluster.submit(
            *words, "--output", str(self.output(name)), *more, cwd=self.folder, environment=CPU | environment
        )

    def finish(self, name: str, job: str) -> dict[str, str]:
        found = self.cluster.finish(job, self.log(name))
        return {**found, "log": self.log(name).read_text()}

    def reach(self, name: str, job: str, step: int) -> None:
        """Wait until the run's metrics hold a step, in the job's first start."""
        metrics = self.output(name) / "metrics.jsonl"

        def reached() -> bool:
            found = self.cluster.job(job)
            state = (found["JobState"], found["Restarts"])
            assert state in (("PENDING", "0"), ("RUNNING", "0")), f"{state}: {self.log(name).read_text()}"
            return metrics.exists() and f'"step": {step},' in metrics.read_text()

        wait_for(reached, f"step {step} of {name}", seconds=120)

    def result(self, name: str) -> dict[str, Any]:
        """Everything that must not depend on what happened to the job: bitwise."""
        output = self.output(name)
        assert (output / "DONE").exists(), self.log(name).read_text()
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        timings = ("wall", "images_per_second", "data_wait_share")
        folder = find(output / "checkpoints")[0]
        return {
            "results": json.loads((output / "summary.json").read_text())["results"],
            "metrics": [{k: v for k, v in row.items() if k not in timings} for row in rows],
            "weights": read_prefix(folder, "student"),
        }


def equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["results"] == expected["results"]
    assert found["metrics"] == expected["metrics"]
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name


def whole(jobs: Jobs) -> dict[str, str]:
    return jobs.finish("whole", jobs.submit("whole", *TWO_RANKS))


def four(jobs: Jobs) -> dict[str, str]:
    nasty = ("--set", f"mpl_scale.paper={NASTY}", "--max_steps", "20")
    return jobs.finish("four", jobs.submit("four", *FOUR_RANKS, more=nasty))


def torchrun(jobs: Jobs) -> dict[str, str]:
    nasty = ("--set", f"mpl_scale.paper={NASTY}", "--max_steps", "20")
    job = jobs.submit("torchrun", *FOUR_RANKS, more=nasty, MPL_SCALE_LAUNCHER="torchrun")
    return jobs.finish("torchrun", job)


def time_limit(jobs: Jobs) -> dict[str, str]:
    """USR1 to the batch script, as --signal=B:USR1@180 sends it before the limit."""
    job = jobs.submit("limit", *TWO_RANKS)
    jobs.reach("limit", job, 30)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    return jobs.finish("limit", job)


def steps_signalled(jobs: Jobs) -> dict[str, str]:
    """USR1 to the ranks themselves, as --signal=USR1@180 (without B:) sends it."""
    job = jobs.submit("steps", *TWO_RANKS)
    jobs.reach("steps", job, 30)
    jobs.cluster.run("scancel", "--signal=USR1", job)
    return jobs.finish("steps", job)


def crash(jobs: Jobs) -> dict[str, str]:
    job = jobs.submit("crash", *TWO_RANKS)
    jobs.reach("crash", job, 50)
    os.kill(jobs.cluster.ranks(job)[1], signal.SIGKILL)
    return jobs.finish("crash", job)


def cancelled(jobs: Jobs) -> dict[str, str]:
    job = jobs.submit("cancelled", *TWO_RANKS)
    jobs.reach("cancelled", job, 30)
    jobs.cluster.run("scancel", job)
    jobs.finish("cancelled", job)
    time.sleep(8)  # a requeued job would have started again: its credentials expire after 5 s
    return jobs.finish("cancelled", job)


def hopeless(jobs: Jobs) -> dict[str, str]:
    job = jobs.submit("hopeless", "--nodes=1", "--ntasks=1", MPL_SCALE_PYTHON="false", MPL_SCALE_MAX_RESTARTS="2")
    return jobs.finish("hopeless", job)


def refused(jobs: Jobs) -> dict[str, str]:
    job = jobs.submit("refused", "--nodes=1", "--ntasks=1", more=("--set", "mpl_scale.sead=1"))
    return jobs.finish("refused", job)


def sweep(jobs: Jobs) -> dict[str, str]:
    script, log = str(ROOT / "slurm" / "sweep.sbatch"), jobs.folder / "sweep-%a.log"
    options = ("--array=3-4", "--nodes=1", "--ntasks=1", f"--output={log}", script, str(jobs.config))
    more = ("--output", str(jobs.output("sweep")), "--max_steps", "6")
    job = jobs.cluster.submit(*options, *more, cwd=jobs.folder, environment=CPU)
    for task in (3, 4):
        jobs.cluster.finish(f"{job}_{task}", jobs.folder / f"sweep-{task}.log")
    return {}


def search(jobs: Jobs) -> dict[str, str]:
    """The trials of `mpl-scale sweep`; what the second one asks for, no run finds in the data."""
    labels = "mpl_scale.data.labelled_per_class"
    spec = jobs.folder / "the spec.json"
    content = {"ds_config": jobs.config.name, "space": {labels: {"choices": [4, 500]}}, "trials": 2}
    spec.write_text(json.dumps(content | {"set": {"mpl_scale.phases.train.steps": 6}}))
    drawn = ([read_spec(spec, seed=seed).trial(index)[labels] for index in (0, 1)] for seed in range(100))
    seed = next(seed for seed, values in enumerate(drawn) if values == [4, 500])
    command = ["sweep", str(spec), "--output", str(jobs.output("search")), "--seed", str(seed)]
    assert main([*command, "--prepare"]) == 0
    script, log = str(ROOT / "slurm" / "sweep.sbatch"), jobs.folder / "search-%a.log"
    options = ("--array=0-1", "--nodes=1", "--ntasks=1", f"--output={log}", script, "--sweep")
    job = jobs.cluster.submit(*options, str(jobs.output("search")), cwd=jobs.folder, environment=CPU)
    found = [jobs.cluster.finish(f"{job}_{task}", jobs.folder / f"search-{task}.log") for task in (0, 1)]
    assert main([*command, "--summary"]) == 0
    return {f"state {task}": found[task]["JobState"] for task in (0, 1)} | {
        f"log {task}": (jobs.folder / f"search-{task}.log").read_text() for task in (0, 1)
    }


def check_health(jobs: Jobs) -> dict[str, str]:
    """All well; then a node on which Python cannot start."""
    script = str(ROOT / "slurm" / "healthcheck.sh")
    options = ("--nodes=2", "--ntasks-per-node=2", "--partition=main")
    lame = jobs.folder / "python of a lame node"
    lame.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && exit 1\nexec "{sys.executable}" "$@"\n')
    lame.chmod(0o755)
    settings = {**CPU, "MPL_SCALE_CHECK_MEMORY_GB": "0", "MPL_SCALE_CHECK_DISK_GB": "0"}
    well = jobs.cluster.run(script, *options, **settings)
    limits = {"MPL_SCALE_PYTHON": str(lame), "MPL_SCALE_CHECK_SECONDS": "20"}
    ill = jobs.cluster.run(script, *options, check=False, **settings | limits)
    full = {"MPL_SCALE_CHECK_DISK_GB": "100000000", "MPL_SCALE_PYTHON": "false"}
    quiet = jobs.cluster.run(script, "--quiet", *options, check=False, **settings | full)
    return {"well": well, "ill": ill, "quiet": quiet}


def preempted_then_node_killed(jobs: Jobs) -> dict[str, dict[str, str]]:
    """Both on n3 and n4, one after the other."""
    cluster = jobs.cluster
    job = jobs.submit("preempted", *TWO_RANKS, "--partition=low", "--exclusive")
    jobs.reach("preempted", job, 30)
    assert cluster.job(job)["NodeList"] == "n[3-4]"
    urgent = (
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--nodelist=n3,n4",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )
    other = cluster.submit(*urgent, cwd=jobs.folder)
    cluster.finish(other, jobs.folder / "none")
    first = jobs.finish("preempted", job)

    job = jobs.submit("node", *TWO_RANKS, "--partition=low")
    jobs.reach("node", job, 50)
    assert cluster.job(job)["NodeList"] == "n[3-4]"
    cluster.kill_node("n4")
    second = jobs.finish("node", job)
    return {"preempted": first, "node": second}


SCENARIOS: tuple[Callable[[Jobs], Any], ...] = (
    preempted_then_node_killed,
    whole,
    hopeless,
    time_limit,
    crash,
    cancelled,
    four,
    torchrun,
    steps_signalled,
    sweep,
    search,
    check_health,
    refused,
)
AT_ONCE = 4
"""More on two cores would only wait for each other."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    install()
    cluster = Cluster()
    try:
        yield Jobs(cluster, tmp_path_factory.mktemp("a folder"))
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def outcomes(jobs: Jobs) -> Iterator[dict[str, Future[Any]]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {scenario.__name__: pool.submit(scenario, jobs) for scenario in SCENARIOS}


def test_uninterrupted(jobs: Jobs, outcomes: dict[str, Future[Any]]) -> None:
    found = outcomes["whole"].result()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), found["log"]
    assert jobs.result("whole")["metrics"][-1]["phase"] == "finetune"


def test_two_nodes_of_two_ranks_equal_torchrun(jobs: Jobs, outcomes: dict[str, Future[Any]]) -> None:
    """srun's four tasks against one torchrun on each node; and settings reach the program as they are."""
    for name in ("four", "torchrun"):
        found = outcomes[name].result()
        assert found["JobState"] == "COMPLETED", found["log"]
        assert json.loads((jobs.output(name) / "summary.json").read_text())["ranks"] == 4
        assert json.loads((jobs.output(name) / "config.json").read_text())["mpl_scale"]["paper"] == NASTY
    equal(jobs.result("four"), jobs.result("torchrun"))
    assert not list(jobs.folder.rglob("pwned"))


@pytest.mark.parametrize(("scenario", "name"), [("time_limit", "limit"), ("steps_signalled", "steps")])
def test_a_signal_before_the_limit_costs_no_step(
    jobs: Jobs, outcomes: dict[str, Future[Any]], scenario: str, name: str
) -> None:
    found = outcomes[scenario].result()
    outcomes["whole"].result()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), found["log"]
    assert "not done: back into the queue" in found["log"]
    equal(jobs.result(name), jobs.result("whole"))


def restarted(found: dict[str, str]) -> bool:
    """Completed, after a restart, or more where one was too early: a dead node is known as such after some seconds."""
    return found["JobState"] == "COMPLETED" and int(found["Restarts"]) >= 1


def test_a_crashed_rank_is_retried(jobs: Jobs, outcomes: dict[str, Future[Any]]) -> None:
    found = outcomes["crash"].result()
    outcomes["whole"].result()
    assert restarted(found), found["log"]
    # Slurm ends the other rank by SIGTERM, and srun gives the higher status: of SIGKILL, or of that
    assert re.search(r"(crashed with status 137|\(status 143\)): back into the queue", found["log"])
    equal(jobs.result("crash"), jobs.result("whole"))


def test_a_cancelled_job_stays_cancelled(jobs: Jobs, outcomes: dict[str, Future[Any]]) -> None:
    found = outcomes["cancelled"].result()
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), found["log"]
    assert "back into the queue" not in found["log"]
    assert not (jobs.output("cancelled") / "DONE").exists()
    assert find(jobs.output("cancelled") / "checkpoints")  # it was saved on the way


def test_restarts_without_progress_end(jobs: Jobs, outcomes: dict[str, Future[Any]]) -> None:
    found = outcomes["hopeless"].result()
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "2"), found["log"]
    assert "gave up: 2 restarts in a row and no checkpoint newer than step -1" in found["log"]


def test_bad_input_is_not_retried(outcomes: dict[str, Future[Any]]) -> None:
    found = outcomes["refused"].result()
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), found["log"]
    assert 'unknown key "mpl_scale.sead"; did you mean' in found["log"]
    assert "the input is bad (see above): not requeued" in found["log"]


def test_a_preempted_job_comes_back(jobs: Jobs, outcomes: dict[str, Future[Any]]) -> None:
    found = outcomes["preempted_then_node_killed"].result()["preempted"]
    outcomes["whole"].result()
    assert restarted(found), found["log"]
    equal(jobs.result("preempted"), jobs.result("whole"))


def test_a_job_leaves_a_dead_node(jobs: Jobs, outcomes: dict[str, Future[Any]]) -> None:
    found = outcomes["preempted_then_node_killed"].result()["node"]
    outcomes["whole"].result()
    assert restarted(found), found["log"]
    assert "n4" not in jobs.cluster.run("scontrol", "show", "hostnames", found["NodeList"]).split()
    equal(jobs.result("node"), jobs.result("whole"))


def test_an_array_runs_a_seed_per_task(jobs: Jobs, outcomes: dict[str, Future[Any]]) -> None:
    outcomes["sweep"].result()
    for seed in (3, 4):
        summary = json.loads((jobs.output("sweep") / str(seed) / "summary.json").read_text())
        assert summary["seed"] == seed


def test_an_array_runs_a_trial_per_task_and_one_that_fails_says_so(
    jobs: Jobs, outcomes: dict[str, Future[Any]]
) -> None:
    found = outcomes["search"].result()
    assert (found["state 0"], found["state 1"]) == ("COMPLETED", "FAILED"), found["log 0"] + found["log 1"]
    output = jobs.output("search")
    best = json.loads((output / "best.json").read_text())
    assert best["mpl_scale"]["data"] == {"labelled_per_class": 4}
    assert json.loads((output / "trial_000" / "summary.json").read_text())["steps"] == 10
    assert json.loads((output / "trial_001" / "error.json").read_text())["status"] == 2
    assert "labelled_per_class = 500, but class" in found["log 1"]


def test_the_health_check_names_the_node_that_is_ill(outcomes: dict[str, Future[Any]]) -> None:
    said = outcomes["check_health"].result()
    assert [line.split(":")[0] for line in said["well"].splitlines()] == [
        f"{node} ok all-reduce of 4 ranks" for node in ("n1", "n2")
    ]
    assert said["ill"].splitlines() == ["n2 FAIL 0 of its ranks joined the all-reduce", "exclude:", "n2"]
    assert said["quiet"] == "n1,n2\n"


def test_the_status_of_all_runs(jobs: Jobs, outcomes: dict[str, Future[Any]]) -> None:
    for outcome in outcomes.values():
        outcome.exception()
    runs = {name: jobs.output(name) for name in ("whole", "crash", "cancelled")}
    said = jobs.cluster.run(str(ROOT / "slurm" / "status.sh"), *map(str, runs.values())).splitlines()
    rows = {
        name: line.removeprefix(str(folder)).split()
        for line, (name, folder) in zip(said[1:], runs.items(), strict=True)
    }
    state, restarts, checkpoint = 0, -2, -1
    assert (rows["whole"][state], rows["whole"][restarts], rows["whole"][checkpoint]) == ("done", "0", "00000084")
    assert (rows["crash"][state], rows["crash"][restarts]) == ("done", outcomes["crash"].result()["Restarts"])
    assert rows["cancelled"][state] in ("save", "train", "silent")
