"""Run a sweep's trials: each in a process of its own, so that what ends one does not end the others."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from mpl_scale.monitor.control import PAUSE_NAME
from mpl_scale.sweep.folder import ERROR_NAME, LOG_NAME, State, Task

INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
"""Variables by which a launcher or srun would make a trial one rank of something else."""
LONGEST = 300
"""Characters of a recorded error."""


class Runner:
    """Up to `processes` trials at a time, each on `ranks` local ranks."""

    def __init__(self, *, processes: int, ranks: int, devices: Sequence[str], report: Callable[[str], None]) -> None:
        """
        Args:
            processes: trials at a time.
            ranks: of each trial.
            devices: GPUs as CUDA_VISIBLE_DEVICES names them, shared out evenly; empty: CPUs.
            report: told one line when a trial begins or ends.

        Raises:
            ValueError: there are fewer devices than ranks.
        """
        if devices and len(devices) < processes * ranks:
            raise ValueError(
                f"--processes {processes} with --ranks {ranks} needs {processes * ranks} GPUs, and {len(devices)} are "
                "visible; lower one of them"
            )
        self._ranks, self._line = ranks, report
        self._threads = max(1, (os.cpu_count() or 1) // (processes * ranks))
        self._slots: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
        for slot in range(processes):
            self._slots.put(devices[slot * ranks : (slot + 1) * ranks])
        self._pool = ThreadPoolExecutor(processes)
        self._lock = threading.Lock()
        self._running: dict[Task, subprocess.Popen[bytes]] = {}
        self._asked = False

    def run(self, tasks: Sequence[Task]) -> bool:
        """Run these, in order, and record those that fail. False where a signal asked to stop: the same call resumes.

        The first SIGINT, SIGTERM or SIGUSR1 lets the running trials save and leave, the second ends them as they are.
        """
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            for future in [self._pool.submit(self._run_one, task) for task in tasks]:
                future.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return not self._asked

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()

    def _run_one(self, task: Task) -> None:
        if self._asked:
            return
        devices = self._slots.get()
        try:
            self._report(f"{task.name}: {'resumes' if task.state() is State.BEGUN else 'begins'}")
            (task.folder / ERROR_NAME).unlink(missing_ok=True)
            (task.folder / PAUSE_NAME).unlink(missing_ok=True)
            log = task.folder / LOG_NAME
            written = log.stat().st_size if log.exists() else 0
            status = self._train(task, devices)
            if task.state() is State.DONE:
                self._report(f"{task.name}: done")
            elif self._asked:
                self._report(f"{task.name}: stopped; the same command resumes")
            elif status == 0:
                self._report(f"{task.name}: stopped by a file or a signal; the same command resumes")
            else:
                task.fail(status, _reason(status, log, written))
                self._report(f"{task.name}: failed: {task.error()}")
        finally:
            self._slots.put(devices)

    def _train(self, task: Task, devices: Sequence[str]) -> int:
        arguments = ["train", "--ds_config", str(task.config), "--output", str(task.folder)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self._ranks}"]
        command = [sys.executable, *(launcher if self._ranks > 1 else []), "-m", "mpl_scale.cli", *arguments]
        environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
        environment.setdefault("OMP_NUM_THREADS", str(self._threads))
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        with (task.folder / LOG_NAME).open("ab") as log:
            # a session of its own: what is typed at the terminal reaches the sweep alone, which lets the trials save
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            with self._lock:
                self._running[task] = process
            if self._asked:  # asked between the start and the line above
                (task.folder / PAUSE_NAME).touch()
            status = process.wait()
            with self._lock:
                del self._running[task]
        return status

    def _report(self, line: str) -> None:
        with self._lock:
            self._line(line)

    def _stop(self, number: int, _: FrameType | None) -> None:
        again, self._asked = self._asked, True
        for task, process in list(self._running.items()):
            if again:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            else:
                (task.folder / PAUSE_NAME).touch()


def visible_devices() -> list[str]:
    """GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # seconds

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]


def _reason(status: int, log: Path, start: int) -> str:
    """Why a trial ended: the signal, or the last line of its log, from byte `start` on, that speaks of an error."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or [f"ended with status {status}"])[-1][:LONGEST]
