"""Runs on this rank that are stopped after a step, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mpl_scale.checkpoint import find, read_prefix
from mpl_scale.config import load_config
from mpl_scale.trainer.prepare import Options, train


class StopAfter:
    """Asks to stop once it was asked `steps` times: at the end of that step."""

    def __init__(self, steps: int | None) -> None:
        self._left = steps

    def __call__(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        return self._left <= 0


def run(config: str, output: str, stop_after: int | None = None, overrides: tuple[str, ...] = ()) -> Any:
    options = Options(Path(output))
    return train(load_config(config, overrides=overrides), options, stop_requested=StopAfter(stop_after))


def final_state(output: Path) -> dict[str, torch.Tensor]:
    folder = find(output / "checkpoints")[0]
    return read_prefix(folder, "student") | read_prefix(folder, "state")


def lines(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the timings."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("wall", "images_per_second", "data_wait_share")} for row in rows]
