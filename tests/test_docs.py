"""docs/extending.md: its pieces are one module, its command trains with all of them, its layer can be split."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mpl_scale.config import load_config
from mpl_scale.spatial import plan_layout
from tests.configs import DIGITS, tiny, write

REPOSITORY = DIGITS.parents[1]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
MODULE = "my_parts"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / f"{MODULE}.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    for name in ("ds_configs", "train.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_of_extensions_runs(parts: Path) -> None:
    (command,) = re.findall(r"```sh\npython (.*?)\n```", PAGE)
    path = os.pathsep.join([str(parts), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, *shlex.split(command)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (parts / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert {row["feedback"] for row in rows if "feedback" in row} <= {-1.0, 0.0, 1.0}  # the rule's signs
    assert json.loads((parts / "runs/mine/config.json").read_text())["mpl_scale"]["imports"] == [MODULE]
    layer = importlib.import_module(MODULE).Scale(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert "0" in plan_layout(model, image_size=8, width=2, switch_at="never").sites
    assert torch.equal(layer(torch.ones(1, 4, 2, 2)), torch.ones(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("no_such_module", None, r"mpl_scale\.imports = 'no_such_module': ModuleNotFoundError: .*PYTHONPATH"),
        (
            "broken_module",
            "1 / 0",
            r"mpl_scale\.imports = 'broken_module': ZeroDivisionError: division by zero; it must",
        ),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str | None, message: str
) -> None:
    if source is not None:
        (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    raw = tiny()
    raw["mpl_scale"]["imports"] = [module]
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(tmp_path, raw))
    assert "\n" not in str(caught.value)
    assert module not in sys.modules
