"""The configs of ds_configs, and whose row of the paper each has."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from mpl_scale.config import load_config
from mpl_scale.config.presets import flatten
from tests.support.configs import DIGITS

FOLDER = DIGITS.parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def paper_row(name: str) -> str:
    """The config whose row this one has: its own, or the one it spreads over some number of GPUs."""
    return re.sub(r"_\d+gpu$", "", name)


@cache
def settings(name: str) -> dict[str, Any]:
    """Dotted fields of the resolved config."""
    return flatten(load_config(FOLDER / f"{name}.json").resolved())
