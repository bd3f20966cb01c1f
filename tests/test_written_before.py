"""What an earlier version wrote is read: a run of each engine resumes, an index loads.

`written_before/` was written at commit 8f5c518: runs of config.json stopped after 5 of 8 steps, with
`mpl_scale.parallel.engine` = flat and deepspeed at stage 1, and an index of six images.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mpl_scale.checkpoint import find
from mpl_scale.config import load_config
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.trainer.prepare import Options, train
from tests.support.ranks import pool

WRITTEN = Path(__file__).parent / "written_before"


def resumed(engine: str, output: str) -> tuple[dict, int]:
    """The summary of a run to its end, and the number of its first new line of metrics."""
    run = load_config(
        WRITTEN / "config.json", overrides=[f"mpl_scale.parallel.engine={engine}", "zero_optimization.stage=1"]
    )
    summary = train(run, Options(Path(output)))
    assert summary is not None
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return summary, max(line["global_step"] for line in lines)


def weights(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(find(output / "checkpoints")[0] / "rank_00000.safetensors")


@pytest.mark.parametrize("engine", ["flat", "deepspeed"])
def test_a_run_of_the_version_before_resumes(tmp_path: Path, engine: str) -> None:
    """And ends with the weights of a run that this version made alone, to float32 rounding over three steps."""
    for name in ("resumed", "whole"):
        if name == "resumed":
            shutil.copytree(WRITTEN / engine, tmp_path / name)
        ((summary, last),) = pool(1).run(resumed, engine, str(tmp_path / name))
        assert (summary["steps"], last) == (8, 8)
    found, expected = weights(tmp_path / "resumed"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_an_index_of_the_version_before_loads(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "images", tmp_path / "images")
    shutil.copytree(WRITTEN / "index", tmp_path / "index")
    ((name, _, _, modified, _),) = json.loads((tmp_path / "index" / "meta.json").read_text())["shards"]
    os.utime(tmp_path / "images" / name, ns=(modified, modified))
    images = IndexedImages(tmp_path / "index", root=tmp_path / "images")
    assert images.labels.tolist() == [0, 1] * 3
    pixels = np.load(tmp_path / "images" / "images.npy")
    assert len(images) == len(pixels)
    assert pixels[4].tobytes() in images.read(4).tobytes()
