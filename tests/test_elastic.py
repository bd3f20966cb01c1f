"""A run that resumes with fewer and with more ranks: gradient accumulation keeps its global batch, and its order.

Micro-batches are as many images as a rank has memory for, so fewer ranks take more of them. The network has no batch
norm, whose statistics are those of a micro-batch over all ranks: with it, another number of micro-batches is another
function, as everywhere.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

from mpl_scale.config import check, load_config
from mpl_scale.models.registry import register_model
from mpl_scale.trainer import data_source
from mpl_scale.trainer.prepare import Options, train
from mpl_scale.types import Batch
from tests.support.configs import tiny, write
from tests.support.ranks import pool
from tests.support.runs import StopAfter
from tests.support.tiers import full

BATCH, MICRO = 40, 10
Seen = dict[int, dict[str, int]]
"""Checksums of every image of each step, by the kind of view and its row in the global batch."""


@register_model("digits_cnn_without_norm")
def build(*, num_classes: int) -> nn.Module:
    model = nn.Sequential()
    model.features = nn.Sequential(nn.Conv2d(3, 6, 3, 2, padding=1), nn.Tanh(), nn.Flatten())
    model.classifier = nn.LazyLinear(num_classes)
    model(torch.zeros(1, 3, 8, 8))
    return model


def make_config(folder: Path, loss: str) -> str:
    raw = tiny(train_batch_size=BATCH, train_micro_batch_size_per_gpu=MICRO)
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["method"] |= {"teacher_loss": loss, "pseudo_label_threshold": 0.15}
    section["model"] |= {name: {"name": "digits_cnn_without_norm", "dropout": 0.1} for name in ("teacher", "student")}
    section["logging"]["every"] = 1
    return write(folder, raw)


def run(config: str, output: str, stop_after: int | None) -> tuple[str, Seen]:
    """Train on this rank: "stopped" or "done", and the images it drew."""
    seen: Seen = defaultdict(dict)
    made = data_source.Prefetcher

    class Recorded(made):  # type: ignore[misc, valid-type]
        def __next__(self) -> Batch:
            batch = super().__next__()
            step = len(seen)
            for kind in ("labelled", "weak", "strong"):
                rows = batch.labelled_rows if kind == "labelled" else batch.unlabelled_rows
                for row, image in zip(rows.tolist(), getattr(batch, kind), strict=True):
                    seen[step][f"{kind} {row}"] = zlib.crc32(image.contiguous().numpy().tobytes())
            return batch

    data_source.Prefetcher = Recorded  # type: ignore[misc]
    try:
        summary = train(load_config(config), Options(Path(output)), stop_requested=StopAfter(stop_after))
    finally:
        data_source.Prefetcher = made  # type: ignore[misc]
    return "stopped" if summary is None else "done", dict(seen)


def in_turn(config: str, output: Path, starts: list[tuple[int, int | None]]) -> list[dict[str, int]]:
    """Starts of (ranks, steps until it is stopped; None: to the end); what all ranks together saw in each step."""
    steps: list[dict[str, int]] = []
    for ranks, stop_after in starts:
        found = pool(ranks).run(run, config, str(output), stop_after)
        assert {ended for ended, _ in found} == {"done" if stop_after is None else "stopped"}
        for step in range(len(found[0][1])):
            parts = [seen[step] for _, seen in found]
            together = {row: checksum for part in parts for row, checksum in part.items()}
            assert len(together) == sum(map(len, parts))  # no row on two ranks
            steps.append(together)
    return steps


def losses(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name.endswith("_loss")} for row in rows]


@pytest.mark.parametrize("loss", ["uda", full("flexmatch"), full("freematch"), full("softmatch")])
def test_two_ranks_then_one_then_four(tmp_path: Path, loss: str) -> None:
    """Stopped in the warm-up and in the main phase; thresholds that adapt do so to the same batches."""
    config = make_config(tmp_path, loss)
    batches = [check(load_config(config), world=ranks, cuda=False) for ranks in (2, 1, 4)]
    assert [(one.labelled, one.micro_batches) for one in batches] == [(BATCH, 2), (BATCH, 4), (BATCH, 1)]
    whole = in_turn(config, tmp_path / "whole", [(2, None)])
    found = in_turn(config, tmp_path / "elastic", [(2, 3), (1, 5), (4, None)])
    assert len(found) == len(whole) == 16
    assert all(len(step) == 3 * BATCH for step in whole[4:12])
    assert found == whole
    expected = losses(tmp_path / "whole")
    assert len(expected) > 16
    for here, there in zip(losses(tmp_path / "elastic"), expected, strict=True):
        assert here == pytest.approx(there, abs=1e-4)  # sums of float32 in another order, over 16 steps
