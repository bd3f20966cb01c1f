"""`calibrate`, and a real run through train.py: killed, resumed, and compared with an uninterrupted one bit for bit."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.calibrate import measure
from benchmarks.gpu.parts import Part, Result, Setting, start
from benchmarks.report import ROOT, write
from mpl_scale.checkpoint import find, read_prefix
from mpl_scale.monitor import read_metrics

CALIBRATION = "calibration.json"
GPU_SCALE = 8
"""What calibrate multiplies its sizes by on a GPU: 1 GB lines, products of 8192 x 8192."""
NETWORKS = ("teacher", "student", "ema", "state")


def parts(tiny: bool) -> list[Part]:
    """The parts of this module, the most valuable first."""
    return [Part("calibrate", calibrate, 60), Part("real_run", real_run, 150, joins=False)]


def calibrate(setting: Setting) -> Result:
    """As `python -m benchmarks.calibrate`; the suite puts the file for `mpl-scale plan --calibration` beside its."""
    document = measure(setting.torch_device, scale=1 if setting.device == "cpu" else GPU_SCALE)
    write(setting.folder / CALIBRATION, document)
    return {"file": CALIBRATION, "device": document["device"], "reached": document["reached"]}


def real_run(setting: Setting) -> Result:
    """SIGKILL between two checkpoints, and resume; images of CIFAR's size, resident where a run can have them so."""
    steps, every = (48, 8) if setting.tiny else (400, 80)
    data, raw = _images(setting) if _has_dali() else _vectors()
    config = _shortened(raw, setting, steps=steps, every=every)
    began = time.perf_counter()
    whole = _Run(config, setting.folder / "whole", setting.device)
    result: Result = {"data": data, "steps": steps, "checkpoint_every": every, "whole": whole.finished()}
    result["whole"]["seconds_in_all"] = time.perf_counter() - began
    setting.keep(result)
    killed = _Run(config, setting.folder / "killed", setting.device)
    result["killed_after_step"] = killed.kill_after(every + every // 2)
    resumed = _Run(config, setting.folder / "killed", setting.device)
    result["resumed"] = resumed.finished()
    result |= _differences(_weights(whole.output), _weights(killed.output))
    return result


def _has_dali() -> bool:
    try:
        importlib.import_module("nvidia.dali")
    except ImportError:
        return False
    return True


def _vectors() -> tuple[str, dict[str, Any]]:
    """What a run is that decodes nothing."""
    return "two_moons, because DALI is not installed", json.loads((ROOT / "ds_configs/two_moons.json").read_text())


def _images(setting: Setting) -> tuple[str, dict[str, Any]]:
    """The paper's CIFAR-10 setting on images made here; at toy size the digits' networks."""
    raw = json.loads((ROOT / "ds_configs/cifar10_4k.json").read_text())
    section, size, count = raw["mpl_scale"], *((8, 80) if setting.tiny else (32, 10_000))
    raw["train_batch_size"] = 4 if setting.tiny else 128
    _write_images(setting.folder / "images", size=size, count=count)
    if setting.tiny:
        section["model"] |= {"teacher": {"name": "digits_cnn"}, "student": {"name": "digits_cnn"}}
    section["model"]["image_size"] = size
    section["data"] |= {
        "source": "arrays",
        "root": str(setting.folder / "images"),
        "split": "stratified",
        "labelled_per_class": 4 if setting.tiny else 400,
        "unlabelled_ratio": 3 if setting.tiny else 7,
    }
    section["data"]["weak"]["pad"] = size // 8
    section["data"]["resident"] = "on"
    return f"{count} generated images of {size}x{size}, resident", raw


def _shortened(raw: dict[str, Any], setting: Setting, *, steps: int, every: int) -> Path:
    """The configuration's main phase alone, so that the last checkpoint has both networks."""
    section = raw["mpl_scale"]
    raw["bf16"] = {"enabled": setting.device == "cuda"}
    section["phases"] = {"train": {"steps": steps, "evaluate_every": 0}, "finetune": {"steps": 0}}
    section["logging"] = {"every": 4 if setting.tiny else 20, "progress": "lines"}
    section["checkpoint"] = {"every": every, "keep": 2}
    section["parallel"] = {"engine": "flat", "deterministic": True}  # bit for bit needs deterministic convolutions
    path = setting.folder / "run.json"
    path.write_text(json.dumps(raw))
    return path


def _write_images(folder: Path, *, size: int, count: int) -> None:
    """Each class a colour ramp of its own, under noise."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 10
    ramp = np.linspace(0, 255, size)[None, :, None, None] * (labels[:, None, None, None] + 1) / 10
    noise = generator.integers(-60, 61, (count, size, size, 3))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", np.clip(ramp + noise, 0, 255).astype(np.uint8))
    np.save(folder / "labels.npy", labels)


class _Run:
    """train.py in a process of its own, which has its imports from the suite's server of processes."""

    def __init__(self, config: Path, output: Path, device: str) -> None:
        self.output, self.log = output, output.with_suffix(".log")
        arguments = ["--ds_config", str(config), "--output", str(output)]
        self._process = start(_train, arguments, device, log=self.log)

    def finished(self) -> Result:
        """Wait for the end: what the run logged of itself.

        Raises:
            RuntimeError: it failed, with the last line it printed.
        """
        self._process.join()
        if self._process.exitcode:
            raise RuntimeError(f"train.py ended with status {self._process.exitcode}: {self._printed()[-1:]}")
        rows = [row for row in read_metrics(self.output / "metrics.jsonl") if "data_wait_share" in row]
        warm = rows[len(rows) // 2 :]  # after the capture
        return {
            "data_wait_share": statistics.median(row["data_wait_share"] for row in warm),
            "data_wait_shares": [row["data_wait_share"] for row in rows],
            "images_per_second": statistics.median(row["images_per_second"] for row in warm),
            "said_of_graphs": [line for line in self._printed() if re.search("graph|captur", line, re.IGNORECASE)],
        }

    def kill_after(self, step: int) -> int:
        """SIGKILL once that step is logged; the last step that was.

        Raises:
            RuntimeError: the run ended before.
        """
        while self._step() < step:
            if not self._process.is_alive():
                raise RuntimeError(f"train.py ended by itself before step {step}: {self._printed()[-1:]}")
            time.sleep(0.001)
        self._process.kill()
        self._process.join()
        if self._process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"train.py was over before it could be killed at step {step}")
        return self._step()

    def _step(self) -> int:
        path = self.output / "metrics.jsonl"
        rows = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return int(json.loads(rows[-1])["global_step"]) if rows else 0

    def _printed(self) -> list[str]:
        return self.log.read_text(errors="replace").strip().splitlines()


def _train(arguments: list[str], device: str) -> None:
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    sys.argv = [str(ROOT / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _weights(output: Path) -> dict[str, torch.Tensor]:
    folder = find(output / "checkpoints")[0]
    return {f"{name}/{key}": value for name in NETWORKS for key, value in read_prefix(folder, name).items()}


def _differences(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, Any]:
    largest = {
        name: (found[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        for name, value in expected.items()
        if not torch.equal(found[name], value)
    }
    return {
        "bitwise_equal": not largest and found.keys() == expected.keys(),
        "tensors": len(expected),
        "tensors_that_differ": len(largest),
        "largest_difference": max(largest.values(), default=0.0),
    }
