"""A run of images of any number of channels, from arrays to timm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from mpl_scale.cli import main
from mpl_scale.config import RunConfig, load_config
from mpl_scale.inference.evaluate import EvaluateOptions, evaluate
from mpl_scale.inference.scoring import StoredNetwork
from mpl_scale.trainer.prepare import Options, train


def from_arrays_to_timm(run: RunConfig, folder: Path) -> None:
    """Checked, trained, evaluated, exported (run, exported in the folder); from files and resident alike."""
    output, channels = folder / "run", run.mpl.model.in_chans
    assert main(["check", "--ds_config", str(run.path), "--device", "cpu"]) == 0
    summary = train(run, Options(output, max_steps=2))
    assert summary is not None
    files = load_config(run.path, overrides=["mpl_scale.data.resident=off"])
    assert train(files, Options(folder / "files", max_steps=2))["results"] == summary["results"]
    (checkpoint,) = (output / "checkpoints").glob("step_*6")
    found = evaluate(EvaluateOptions(StoredNetwork(checkpoint, "student"), folder / "evaluated"))
    assert found["top1"] == pytest.approx(summary["results"]["finetuned"]["top1"])
    assert main(["export", str(output), "--network", "student", "--output", str(folder / "exported")]) == 0
    hub = timm.create_model(f"local-dir:{folder / 'exported'}", pretrained=True).eval()
    assert hub(torch.randn(2, channels, 32, 32)).shape == (2, 6)
    assert json.loads((folder / "exported" / "config.json").read_text())["pretrained_cfg"]["input_size"][0] == channels
