"""A run that is stopped anywhere and resumed ends bitwise like one that was never stopped: every engine and stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpl_scale.checkpoint import find
from mpl_scale.config import load_config
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.ranks import pool
from tests.support.runs import final_state, lines, run
from tests.support.tiers import full

ENGINES = [
    full("flat", 0),
    ("flat", 2),
    full("deepspeed", 0),
    full("deepspeed", 1),
    full("deepspeed", 2),
    full("deepspeed", 3),
]
"""Steps of every stage of DeepSpeed are resumed in test_deepspeed_engine.py as well."""


def make_config(tmp_path: Path, engine: str, stage: int) -> str:
    zero = {"stage": stage, "reduce_bucket_size": 200, "stage3_param_persistence_threshold": 0}
    raw = tiny(zero_optimization=zero)
    raw["mpl_scale"]["parallel"] = {"engine": engine}
    return write(tmp_path, raw)


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_resume_is_bitwise(tmp_path: Path, engine: str, stage: int) -> None:
    """Stops in the warm-up, at a phase's end, in the main phase twice, and in the finetuning.

    With DeepSpeed, whose runs take twice as long, once in each phase.
    """
    config = make_config(tmp_path, engine, stage)
    whole = pool(2).run(run, config, str(tmp_path / "whole"))[0]
    stopped = tmp_path / "stopped"
    for steps in (2, 2, 3, 4, 3) if engine == "flat" else (2, 5, 7):
        assert pool(2).run(run, config, str(stopped), steps) == [None, None]
        assert not (stopped / "DONE").exists()
    resumed = pool(2).run(run, config, str(stopped))[0]
    assert resumed["results"] == whole["results"]
    assert resumed["steps"] == whole["steps"] == 16
    expected = final_state(tmp_path / "whole")
    found = final_state(stopped)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert lines(stopped) == lines(tmp_path / "whole")


def test_a_finished_run_is_not_repeated_and_a_changed_one_is(tmp_path: Path) -> None:
    config, output = make_config(tmp_path, "flat", 2), tmp_path / "out"
    first = run(config, str(output))
    before = (output / "metrics.jsonl").read_bytes()
    assert run(config, str(output), stop_after=1) == first  # would stop after a step if it trained
    assert (output / "metrics.jsonl").read_bytes() == before
    longer = run(config, str(output), overrides=("mpl_scale.phases.finetune.steps=6",))
    assert longer["steps"] == first["steps"] + 2


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["logging"]["progress"] = "lines"
    config = write(tmp_path, raw)
    whole = run(config, str(tmp_path / "whole"))
    output = tmp_path / "out"
    assert run(config, str(output), stop_after=8) is None
    newest, older, *_ = find(output / "checkpoints")
    shard = newest / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    capfd.readouterr()
    resumed = run(config, str(output))
    said = capfd.readouterr().err
    assert f"{shard.name} " in said
    assert f"resuming from {older.name} instead" in said
    assert resumed["results"] == whole["results"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    config, output = make_config(tmp_path, "flat", 2), tmp_path / "out"
    assert run(config, str(output), stop_after=6) is None
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"another configuration: mpl_scale\.model\.student\.kwargs\.widths: \[4, 6\] -> \[4, 8\]"
    ):
        run(config, str(output), overrides=('mpl_scale.model.student.kwargs={"widths": [4, 8]}',))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_resume_never_does_not_overwrite_an_earlier_run(tmp_path: Path) -> None:
    config, output = make_config(tmp_path, "flat", 2), tmp_path / "out"
    run(config, str(output), stop_after=6)
    with pytest.raises(ValueError, match="holds an earlier run's checkpoints"):
        train(load_config(config), Options(output, resume="never"))
    with pytest.raises(ValueError, match="no checkpoint there"):
        train(load_config(config), Options(tmp_path / "new", resume=str(tmp_path)))


@pytest.mark.full
def test_resume_from_a_named_checkpoint(tmp_path: Path) -> None:
    config = make_config(tmp_path, "flat", 2)
    whole = run(config, str(tmp_path / "whole"))
    run(config, str(tmp_path / "first"), stop_after=9)
    checkpoint = find(tmp_path / "first" / "checkpoints")[0]
    summary = train(load_config(config), Options(tmp_path / "second", resume=str(checkpoint)))
    assert summary is not None
    assert summary["results"] == whole["results"]
