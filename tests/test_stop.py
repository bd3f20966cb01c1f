"""What makes a run stop, and what keeps two runs apart."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mpl_scale.checkpoint import CheckpointError, find, read_prefix
from mpl_scale.cli import main
from mpl_scale.cli.stop import StopRequest
from mpl_scale.trainer.lock import lock_output
from mpl_scale.workers import deaf_to_interrupts, end_with_parent
from tests.support.configs import DIGITS, tiny, write
from tests.support.tiers import full


def hold(folder: str, pipe: Connection) -> None:
    with lock_output(Path(folder), patience=0, note=print):
        pipe.send("held")
        pipe.recv()


def test_a_second_run_waits_and_names_the_first(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold, args=(str(tmp_path / "out"), theirs), daemon=True)
    other.start()
    assert ours.recv() == "held"
    notes: list[str] = []
    with pytest.raises(CheckpointError, match=rf"is in use by process {other.pid} on .*; stop that run, or choose"):
        lock_output(tmp_path / "out", patience=0.6, note=notes.append)
    assert notes == [f"waiting for process {other.pid} on {os.uname().nodename} to leave {tmp_path / 'out'}"]
    os.kill(other.pid or 0, signal.SIGKILL)  # the lock goes with the process
    other.join()
    lock_output(tmp_path / "out", patience=30, note=pytest.fail).close()


@pytest.mark.parametrize("operation", ["fsync", full("replace"), full("rename")])
@pytest.mark.parametrize("asynchronous", ["false", full("true")])
def test_sigterm_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, asynchronous: str
) -> None:
    """The write is finished, the state saved, and the run continues from it to the end."""
    raw, out = tiny(), tmp_path / "out"
    raw["mpl_scale"]["phases"] = {"train": {"steps": 24}}  # what writes in the background may be many steps late
    config = write(tmp_path, raw)
    settings = ("parallel.engine=flat", "checkpoint.every=2", f"checkpoint.asynchronous={asynchronous}")
    command = ["train", "--ds_config", config, "--output", str(out)]
    command += [part for setting in settings for part in ("--set", f"mpl_scale.{setting}")]
    plain, sent = getattr(os, operation), []

    def signalling(*arguments: object, **named: object) -> object:
        if not sent and (any((out / "checkpoints").glob("step_*.tmp-*")) or "latest.tmp-" in str(arguments[0])):
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return plain(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, operation, signalling)
        assert main(command) == 0
    if not sent:
        pytest.fail(f"no {operation} while a checkpoint is written")
    assert not (out / "DONE").exists()
    newest = find(out / "checkpoints")[0]
    assert read_prefix(newest, "student")
    assert not list((out / "checkpoints").glob("*.tmp-*"))
    assert main(command) == 0
    assert (out / "DONE").exists()


class Ended(list[int]):
    """The statuses with which a StopRequest would have left the process, on a clock that the test sets."""

    now = 0.0

    def request(self) -> StopRequest:
        return StopRequest(clock=lambda: self.now, end=self.append).install()

    def send(self, number: int, *, at: float, stop: StopRequest, expect: list[int]) -> None:
        """Signal this process and wait until its thread has read it."""
        self.now = at
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while (list(self) != expect or stop() is not True) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)  # and does no more
        assert (list(self), stop()) == (expect, True)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Ended:
    monkeypatch.delenv("RANK", raising=False)
    return Ended()


def test_the_first_ctrl_c_asks_and_the_second_ends_at_once(ended: Ended, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = ended.request()
    assert stop() is False  # a step is done: there is something to save
    ended.send(signal.SIGINT, at=1, stop=stop, expect=[])
    said = capfd.readouterr().err
    assert said == "mpl-scale: stopping after this step; press Ctrl-C again to end at once\n"
    ended.send(signal.SIGINT, at=1.2, stop=stop, expect=[130])
    assert "ended at once; the same command resumes" in capfd.readouterr().err
    stop.close()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_launcher_repeats_ctrl_c_and_that_is_one_press(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal signals every process, and torchrun or deepspeed signals its ranks once more."""
    monkeypatch.setenv("RANK", "1")
    stop = ended.request()
    stop()
    ended.send(signal.SIGINT, at=1, stop=stop, expect=[])
    ended.send(signal.SIGINT, at=1.5, stop=stop, expect=[])
    ended.send(signal.SIGTERM, at=1.6, stop=stop, expect=[])
    ended.send(signal.SIGINT, at=4, stop=stop, expect=[130])
    stop.close()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_ask_to_stop_and_only_a_late_sigterm_kills(ended: Ended, number: signal.Signals) -> None:
    """Slurm signals the ranks and srun, which signals them again: that is one request."""
    stop = ended.request()
    stop()
    for sent, seconds in ((number, 4), (signal.SIGTERM, 8), (signal.SIGTERM, 12), (signal.SIGUSR1, 16)):
        ended.send(sent, at=seconds, stop=stop, expect=[])
    ended.send(signal.SIGTERM, at=20, stop=stop, expect=[143])
    stop.close()


WAITING = """
import datetime
import torch.distributed as dist
from mpl_scale.cli.stop import StopRequest
stop = StopRequest().install()
store = dist.TCPStore("127.0.0.1", 0, 1, True)
print("waiting", flush=True)
store.wait(["never set"], datetime.timedelta(seconds=600))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, full(signal.SIGINT)])
def test_a_rank_that_waits_in_torch_before_its_first_step_ends_at_once(number: signal.Signals) -> None:
    """Python runs no handler while the main thread waits there."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert said == f"mpl-scale: {name} before the first step: nothing is lost, the same command starts again\n"


def wait_for_ever() -> None:
    end_with_parent()
    signal.pause()


def start_one(pipe: Connection) -> None:
    child = multiprocessing.get_context("fork").Process(target=wait_for_ever)
    child.start()
    pipe.send(child.pid)
    signal.pause()


def test_our_processes_hear_no_ctrl_c_and_end_with_their_parent() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with deaf_to_interrupts():
        parent = context.Process(target=start_one, args=(theirs,))
        parent.start()
    child = ours.recv()
    for pid in (child, parent.pid or 0):
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert parent.is_alive()
    os.kill(child, 0)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")


def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("mpl_scale.cli.check.report", interrupted)
    try:
        assert main(["check", "--ds_config", str(DIGITS)]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "\nmpl-scale: interrupted\n"
