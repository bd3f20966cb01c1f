"""docs/planner.md's commands run as they stand there, in order; docs/config.md is what the schema says."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import calibrate
from mpl_scale.cli.main import main
from mpl_scale.config.reference import reference
from mpl_scale.config.schema import Config
from mpl_scale.planner.hardware import DEVICES, load_calibration
from tests.support.configs import DIGITS

DOCS = DIGITS.parents[1] / "docs"
LARGE = "--gpus 128"
"""Commands that trace the largest network fifteen times: a minute, with MPL_SCALE_TEST_ALL=1."""


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "planner.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.mark.full
def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs: dict[str, Callable[[list[str]], int]] = {
        "mpl-scale ": main,
        "python -m benchmarks.calibrate ": calibrate.main,
    }
    (tmp_path / "ds_configs").symlink_to(DIGITS.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # calibrate would take all cores
    planned = [line for line in commands() if "train.py" not in line]  # make test-docs has that one too
    lines = [line for line in planned if LARGE not in line or os.environ.get("MPL_SCALE_TEST_ALL")]
    assert len(lines) >= 6
    for line in lines:
        program = next(name for name in programs if line.startswith(name))
        assert programs[program](shlex.split(line.removeprefix(program))) == 0, (line, capsys.readouterr().err)
    said = capsys.readouterr().out
    for part in ("why:", "rates: my-node.json", "written: sweep.svg", "impossible"):
        assert part in said
    device, reached = load_calibration("my-node.json", DEVICES["h200"])
    assert 0 < device.peak < DEVICES["h200"].peak  # of this CPU
    assert all(0 < share <= 1 for share in (*reached.arithmetic.values(), *reached.traffic.values()))


def test_the_config_page_is_the_schemas() -> None:
    """Made again by the command in its head."""
    assert (DOCS / "config.md").read_text() == reference(), "python -m mpl_scale.config.reference > docs/config.md"


def test_the_config_page_has_every_field() -> None:
    page = reference()

    def walk(section: type) -> None:
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                walk(inner)
            else:
                assert f"| `{name}` |" in page, name

    walk(Config)
