"""Everything that the owner of a GPU should run but the tests, in one command and 7 minutes, into one JSON.

    make bench-gpu                                                  # into runs/gpu
    python -m benchmarks.gpu_suite --output benchmarks/results/h200/gpu_suite.json
    python -m benchmarks.gpu_suite --device cpu --tiny              # all parts at toy size

Parts run in order of worth (benchmarks/gpu/), each in a process of its own and under its own time limit; the file is
written after each. A part that fails, crashes, or runs over its limit is recorded, and the next one runs. A part whose
package (DALI, DeepSpeed) is not installed says so; the others need neither. What the parts print is in `logs` beside
the output, and the rates that `mpl-scale plan --calibration` reads are in calibration.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpu import decoding, engines, memory, real_run, steps
from benchmarks.gpu.parts import Method, Part, Result, Setting, preload, run_apart, touch
from benchmarks.gpu.real_run import CALIBRATION
from benchmarks.gpu.shown import shown

MODULES = (steps, memory, real_run, decoding, engines)
"""In the order of their parts."""
AT_FIRST_USE = ("torch._dynamo", "torch.distributed.fsdp", "mpl_scale.trainer.prepare")
"""What else would be imported in each part. Not torch._inductor: it asks for a GPU."""
PRELOADED = (*(module.__name__ for module in MODULES), *AT_FIRST_USE)
TOUCH = Part("device", touch, 60)
LINES_OF_A_FAILURE = 60
LEAST_SECONDS = 4.0
"""No part starts with less than that left of the budget."""


def main(arguments: list[str] | None = None) -> int:
    """The command; status 1 if a part failed."""
    options = _parser().parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        raise ValueError(
            "no GPU, and the full sizes would take a CPU days; --tiny (make bench-gpu TINY=1) runs toy sizes"
        )
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU does not start CUDA
    preload(PRELOADED)
    device = torch.device(options.device)
    document = {
        "kind": "gpu_suite",
        **report.provenance("benchmarks.gpu_suite", device, commit=options.commit),
        "tiny": options.tiny,
        "budget_seconds": options.budget,
        "parts": {},
    }
    began = time.perf_counter()
    run_all(select_parts(options), options, document)
    print(f"written: {options.output} after {time.perf_counter() - began:.0f} s")
    failed = [name for name, result in document["parts"].items() if "error" in result]
    for name in failed:
        log = options.output.parent / "logs" / f"{name}.log"
        last = log.read_text(errors="replace").splitlines()[-LINES_OF_A_FAILURE:] if log.exists() else []
        print("\n".join([f"failed: {name}; the end of {log}:", *last]), file=sys.stderr)
    return 1 if failed else 0


def select_parts(options: argparse.Namespace) -> list[Part]:
    """The parts that --parts names, or all of them.

    Raises:
        ValueError: a name that no part begins with.
    """
    found = [part for module in MODULES for part in module.parts(options.tiny)]
    wanted = options.parts or [""]
    for name in wanted:
        if not any(part.name.startswith(name) for part in found):
            raise ValueError(f"--parts {name}: no such part; there are {', '.join(part.name for part in found)}")
    return [part for part in found if part.name.startswith(tuple(wanted))]


def run_all(parts: Iterable[Part], options: argparse.Namespace, document: dict[str, Any]) -> None:
    """Run one after another within the budget; the document is written after each."""
    output = options.output
    (output.parent / "logs").mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + options.budget
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        method: Method = "forkserver"
        first = _run(TOUCH, options, Path(scratch), TOUCH.seconds, method)
        if "error" in first:  # CUDA may have been started by an import, and does not survive a fork
            method = "spawn"
            first |= {"with spawn": _run(TOUCH, options, Path(scratch), TOUCH.seconds, method)}
        document["device"] = first
        for part in parts:
            began = time.perf_counter()
            seconds = min(part.seconds * options.patience, end - began)
            result: Result = {"skipped": f"--budget {options.budget:g} seconds are spent"}
            if seconds >= LEAST_SECONDS:
                result = _run(part, options, Path(scratch), seconds, method)
            result["seconds_in_all"] = time.perf_counter() - began
            document["parts"][part.name] = result
            report.write(output, document)
            print(f"{part.name}: {shown(result)} [{result['seconds_in_all']:.0f} s]", flush=True)


def _run(part: Part, options: argparse.Namespace, scratch: Path, seconds: float, method: Method) -> Result:
    folder = scratch.resolve() / part.name
    folder.mkdir()
    setting = Setting(
        device=options.device,
        tiny=options.tiny,
        rounds=options.rounds or (2 if options.tiny else 4),
        turn=options.turn or (0.01 if options.tiny else 1.0),
        limit=options.limit or (2 if options.tiny else 64),
        seconds=seconds,
        folder=folder,
    )
    result = run_apart(part, setting, log=options.output.parent / "logs" / f"{part.name}.log", method=method)
    if (folder / CALIBRATION).exists():
        shutil.move(folder / CALIBRATION, options.output.with_name(CALIBRATION))
    shutil.rmtree(folder)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="index 0"
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds; the part that runs then is stopped")
    parser.add_argument("--parts", nargs="*", help="only parts whose names begin so")
    parser.add_argument("--patience", type=float, default=1.0, help="what the parts' own time limits are multiplied by")
    parser.add_argument("--rounds", type=int, help="turns of what is timed (default 4, with --tiny 2)")
    parser.add_argument("--turn", type=float, help="seconds of a turn, about (default 1, with --tiny 0.01)")
    parser.add_argument("--limit", type=int, help="largest labelled batch that is tried (default 64, with --tiny 2)")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu/gpu_suite.json"))
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended, too
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"gpu_suite: error: {error}")
