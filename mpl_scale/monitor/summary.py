"""What is left of a run: summary.json, the DONE mark, and what it ran with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpl_scale.files import replace_text

SUMMARY_NAME = "summary.json"
DONE_NAME = "DONE"
PACKAGES = ("torch", "deepspeed", "fairscale", "timm", "numpy")
DALI_PREFIX = "nvidia-dali-cuda"  # the distribution's name ends in CUDA's version


def write_summary(folder: str | os.PathLike[str], data: Mapping[str, Any]) -> Path:
    """Write summary.json atomically, keys sorted. ValueError, naming the file, for what JSON cannot hold (NaN)."""
    path = Path(folder) / SUMMARY_NAME
    try:
        text = json.dumps(data, sort_keys=True, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; give finite numbers, strings, None, lists and dicts of them") from error
    replace_text(path, text + "\n")
    return path


def cost_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table of a summary's "cost": what was planned for a rank, what it took; no lines where there is none."""
    cost = summary.get("cost")
    if not cost:
        return []
    phase, rows = cost["phase"], {f"{name}, MB": (row, 1e-6) for name, row in cost["bytes"].items()}
    rows["a step, ms"] = (cost["step_ms"], 1.0)
    lines = [f"{f'a rank in phase {phase}':<26}{'planned':>12}{'measured':>12}"]
    for name, (row, scale) in rows.items():
        cells = ("-" if row[key] is None else f"{scale * row[key]:.3f}" for key in ("planned", "measured"))
        lines.append(f"  {name:<24}{''.join(f'{cell:>12}' for cell in cells)}")
    return lines if cost["note"] is None else [*lines, f"  {cost['note']}"]


def mark_done(folder: str | os.PathLike[str]) -> Path:
    """Leave an empty file DONE: the run reached its end, and a restart has nothing to do."""
    path = Path(folder) / DONE_NAME
    path.touch()
    return path


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages results depend on, without importing them; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    installed = {(d.metadata["Name"] or "").lower(): d.version for d in importlib.metadata.distributions()}
    dali = [version for name, version in installed.items() if name.startswith(DALI_PREFIX)]
    return found | {"nvidia-dali": dali[0] if dali else None}


def command() -> str:
    """This process's command line; without the rank that DeepSpeed's launcher adds."""
    return shlex.join(word for word in sys.argv if not word.startswith("--local_rank="))


def processor() -> str:
    """The host's processor, as a person would name it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 of the config's JSON, whatever the order of its keys."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
