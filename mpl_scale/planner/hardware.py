"""What a device can do: vendors' data sheets, and how much of it programs reach: assumptions until they are measured.

`python -m benchmarks.calibrate` writes a file that replaces the assumptions by what this machine reached.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpl_scale.config.names import require_known, suggest
from mpl_scale.planner.recorder import KINDS

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator and its place in a node.

    Attributes:
        name: for people.
        peak: operations per second of its matrix units in bf16, dense (no sparsity); a CPU's in fp32.
        fp32: share of it in fp32 (TF32 where the device has it, torch's default for convolutions).
        bf16: whether it computes in bf16 at all.
        bandwidth: bytes per second of its memory.
        memory: bytes.
        link: bytes per second one way to the other devices of its node.
        network: bytes per second one way to other nodes, its share of the node's adapters.
        per_node: devices of a node.
        cores: host cores per device, for decoding.
        cpu: whether the ranks compute on the host (no graphs, no compiled loops unless asked for).
    """

    name: str
    peak: float
    bandwidth: float
    memory: float
    link: float
    network: float
    per_node: int = 8
    cores: float = 12
    fp32: float = 0.5
    bf16: bool = True
    cpu: bool = False


def _gpu(name: str, tera: float, memory: float, bandwidth: float, link: float, network: float) -> Device:
    """TFLOP/s, GB, GB/s, GB/s one way, Gbit/s."""
    return Device(name, tera * TERA, bandwidth * GIGA, memory * GIGA, link * GIGA, network / 8 * GIGA)


DEVICES = {
    # Data sheets, SXM: dense bf16 (V100: fp16), HBM, NVLink in one direction; network: the reference node's adapters.
    "h200": _gpu("H200 SXM 141 GB", 989, 141, 4800, 450, 400),
    "h100-80": _gpu("H100 SXM 80 GB", 989, 80, 3350, 450, 400),
    "a100-80": _gpu("A100 SXM 80 GB", 312, 80, 2039, 300, 200),
    "a100-40": _gpu("A100 SXM 40 GB", 312, 40, 1555, 300, 200),
    "v100-16": dataclasses.replace(_gpu("V100 SXM2 16 GB", 125, 16, 900, 150, 50), fp32=15.7 / 125, bf16=False),
}


def host(ranks: int) -> Device:
    """This machine, shared by `ranks`. Its rates are assumed: 32 fp32 operations a cycle at 2.5 GHz a core."""
    cores = (os.cpu_count() or 1) / ranks
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(
        name=f"1/{ranks} of this machine's {os.cpu_count()} cores",
        peak=cores * 80 * GIGA,
        bandwidth=cores * 8 * GIGA,
        memory=total / ranks,
        link=4 * GIGA,
        network=1 * GIGA,
        per_node=ranks,
        cores=cores,
        fp32=1.0,
        cpu=True,
    )


@dataclass(frozen=True)
class Reached:
    """What programs reach of a data sheet. Every default is an assumption; a calibration file replaces it.

    Attributes:
        arithmetic: share of the peak by kind of layer.
        traffic: share of the memory's bandwidth by kind of layer.
        link, network: share of their rates in large collectives.
        link_latency, network_latency: seconds of a collective of a few bytes between two ranks, times log2(ranks).
        launch: seconds to start a kernel from Python, where no graph is replayed.
        decode: seconds of a host core to decode an image file.
        view: seconds of a host core to crop and resize it, per pixel of the result.
        runtime: bytes that the driver, libraries and their communication buffers take on every rank.
        fragmentation: share of what is allocated per step that the allocator cannot use.
    """

    arithmetic: Mapping[str, float] = field(
        default_factory=lambda: {
            "dense": 0.6,
            "pointwise": 0.6,
            "depthwise": 0.05,
            "linear": 0.6,
            "norm": 1.0,
            "elementwise": 1.0,
        }
    )
    traffic: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.75) | {"depthwise": 0.4})
    link: float = 0.7
    network: float = 0.7
    link_latency: float = 8e-6
    network_latency: float = 15e-6
    launch: float = 6e-6
    decode: float = 2e-3
    view: float = 20e-9
    runtime: float = 2.0 * GIGA
    fragmentation: float = 0.08
    source: str = "assumed"


def find_device(name: str, *, ranks_per_node: int | None = None) -> Device:
    """A device by its name in DEVICES, `cpu`, or a JSON file with Device's fields ("like": a name to start from).

    Raises:
        ValueError: unknown, or a field that is missing or unknown.
    """
    if name == "cpu":
        return host(ranks_per_node or 1)
    if not name.endswith(".json"):
        require_known("--gpu", name, {**DEVICES, "cpu": None})
        device = DEVICES[name]
    else:
        raw = _read_json(Path(name), "--gpu")
        like = raw.pop("like", None)
        base = {} if like is None else dataclasses.asdict(find_device(like, ranks_per_node=ranks_per_node))
        fields = [item.name for item in dataclasses.fields(Device)]
        for key in raw:
            if key not in fields:
                raise ValueError(f'--gpu {name}: unknown key "{key}"; {suggest(key, fields)}')
        try:
            device = Device(**{"name": Path(name).stem, **base, **raw})
        except TypeError as error:
            raise ValueError(f'--gpu {name}: {error}; give it, or "like": one of {", ".join(DEVICES)}') from None
        _check_positive(name, dataclasses.asdict(device))
    return dataclasses.replace(device, per_node=ranks_per_node) if ranks_per_node else device


def _check_positive(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key not in ("name", "cpu", "bf16") and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf
        ):
            raise ValueError(f"--gpu {name}: {key} = {value!r}: must be a number above 0")


def load_calibration(path: str | os.PathLike[str], device: Device) -> tuple[Device, Reached]:
    """The device and what it reaches, as `benchmarks.calibrate` measured them.

    Raises:
        ValueError: not a calibration file.
    """
    raw = _read_json(Path(path), "--calibration")
    try:
        rates, found = raw["device"], dict(raw["reached"])
    except (KeyError, TypeError):
        raise ValueError(f"--calibration {path}: no calibration; write one by python -m benchmarks.calibrate") from None
    known = {item.name for item in dataclasses.fields(Reached)}
    if unknown := sorted(found.keys() - known):
        raise ValueError(f'--calibration {path}: unknown key "{unknown[0]}"; {suggest(unknown[0], sorted(known))}')
    default = Reached()
    for name in ("arithmetic", "traffic"):
        found[name] = {**getattr(default, name), **found.get(name, {})}
    return dataclasses.replace(device, **rates), Reached(**{**found, "source": str(path)})


def _read_json(path: Path, option: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{option} {path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{option} {path}: must hold a JSON object")
    return raw
