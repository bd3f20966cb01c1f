"""The same experiment for another number of ranks: files beside a ds_config that differ from it in the layout only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpl_scale.config.load import INCLUDE, RunConfig, load_config

LAYOUT = ("parallel", "paper")
"""Fields of our section in which layouts of one experiment may differ."""
BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization")


def advise(run: RunConfig, *, world: int, fits: Callable[[RunConfig], bool]) -> str:
    """Advice: the files to run instead on `world` ranks; "" if there are none. fits: whether a file can run on them."""
    found = _layouts(run, fits)
    found = [path for path in found if path.stem.endswith(f"_{world}gpu")] or found
    return f"{' or '.join(map(str, found))} can run on {world} rank{'s' if world > 1 else ''}" if found else ""


def _layouts(run: RunConfig, fits: Callable[[RunConfig], bool]) -> list[Path]:
    here = _includes(run.path)
    family = {run.path.name, *here}
    found = []
    for path in sorted(run.path.parent.glob("*.json")):
        if path.name == run.path.name or not (path.name in here or family & _includes(path)):
            continue
        try:
            own, other = load_config(run.path), load_config(path)
        except ValueError:
            continue
        if _experiment(own) == _experiment(other) and fits(other):
            found.append(path)
    return found


def _includes(path: Path) -> set[str]:
    """Names of the files of the same folder that a file includes."""
    try:
        named = json.loads(path.read_text()).get(INCLUDE, [])
    except (OSError, ValueError, AttributeError):
        return set()
    listed = [named] if isinstance(named, str) else named
    return {name for name in listed if isinstance(name, str) and "/" not in name}


def _experiment(run: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        run.mpl.model_dump(mode="json", exclude=set(LAYOUT)),
        {name: value for name, value in run.deepspeed.items() if name not in BATCH},
    )
