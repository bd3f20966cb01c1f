"""What stands beside every measured number: the command, the commit, the machine and the versions; and its JSON."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mpl_scale.files import replace_text
from mpl_scale.monitor import processor, versions

ROOT = Path(__file__).resolve().parents[1]


def provenance(module: str, device: torch.device, *, commit: str | None = None) -> dict[str, Any]:
    """Fields that every result starts with.

    Args:
        module: what ran, as "benchmarks.throughput".
        device: where.
        commit: where there is no git to ask; None: ask it.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = "python" if ranks == 1 else f"torchrun --nproc_per_node {ranks}"
    return {
        "command": f"{launcher} -m {module} {shlex.join(sys.argv[1:])}".strip(),
        "commit": commit or git("rev-parse", "--short", "HEAD"),
        "changed_files": git("status", "--short", "--untracked-files=no").splitlines(),
        "machine": machine(device),
        "ranks": ranks,
        "threads_per_rank": torch.get_num_threads(),
        "versions": versions(),
    }


def machine(device: torch.device) -> str:
    """The processor, as a person would name it."""
    cpu = processor()
    if device.type != "cuda":
        return f"{cpu}, no GPU"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB), {cpu}"


def git(*arguments: str) -> str:
    """What git says about this checkout; empty where there is no git or no repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def write(path: Path, document: dict[str, Any]) -> None:
    """Write JSON by one rename, so that a run that is killed leaves the parts it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(document, indent=2) + "\n")
