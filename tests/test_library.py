"""`import mpl_scale as mpl`: the page's example, and a loop of one's own that is the trainer's."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

import mpl_scale as mpl
from mpl_scale.checkpoint import find, read_prefix
from tests.support.configs import DIGITS, tiny, write

ROOT = DIGITS.parents[1]
PAGE = (ROOT / "docs" / "library.md").read_text()


def test_the_pages_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (number * 90, 9, 9)).save(tmp_path / "photos" / f"{number}.png")
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), {})
    assert "'images': 2, 'unreadable': 0" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [row["file"] for row in rows] == ["0.png", "1.png"]


def test_every_name_is_on_the_page() -> None:
    assert set(re.findall(r"^\| `mpl\.(\w+)", PAGE, re.MULTILINE)) == set(mpl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mpl.trian  # noqa: B018


def test_importing_it_imports_no_torch() -> None:
    program = "import sys, mpl_scale as mpl; mpl.load_config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("loss", ["uda", "flexmatch"])  # the second keeps a status of every image
def test_a_loop_of_ones_own_is_the_trainers(tmp_path: Path, loss: str) -> None:
    raw = tiny()
    raw["mpl_scale"].setdefault("method", {})["teacher_loss"] = loss
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["phases"] = {"train": {"steps": 3}}
    config = mpl.load_config(write(tmp_path, raw))
    assert mpl.train(config, output=tmp_path / "run") is not None
    state, loader = mpl.build_state(config), mpl.Loader(config)
    assert len(loader) == 3
    for batch in loader:
        mpl.step(state, batch)
    checkpoint = find(tmp_path / "run" / "checkpoints")[0]
    for name, network in (("teacher", state.teacher), ("student", state.student)):
        assert network is not None
        saved = read_prefix(checkpoint, name)
        for key, value in network.module.named_parameters():
            assert torch.equal(value.detach(), saved[f"master/{key}"].view_as(value)), f"{name}.{key}"
    later = next(iter(mpl.Loader(config, start_step=2)))
    assert torch.equal(later.weak, next(islice(loader, 2, None)).weak)
