"""`mpl-scale configs` and `init`: the configurations that come with the package, installed or not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mpl_scale.cli import main
from mpl_scale.config import load_config
from tests.support.configs import DIGITS
from tests.support.tiers import full

ROOT = DIGITS.parents[1]


def test_configs_lists_every_file_with_its_place_in_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == {path.stem for path in DIGITS.parent.glob("*.json")}
    assert lines["l2"].startswith("Table 4")


@pytest.mark.parametrize("name", ["digits", "l2_8gpu"])
def test_init_writes_the_same_configuration_in_one_file(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine.json"
    assert main(["init", name, "--output", str(output), "--set", "mpl_scale.seed=3"]) == 0
    written = load_config(output)
    assert written.resolved() == load_config(DIGITS.parent / f"{name}.json", overrides=["mpl_scale.seed=3"]).resolved()
    assert "include" not in output.read_text()
    script = tmp_path / "mine.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert main(["check", "--ds_config", str(output), "--world", "8" if name == "l2_8gpu" else "1"]) == 0
    capsys.readouterr()
    assert main(["init", name, "--output", str(output)]) == 2
    assert "is there already; name another, or remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "no configuration is called 'digit'; did you mean digits"),
        (["digits", "--output", "mine"], "--output mine: name a .json file"),
        (["digits", "--set", "mpl_scale.sed=3"], 'unknown key "mpl_scale.sed"; did you mean seed'),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [full("wheel")])
def test_a_wheel_has_every_configuration(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        kind,
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(pip, check=True, timeout=300)
    (built,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(built).namelist())
    there = {f"mpl_scale/{path.relative_to(ROOT)}" for path in DIGITS.parent.rglob("*.json")}
    assert there <= names
