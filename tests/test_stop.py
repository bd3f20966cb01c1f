"""What makes a run stop, and what keeps two runs apart."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mpl_scale.checkpoint import CheckpointError
from mpl_scale.cli.stop import StopRequest
from mpl_scale.trainer.lock import lock_output


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


def receive_signals(pipe: Connection) -> None:
    stop = StopRequest().install()
    pipe.send(stop())
    while (number := pipe.recv()) is not None:
        os.kill(os.getpid(), number)
        pipe.send(stop())


def test_signals_ask_to_stop_and_only_a_late_sigterm_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm signals the ranks and srun, which signals them again: that is one request."""
    context = multiprocessing.get_context("fork")  # takes the patched clock along
    for number in (signal.SIGUSR1, signal.SIGTERM):
        now = [0.0]
        monkeypatch.setattr("time.monotonic", lambda now=now: now.append(now[-1] + 4) or now[-1])
        ours, theirs = context.Pipe()
        process = context.Process(target=receive_signals, args=(theirs,))
        process.start()
        monkeypatch.undo()
        assert ours.recv() is False
        for sent in (number, signal.SIGTERM, signal.SIGTERM):  # at 4, 8 and 12 s
            ours.send(sent)
            assert ours.recv() is True
        ours.send(signal.SIGUSR1)  # at 16 s
        assert ours.recv() is True
        ours.send(signal.SIGTERM)  # at 20 s
        process.join(20)
        assert process.exitcode == -signal.SIGTERM
