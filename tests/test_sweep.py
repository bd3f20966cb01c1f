"""mpl-scale sweep: trials are a function of (spec, seed, index), and what ends one of them ends no other."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from mpl_scale.cli import main
from mpl_scale.config import load_config
from mpl_scale.sweep import State, Sweep, read_spec
from mpl_scale.sweep.run import Runner
from mpl_scale.sweep.space import parse, uniform
from mpl_scale.sweep.table import summary_lines
from mpl_scale.trainer.lock import lock_output
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import DIGITS, tiny, write

LR, LABELS = "mpl_scale.optim.student.lr", "mpl_scale.data.labelled_per_class"
SBATCH = DIGITS.parents[1] / "slurm" / "sweep.sbatch"
DRAWS = 4000


def write_spec(folder: Path, **changes: Any) -> Path:
    """A sweep of 3 trials over a tiny config, which is written beside it."""
    raw = tiny()
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["phases"] = {"train": {"steps": 4}, "finetune": {"steps": 2, "optim": {"lr": 0.002}}}
    section["checkpoint"] = {"every": 0}
    write(folder, raw, "base.json")
    spec = {"ds_config": "base.json", "space": {LR: {"log_uniform": [0.01, 1]}}, "trials": 3} | changes
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    return path


def make(folder: Path, **changes: Any) -> Sweep:
    return Sweep(read_spec(write_spec(folder, **changes)), folder / "out")


def test_draws_do_not_change() -> None:
    """A sweep that is resumed by a later version keeps the trials it began with."""
    assert uniform(seed=0, index=0, field=LR) == pytest.approx(0.6537717350, abs=1e-9)  # printed to 10 digits
    assert parse(LR, {"log_uniform": [0.01, 1]})(0.5) == 0.1
    assert parse(LR, {"uniform": [1, 2]})(0.25) == 1.25
    assert [parse(LR, {"choices": [3, "a", None]})(u) for u in (0.0, 0.34, 0.999)] == [3, "a", None]


def test_draws_are_uniform_and_those_of_two_fields_unrelated() -> None:
    first, second = ([uniform(seed=1, index=i, field=field) for i in range(DRAWS)] for field in ("a", "b"))
    five_sigma = 5 / math.sqrt(12 * DRAWS)
    for values in (first, second):
        assert abs(sum(values) / DRAWS - 0.5) < five_sigma
        assert (
            max(abs(sum(value < edge for value in values) / DRAWS - edge) for edge in (0.1, 0.5, 0.9)) < 0.04
        )  # > 5 sigma
    covariance = sum((x - 0.5) * (y - 0.5) for x, y in zip(first, second, strict=True)) / DRAWS
    assert abs(covariance) < 5 / (12 * math.sqrt(DRAWS))
    low, high = 1e-4, 10.0
    draw = parse("lr", {"log_uniform": [low, high]})
    logs = [math.log(draw(u) / low) / math.log(high / low) for u in first]
    assert max(abs(log - u) for log, u in zip(logs, first, strict=True)) < 1e-5  # six digits are kept
    assert all(low <= draw(u) <= high for u in (0.0, 1 - 2**-53))


def test_a_trial_depends_on_its_index_and_seed_alone(tmp_path: Path) -> None:
    three = make(tmp_path).trials
    more = make(
        tmp_path, trials=9, space={"gradient_clipping": {"choices": [0, 1]}, LR: {"log_uniform": [0.01, 1]}}
    ).trials
    assert [task.values[LR] for task in three] == [task.values[LR] for task in more[:3]]
    assert len({task.values[LR] for task in more}) == 9
    assert make(tmp_path, seed=1).trials[0].values != three[0].values
    assert read_spec(tmp_path / "spec.json", trials=5, seed=0).trials == 5


def test_a_section_among_the_choices_is_merged_over_the_base(tmp_path: Path) -> None:
    network = {"name": "digits_cnn", "kwargs": {"widths": [8, 8]}}
    sweep = make(tmp_path, space={"mpl_scale.model.student": {"choices": [network]}}, set={"mpl_scale.seed": 7})
    sweep.prepare(sweep.trials)
    config = load_config(sweep.trials[0].config).mpl
    assert (config.model.student.kwargs, config.model.student.dropout) == ({"widths": [8, 8]}, 0.1)
    assert (config.model.teacher.kwargs, config.seed) == ({"widths": [4, 6]}, 7)


def seed_with(folder: Path, labels: list[int], **changes: Any) -> int:
    """A seed of the draws with which the trials have these labels a class."""
    path = write_spec(folder, **changes)
    for seed in range(1000):
        spec = read_spec(path, seed=seed)
        if [spec.trial(index)[LABELS] for index in range(len(labels))] == labels:
            return seed
    raise AssertionError("no seed")


def ask_to_stop(log: Path, threads: list[threading.Thread]) -> None:
    """What Slurm or a terminal does, once the trial's process is there."""

    def wait() -> None:
        while not log.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threads.append(threading.Thread(target=wait))
    threads[-1].start()


@pytest.mark.full
def test_a_sweep_with_a_stopped_a_failing_and_a_finished_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """500 labels a class pass every check that needs no data, and end the run that asks for them."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(DIGITS.parents[1]))
    space = {LR: {"log_uniform": [0.01, 1]}, LABELS: {"choices": [4, 500]}}
    seed = seed_with(tmp_path, [4, 500, 4], space=space)
    sweep = make(tmp_path, space=space, seed=seed, seeds=[5])
    stopped, failing, finished = sweep.trials
    command = ["sweep", str(tmp_path / "spec.json"), "--output", str(tmp_path / "out")]

    assert main([*command, "--prepare"]) == 0
    assert (sweep.folder / "trials.txt").read_text().split() == [task.name for task in sweep.trials]
    assert [task.state() for task in sweep.trials] == [State.NEW] * 3
    train(load_config(finished.config), Options(finished.folder))
    before = (finished.folder / "metrics.jsonl").read_bytes()

    threads: list[threading.Thread] = []
    ask_to_stop(stopped.folder / "log.txt", threads)
    assert main([*command, "--index", "0"]) == 0
    threads[0].join()
    assert stopped.state() is State.BEGUN
    assert "trial_000: stopped; the same command resumes" in capfd.readouterr().out

    with pytest.raises(ValueError, match=r"the final runs follow from all trials, and 2 have not ended \(trial_000"):
        sweep.finals()
    assert main([*command, "--processes", "2"]) == 0
    said = capfd.readouterr().out
    assert "trial_000: resumes" in said
    assert "trial_002: begins" not in said
    assert [task.state() for task in sweep.trials] == [State.DONE, State.FAILED, State.DONE]
    assert "labelled_per_class = 500, but class" in failing.error()
    assert (finished.folder / "metrics.jsonl").read_bytes() == before
    whole = train(load_config(stopped.config), Options(tmp_path / "whole"))
    assert whole is not None
    assert stopped.results() == whole["results"]  # to the bit, as if it had never been stopped

    metric = "finetuned.top1"
    ranked = [(value, task.name) for value, task in sweep.ranked()]
    assert ranked == sorted(ranked, key=lambda pair: (-pair[0], pair[1]))
    assert {name: value for value, name in ranked} == {
        task.name: task.results()["finetuned"]["top1"] for task in (stopped, finished)
    }
    best = load_config(sweep.folder / "best.json").resolved()
    assert best == json.loads((sweep.folder / ranked[0][1] / "config.json").read_text())
    (final,) = sweep.finals()
    assert (final.name, final.state()) == (f"final_{ranked[0][1][-3:]}_seed_5", State.DONE)
    assert json.loads((final.folder / "config.json").read_text())["mpl_scale"]["seed"] == 5

    assert main([*command, "--summary"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "3 trials: 0 not begun, 0 begun, 1 failed, 2 done"
    assert lines[2].split() == ["trial", metric, "optim.student.lr", "data.labelled_per_class"]
    assert [line.split()[0] for line in lines[3:5]] == [name for _, name in ranked]
    assert any(line.startswith("trial_001 failed: mpl-scale: error") for line in lines)
    assert f"{final.results()['finetuned']['top1']:.3f}" in next(line for line in lines if line.endswith("1 of 1"))
    assert main([*command, "--summary", "--trials", "4"]) == 0  # one more was declared; nothing of it is there
    assert "4 trials: 1 not begun" in capfd.readouterr().out


def test_a_loss_is_better_where_it_is_lower(tmp_path: Path) -> None:
    sweep = make(tmp_path, metric="student.loss")
    sweep.prepare(sweep.trials)
    for task, loss in zip(sweep.trials, (0.5, 0.25, 0.25), strict=True):
        (task.folder / "summary.json").write_text(json.dumps({"results": {"student": {"loss": loss}}}))
        (task.folder / "DONE").touch()
    assert [task.index for _, task in sweep.ranked()] == [1, 2, 0]
    assert summary_lines(sweep)[3].split()[:2] == ["trial_001", "0.250"]
    other = make(tmp_path, metric="ema.top1")
    with pytest.raises(
        ValueError, match=r"metric = 'ema\.top1', which .*summary\.json does not have; it has student\.loss"
    ):
        other.ranked()


@pytest.mark.full
def test_seeds_of_the_command_replace_the_specs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary and the report give mean and deviation over them, of the same config but for the seed."""
    path = write_spec(tmp_path, trials=1, seeds=[7])
    assert main(["sweep", str(path), "--output", str(tmp_path / "out"), "--seeds", "3"]) == 0
    sweep = Sweep(read_spec(path, seeds=3), tmp_path / "out")
    assert [task.seed for task in sweep.finals()] == [1, 2, 3]
    values = [task.results()["finetuned"]["top1"] for task in sweep.finals()]
    row = capsys.readouterr().out.split("best trials")[1].splitlines()[1].split()
    assert row == ["trial_000", f"{fmean(values):.3f}", f"{stdev(values):.3f}", "3", "of", "3"]

    page = tmp_path / "report.html"
    assert main(["report", *(str(task.folder) for task in sweep.finals()), "--output", str(page)]) == 0
    assert f"{fmean(values):.2f} ± {stdev(values):.2f}" in page.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spaces": {}}, 'spec.json: unknown key "spaces"; did you mean space'),
        ({"space": {}}, "space is empty"),
        ({"space": {LR: [0.1, 1]}}, f"space.{LR} = [0.1, 1]: must be one of"),
        ({"space": {LR: {"loguniform": [0.1, 1]}}}, f"space.{LR} = 'loguniform' is unknown; did you mean log_uniform"),
        ({"space": {LR: {"log_uniform": [0, 1]}}}, f"space.{LR}.log_uniform = [0, 1]: must be two numbers above 0"),
        ({"space": {LR: {"uniform": [2, 1]}}}, "the lower one first"),
        ({"space": {LR: {"choices": []}}}, "must be a list of at least one value"),
        ({"space": {"mpl_scale..lr": {"choices": [1]}}}, "space.mpl_scale..lr: write it as section.field"),
        ({"set": {LR: 1}}, "a field stands both in space and in set"),
        ({"set": {"mpl_scale.optim.student": 1}}, f"space.{LR} lies inside set.mpl_scale.optim.student"),
        ({"trials": 0}, "trials = 0: must be a whole number of at least 1"),
        ({"seeds": []}, "seeds is empty"),
        ({"best": 4, "trials": 3, "seeds": [1]}, "best = 4 of trials = 3"),
        ({"seeds": [1, 1]}, "seeds = [1, 1]: must be a list of different whole numbers"),
        ({"seeds": [1], "final_set": {"mpl_scale.seed": 2}}, "mpl_scale.seed is set by `seeds` in the final runs"),
        ({"metric": "student.top2"}, "metric = 'student.top2' is unknown; did you mean student.top"),
        ({"ds_config": "bse.json"}, "bse.json: no such file; did you mean"),
        # of the runs: every one is checked before one is written
        ({"set": {"mpl_scale.optim.student.l": 1}}, 'unknown key "mpl_scale.optim.student.l"; did you mean lr'),
        ({"set": {"mpl_scale.method.name": "mlp"}}, "trial_000: mpl_scale.method.name = 'mlp' is unknown"),
        ({"set": {"mpl_scale.model.student.kwargs.depth": 3}}, "mpl_scale.model.student.kwargs: digits_cnn cannot"),
        ({"set": {"train_micro_batch_size_per_gpu": 3}}, "batch equation broken"),
    ],
)
def test_a_bad_spec_is_one_line_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    path = write_spec(tmp_path, **changes)
    assert main(["sweep", str(path), "--output", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line, line
    assert not (tmp_path / "out").exists()


def test_a_bad_value_of_the_last_trial_is_found_before_the_first_begins(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    space = {LABELS: {"choices": [4, -1]}}
    seed = seed_with(tmp_path, [4, 4, -1], space=space)
    path = write_spec(tmp_path, space=space, seed=seed)
    assert main(["sweep", str(path), "--output", str(tmp_path / "out")]) == 2
    assert f"trial_002: {tmp_path / 'base.json'}: {LABELS} = -1" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_its_sweep(tmp_path: Path) -> None:
    sweep = make(tmp_path)
    sweep.prepare(sweep.trials)
    for same in ({"trials": 5}, {"seeds": [1], "best": 2, "metric": "ema.top1"}):
        other = make(tmp_path, **same)
        other.prepare(other.trials)
    for changed, name in (
        ({"seed": 3}, "seed"),
        ({"set": {"mpl_scale.seed": 3}}, "set"),
        ({"space": {LR: {"choices": [1]}}}, "space"),
    ):
        other = make(tmp_path, **changed)
        with pytest.raises(ValueError, match=f"holds a sweep with another {name}; give the spec"):
            other.prepare(other.trials)
    base = json.loads((tmp_path / "base.json").read_text())
    base["gradient_clipping"] = 1.0
    write(tmp_path, base, "base.json")
    with pytest.raises(ValueError, match="another ds_config"):
        sweep.prepare(sweep.trials)


def test_a_second_sweep_of_the_same_folder_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep = make(tmp_path)
    with lock_output(sweep.folder, patience=0, note=print):
        assert main(["sweep", str(tmp_path / "spec.json"), "--output", str(sweep.folder)]) == 2
    assert f"{sweep.folder} is in use by process {os.getpid()}" in capfd.readouterr().err
    assert sweep.trials[0].state() is State.NEW


def test_gpus_are_shared_out() -> None:
    runner = Runner(processes=2, ranks=2, devices=["4", "5", "6", "7", "0"], report=print)
    assert [runner._slots.get() for _ in range(2)] == [["4", "5"], ["6", "7"]]
    runner.close()
    with pytest.raises(ValueError, match=r"--processes 2 with --ranks 2 needs 4 GPUs, and 3 are visible"):
        Runner(processes=2, ranks=2, devices=["0", "1", "2"], report=print)


@pytest.mark.parametrize(
    ("task", "status", "recorded"), [("1", 0, False), ("1", 3, True), ("1", 143, False), ("9", 2, False)]
)
def test_the_batch_script_runs_the_trial_of_its_line(tmp_path: Path, task: str, status: int, recorded: bool) -> None:
    """With a common.sh that says what it was asked to run, in place of the one that asks Slurm."""
    sweep = make(tmp_path)
    sweep.prepare(sweep.trials)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "common.sh").write_text(f'run_job() {{ printf "%s\\n" "$@"; return {status}; }}\n')
    environment = {**os.environ, "MPL_SCALE_ROOT": str(tmp_path), "SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_ID": "17"}
    command = ["bash", str(SBATCH), "--sweep", str(sweep.folder), "--max_steps", "3"]
    (sweep.trials[1].folder / "error.json").write_text("{}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    if task == "9":
        assert "trials.txt has no line 10; mpl-scale sweep --prepare writes it" in done.stderr
        return
    trial = sweep.trials[1]
    wanted = [str(tmp_path), str(trial.config), "--max_steps", "3", "--output", str(trial.folder)]
    assert done.stdout.splitlines() == wanted
    assert trial.state() is (State.FAILED if recorded else State.NEW)
    assert trial.error() == ("job 17 ended with status 3; see its log" if recorded else "")
