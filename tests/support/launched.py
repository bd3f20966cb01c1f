"""train.py in processes of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.configs import DIGITS

ROOT = DIGITS.parents[1]

BIN = Path(sys.executable).parent

SECONDS = 240


def environment(**extra: str) -> dict[str, str]:
    path = f"{BIN}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command(launcher: str, config: str, output: Path, *more: str) -> list[str]:
    start = {
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())],
        "python": [sys.executable],
    }[launcher]
    return [*start, str(ROOT / "train.py"), "--ds_config", config, "--output", str(output), *more]


def finish(arguments: list[str]) -> None:
    ended = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def kill_after(arguments: list[str], output: Path, line: str, number: signal.Signals) -> int:
    """Start in a session of its own, wait until the metrics hold `line`, signal every process, return the status."""
    process = start_and_wait(arguments, output, line)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)  # the launcher passes it on to the ranks
    return process.wait(timeout=SECONDS)


def start_and_wait(arguments: list[str], output: Path, line: str) -> subprocess.Popen[bytes]:
    """Start in a session of its own, and wait until the metrics hold `line`."""
    with (output.parent / "log").open("w") as log:
        process = subprocess.Popen(arguments, env=environment(), stdout=log, stderr=log, start_new_session=True)
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.exists() and line in metrics.read_text()):
        assert process.poll() is None, (output.parent / "log").read_text()
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no line with {line} in {SECONDS} s: {(output.parent / 'log').read_text()}")
        time.sleep(0.01)
    return process
