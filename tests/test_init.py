"""`mpl-scale configs` and `init`: the configurations that come with the package, installed or not."""

from __future__ import annotations

import io
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


def answer(monkeypatch: pytest.MonkeyPatch, *answers: object) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in answers)))


def test_answers_are_settings_and_wrong_ones_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("own/cat", "own/dog", "own/fox", "more"):
        (tmp_path / folder).mkdir(parents=True)
    answer(monkeypatch, tmp_path / "own", tmp_path / "none", tmp_path / "more", "", "x", 32, 0)
    assert main(["init", "digits", "--ask", "--output", str(tmp_path / "mine.json")]) == 0
    found = load_config(tmp_path / "mine.json").mpl
    assert (found.data.labelled, found.data.unlabelled) == (str(tmp_path / "own"), str(tmp_path / "more"))
    assert (found.model.num_classes, found.model.image_size) == (3, 32)
    assert found.paper == "none: own images, from digits"
    said = capsys.readouterr().out
    assert "none is no folder" in said
    assert "'x' is no whole number from 1" in said


def test_the_planner_cuts_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "", "", "", 4, "h1", "h100-80")
    output = tmp_path / "mine.json"
    assert main(["init", "imagenet10_resnet50", "--ask", "--output", str(output)]) == 0
    plan = ["plan", "--ds_config", str(DIGITS.parent / "imagenet10_resnet50.json"), "--gpus", "4", "--gpu", "h100-80"]
    assert main([*plan, "--output", str(tmp_path / "planned.json")]) == 0
    assert load_config(output).resolved() == load_config(tmp_path / "planned.json").resolved()
    assert "RANKS:-4" in output.with_suffix(".sh").read_text()


def test_answers_that_end_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, "")
    assert main(["init", "digits", "--ask", "--output", str(tmp_path / "mine.json")]) == 2
    assert "no answer to 'number of classes'; give the settings by --set instead" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
