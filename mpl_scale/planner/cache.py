"""Traces, made once: in memory, and in files that name everything they follow from, this package's sources included."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mpl_scale
from mpl_scale.files import replace_text
from mpl_scale.planner.recorder import Line, Sent, Work
from mpl_scale.planner.trace import NetworkTrace, TraceKey, trace_network

_SOURCES = ("models", "spatial", "engine", "planner")
"""What decides a trace. Not a list of files: a forgotten one would leave stale figures."""
_MEMORY: dict[str, NetworkTrace] = {}


def traced(key: TraceKey) -> NetworkTrace:
    """The trace of a network, from memory, a file, or made now (seconds for the largest).

    Files lie in $MPL_SCALE_CACHE, or mpl_scale under $XDG_CACHE_HOME or ~/.cache; where none can be written, none is.
    """
    name = hashlib.sha256(f"{key.text()}|{_fingerprint()}".encode()).hexdigest()[:24]
    if name not in _MEMORY:
        path = _folder() / f"{name}.json"
        found = _read(path)
        if found is None:
            found = trace_network(key)
            _write(path, found)
        _MEMORY[name] = found
    return _MEMORY[name]


def _folder() -> Path:
    given = os.environ.get("MPL_SCALE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpl_scale"


@cache
def _fingerprint() -> str:
    """SHA-256 of the libraries' versions and of this package's sources."""
    digest = hashlib.sha256(f"{version('torch')} {version('timm')}".encode())
    root = Path(mpl_scale.__file__).parent
    for folder in _SOURCES:
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> NetworkTrace | None:
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        return _restored(raw)
    except (OSError, ValueError, KeyError, TypeError):  # none, or half of one: it is made again
        return None


def _restored(raw: dict[str, Any]) -> NetworkTrace:
    def line(value: Any) -> Line:
        return Line(**value)

    def works(values: list[dict[str, Any]]) -> tuple[Work, ...]:
        return tuple(Work(v["kind"], line(v["macs"]), line(v["bytes"]), v["calls"]) for v in values)

    def sent(values: list[dict[str, Any]]) -> tuple[Sent, ...]:
        return tuple(Sent(v["group"], v["operation"], line(v["bytes"]), v["calls"]) for v in values)

    fields = dict(raw)
    fields["kept"] = {stage: line(value) for stage, value in raw["kept"].items()}
    fields["working"] = line(raw["working"])
    fields["sizes"] = tuple((size, count) for size, count in raw["sizes"])
    fields |= {name: works(raw[name]) for name in ("forward", "backward")}
    fields |= {name: sent(raw[name]) for name in ("sent_forward", "sent_backward")}
    return NetworkTrace(**fields)


def _write(path: Path, trace: NetworkTrace) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(dataclasses.asdict(trace)), durable=False, shared=True)
