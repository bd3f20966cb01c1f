"""Optional packages: missing ones are one line with pip's command, before the ranks join, and none is requeued."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mpl_scale.cli import main
from mpl_scale.config import load_config
from mpl_scale.config.needs import MONITORS, needed_packages
from mpl_scale.packages import PACKAGES, Package, require_packages
from tests.support.configs import tiny, write

NEEDS = [
    *((f"{section}.enabled=true", module) for section, module in MONITORS.items() if module is not None),
    ("csv_monitor.enabled=true", "deepspeed"),
    ("mpl_scale.parallel.engine=deepspeed", "deepspeed"),
    ("mpl_scale.parallel.recompute_backend=fairscale", "fairscale"),
    ("mpl_scale.data.source=two_moons", "sklearn"),
]


@pytest.mark.parametrize(("setting", "module"), NEEDS)
def test_a_setting_whose_package_is_missing_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    setting: str,
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a second rank never comes: it must not be waited for
    monkeypatch.setenv("RANK", "0")
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    if "two_moons" in setting:
        raw["mpl_scale"]["model"] |= {"num_classes": 2}
        raw["mpl_scale"]["data"] = {"source": "two_moons"}
        for network in ("teacher", "student"):
            raw["mpl_scale"]["model"][network] = {"name": "two_moons_mlp"}
    command = ["train", "--ds_config", write(tmp_path, raw), "--output", str(tmp_path / "out"), "--set", setting]
    assert main(command) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"mpl-scale: error: {setting.partition('=')[0]} = ")
    assert f"{PACKAGES[module].missing()}" in lines[0]
    assert "pip install" in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_check_warns_of_packages_that_this_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be another machine than the one that trains."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    command = ["check", "--ds_config", write(tmp_path, tiny()), "--device", "cpu", "--set", "wandb.enabled=true"]
    assert main(command) == 0
    assert f"warning: wandb.enabled = true needs a package: {PACKAGES['wandb'].missing()}" in capsys.readouterr().out


def test_what_is_off_needs_no_package(tmp_path: Path) -> None:
    run = load_config(write(tmp_path, tiny(wandb={"enabled": False})))
    assert needed_packages(run, engine="flat") == []


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb writes its runs into ./wandb, which Python takes for a namespace package."""
    (tmp_path / "no_such_monitor").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not Package("no_such_monitor", "x", "x").installed()
    assert not Package("no_such_parent.child", "x", "x").installed()
    require_packages([("source", "torch")])


def test_no_test_module_imports_from_another() -> None:
    """What they share is in tests/support."""
    paths = sorted(Path(__file__).parent.rglob("test_*.py"))
    found = re.compile(r"^\s*(?:from|import) tests[\w.]*(?:\.| import .*\b)test_", re.MULTILINE)
    assert [path.name for path in paths if found.search(path.read_text())] == []
