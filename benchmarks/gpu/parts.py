"""A part of the suite, and how it runs: in a process of its own, under a time limit, its result in a JSON file.

A process per part, because a C++ abort or a CUDA error that sticks would otherwise end the suite, and because memory is
surely free when the next part begins. Processes are forked from a server that has imported everything and never touched
the GPU, so a part starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from benchmarks import report
from mpl_scale.device import Numerics
from mpl_scale.mesh import start_process_group

Result = dict[str, Any]
Method = Literal["forkserver", "spawn"]


@dataclass(frozen=True)
class Setting:
    """What a part is given.

    tiny: toy sizes. rounds, turn: turns of what is timed, and about how many seconds one lasts. limit: largest labelled
    batch that is tried. seconds: until the part is stopped. folder: its own, for files that need not stay.
    """

    device: str
    tiny: bool
    rounds: int
    turn: float
    limit: int
    seconds: float
    folder: Path

    @property
    def torch_device(self) -> torch.device:
        """The device; index 0 on a GPU."""
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device(self.device)

    def keep(self, result: Result) -> None:
        """Write what is known so far: it stays if the part fails or is stopped later."""
        report.write(self.folder / "result.json", result)

    def kept(self) -> Result:
        """The result on disk; {} where there is none."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else {}


@dataclass(frozen=True)
class Part:
    """One measurement.

    function: must pickle. seconds: its limit on a GPU. needs: packages without which it is passed over. joins: whether
    it wants a process group of one rank on the device; else it starts processes itself.
    """

    name: str
    function: Callable[[Setting], Result]
    seconds: float
    needs: tuple[str, ...] = ()
    joins: bool = True


def run_here(part: Part, setting: Setting) -> Result:
    """Run the part in this process: its result, or why there is none."""
    for package in part.needs:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return {"skipped": f"needs the package {package}: {error}"}
    device, owns_group = setting.torch_device, False
    try:
        if part.joins:
            Numerics().apply(device)
            owns_group = not dist.is_initialized()
            if owns_group:
                start_process_group(device, timeout_seconds=600)
        return part.function(setting)
    except Exception as error:
        traceback.print_exc()
        return {"error": first_line(error)}
    finally:
        if owns_group:
            dist.destroy_process_group()


def run_apart(part: Part, setting: Setting, *, log: Path, method: Method = "forkserver") -> Result:
    """Run the part in a process of its own, stopped when its time is over.

    Args:
        part: what to run.
        setting: with the folder and the time limit of this part.
        log: where what it prints goes.
        method: forkserver, or spawn, which imports everything anew.
    """
    process = multiprocessing.get_context(method).Process(target=_serve, args=(part, setting, log))
    process.start()
    try:
        process.join(setting.seconds)
        stopped = process.is_alive()
    finally:  # also when the suite itself is told to stop; with all that the part has started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
    found = setting.kept()
    if stopped:
        found["error"] = f"stopped after {setting.seconds:.0f} s, its limit"
    elif process.exitcode:
        found["error"] = f"ended with status {process.exitcode} (negative: a signal): {_last_line(log)}"
    return found


def _serve(part: Part, setting: Setting, log: Path) -> None:
    os.setpgid(0, 0)
    _print_into(log)
    if setting.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    result = run_here(part, setting)
    setting.keep(setting.kept() | result | {"cpu_seconds": sum(os.times()[:4])})
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # the result is written: libraries that abort when they are unloaded do not matter


def start(function: Callable[..., None], *arguments: Any, log: Path | None = None) -> multiprocessing.Process:
    """A process of a part that runs, started as the part was, and ended with it.

    Args:
        function: must pickle.
        arguments: its own.
        log: where what it prints goes; None: where the part's does.
    """
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_beside, args=(os.getpgrp(), log, function, arguments))
    process.start()
    return process  # type: ignore[return-value]


def _beside(group: int, log: Path | None, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, group)
    if log is not None:
        _print_into(log)
    function(*arguments)


def _print_into(log: Path) -> None:
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def preload(modules: Sequence[str]) -> None:
    """Have the server of processes import these before the first part. They must not touch the GPU when imported."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


def touch(setting: Setting) -> Result:
    """What the device is, once it has computed something."""
    device = setting.torch_device
    torch.zeros(1, device=device).add_(1.0).item()
    if device.type != "cuda":
        return {"device": "cpu"}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "bytes": found.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
    }


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else "it printed nothing"
