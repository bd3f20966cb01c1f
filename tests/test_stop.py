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


def test_a_signal_asks_to_stop_once() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        stop = StopRequest().install()
        assert not stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])
