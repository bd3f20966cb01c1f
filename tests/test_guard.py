"""A run whose numbers turn into NaN or infinity stops by name, and leaves its good checkpoints as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mpl_scale.checkpoint import find, read_prefix
from mpl_scale.config import check, load_config
from mpl_scale.data import TrainLoader
from mpl_scale.mesh import build_mesh
from mpl_scale.trainer.data_source import batch_ids, batch_spec
from mpl_scale.trainer.phases import plan_phases
from mpl_scale.trainer.preflight import load_splits
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.ranks import pool


def diverging(folder: Path, **sections: Any) -> str:
    """The student's learning rate is far too high from the main phase's step 0 on; the warm-up has no student."""
    raw = tiny()
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["phases"]["train"]["evaluate_every"] = 0
    section["optim"]["student"]["lr"] = 1e30
    section |= sections
    return write(folder, raw)


def run(config: str, output: str) -> str:
    try:
        train(load_config(config), Options(Path(output)))
    except ValueError as error:
        return str(error)
    return ""


def finite(folder: Path) -> bool:
    """Whether a checkpoint's weights are; the warm-up's has a teacher alone."""
    values = read_prefix(folder, "teacher") | (read_prefix(folder, "student") if "student" in prefixes(folder) else {})
    return all(bool(value.isfinite().all()) for value in values.values() if value.is_floating_point())


def prefixes(folder: Path) -> set[str]:
    return {key.split("/")[0] for key in json.loads((folder / "index.json").read_text())["entries"]}


def test_a_metric_stops_the_run_on_every_rank_alike(tmp_path: Path) -> None:
    config = diverging(tmp_path, logging={"every": 2, "progress": "off"}, checkpoint={"every": 0, "keep": 3})
    output = tmp_path / "out"
    said = pool(2).run(run, config, str(output))
    assert said[0] == said[1]
    assert "student_loss = nan" in said[0] or "student_loss = inf" in said[0]
    assert "after step 2 of train, whose batch was labelled " in said[0]
    assert f"the state is in {output / 'bad-6'}, it will not be used for resuming" in said[0]
    assert not finite(find(output / "bad-6")[0])
    assert [folder.name for folder in find(output / "checkpoints")] == ["step_00000004"]  # the warm-up's end
    assert finite(find(output / "checkpoints")[0])
    assert run(config, str(output)) == said[0]  # it resumes from the good one, and meets the same batch
    mended = load_config(config, overrides=("mpl_scale.optim.student.lr=0.1",))
    summary = train(mended, Options(output))
    assert summary is not None
    assert summary["steps"] == 16


def test_weights_stop_the_run_before_a_checkpoint_holds_them(tmp_path: Path) -> None:
    """Between two logging steps, and where the loss was still finite: an update spoils weights after the loss."""
    config = diverging(tmp_path, logging={"every": 50, "progress": "off"}, checkpoint={"every": 1, "keep": 1})
    said = run(config, str(tmp_path / "out"))
    assert said.startswith("the weights of ")
    left = find(tmp_path / "out" / "checkpoints")
    assert len(left) == 1
    assert finite(left[0])


def test_off_lets_it_go_on(tmp_path: Path) -> None:
    config = diverging(tmp_path, guard={"nonfinite": "off"})
    said = run(config, str(tmp_path / "out"))
    assert "whose batch was" not in said
    assert not list((tmp_path / "out").glob("bad-*"))


def test_the_ids_are_those_the_loader_draws(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, tiny()))
    splits = load_splits(config)
    mesh = build_mesh(device=torch.device("cpu"))
    phase = plan_phases(config.mpl, check(config, world=1, cuda=False), max_steps=None)[1]
    loader = TrainLoader(config.mpl.data, splits, batch=batch_spec(phase, config.mpl, splits), mesh=mesh, start_step=2)
    batch = next(loader)
    loader.close()
    said = batch_ids(phase, config=config.mpl, splits=splits, step=3)
    labelled, unlabelled = (part.split(" and ")[0].split(" ", 1)[1] for part in said.split("; "))
    shown = [int(number) for number in labelled.split(", ")]
    assert splits.images.labels[shown].tolist() == batch.labels[: len(shown)].tolist()
    assert len(set(unlabelled.split(", "))) == 8
    other = batch_ids(phase, config=config.mpl, splits=splits, step=4)
    assert other != said
