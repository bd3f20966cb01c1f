"""A small valid ds_config to start from, and ways to write it down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIGITS = Path(__file__).parents[2] / "ds_configs" / "digits.json"


def tiny(**top_level: Any) -> dict[str, Any]:
    """The digits config cut to a few steps of a narrow net."""
    raw = json.loads(DIGITS.read_text())
    raw.update(top_level)
    section = raw["mpl_scale"]
    for network in ("teacher", "student"):
        section["model"][network] = {"name": "digits_cnn", "kwargs": {"widths": [4, 6]}, "dropout": 0.1}
    section["data"]["unlabelled_ratio"] = 1
    section["phases"] = {
        "teacher_warmup": {"steps": 4},
        "train": {"steps": 8, "evaluate_every": 4},
        "finetune": {"steps": 4, "optim": {"lr": 0.002}},
    }
    section["logging"] = {"every": 2, "progress": "off"}
    section["checkpoint"] = {"every": 3, "keep": 3}
    return raw


def write(folder: Path, raw: dict[str, Any], name: str = "run.json") -> str:
    path = folder / name
    path.write_text(json.dumps(raw))
    return str(path)
