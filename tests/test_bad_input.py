"""Bad input through the command line: one line on standard error, exit status 2, nothing started, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpl_scale.cli import main
from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images, make_splits
from tests.support.bad_files import BAD, GOOD, NO_FILE
from tests.support.configs import DIGITS, tiny, write
from tests.support.photographs import encoded, photograph


def arguments(tmp_path: Path, *overrides: str) -> list[str]:
    config = write(tmp_path, tiny())
    settings = [part for override in overrides for part in ("--set", override)]
    return ["train", "--ds_config", config, "--output", str(tmp_path / "out"), *settings]


def error_line(capfd: pytest.CaptureFixture[str], command: list[str]) -> str:
    assert main(command) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mpl-scale: error")
    return lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gradient_clipp1ng=1", 'unknown key "gradient_clipp1ng"; did you mean gradient_clipping'),
        ("mpl_scale.data.sauce=digits", 'unknown key "mpl_scale.data.sauce"; did you mean source'),
        ("mpl_scale.model.image_size=big", "mpl_scale.model.image_size = 'big': input should be a valid integer"),
        ("zero_optimization.stage=two", "zero_optimization.stage"),
        ("zero_optimization.reduce_bucket_size=large", "zero_optimization.reduce_bucket_size"),
        ("train_micro_batch_size_per_gpu=3", "batch equation broken"),
        ("mpl_scale.model.teacher.name=resnet5O", "mpl_scale.model.teacher.name = 'resnet5O' is unknown; did you mean"),
        ("mpl_scale.model.student.kwargs.depth=3", "mpl_scale.model.student.kwargs: digits_cnn cannot be built with"),
        ("mpl_scale.model.student.drop_path=0.1", "mpl_scale.model.student.drop_path = 0.1"),
        ("mpl_scale.model.num_classes=7", "mpl_scale.model.num_classes = 7, but the data set has 10 classes"),
        ("mpl_scale.data.source=digit", "mpl_scale.data.source = 'digit' is unknown; did you mean digits"),
        ("mpl_scale.data.strong.ops=['rotat']", "mpl_scale.data.strong.ops"),
        ('mpl_scale.data.strong.ops=["rotat"]', "mpl_scale.data.strong.ops = 'rotat' is unknown; did you mean rotate"),
        ("mpl_scale.data.labelled_per_class=500", "mpl_scale.data.labelled_per_class = 500, but class"),
        ("mpl_scale.data.weak.kind=shift", "mpl_scale.data.weak.kind = 'shift' is unknown; did you mean shift_crop"),
        ("mpl_scale.data.evaluation.kind=centre_crop", "evaluation.kind = 'centre_crop' is unknown; did you mean"),
        ("mpl_scale.method.name=mlp", "mpl_scale.method.name = 'mlp' is unknown; did you mean mpl"),
        ("mpl_scale.method.feedback.rule=cosin", "mpl_scale.method.feedback.rule = 'cosin' is unknown; did you mean"),
        ("mpl_scale.data.split=../x", "mpl_scale.data.split = '../x' is unknown; known: all_labelled"),
        (
            "mpl_scale.model.teacher.name=hf_hub:timm/resnet18.a1",
            "a model of a hub: give the architecture's name, as",
        ),
        ("mpl_scale.model.student.name=../x", "mpl_scale.model.student.name = '../x' is a path or a model of a hub"),
        ("include=", "--set include=: include is read in files alone; write it in "),
        ("mpl_scale.seed=" + 5000 * "9", "--set mpl_scale.seed=99999999999999999999...: a whole number has thousands"),
        ("mpl_scale.optim.student.name=sdg", "mpl_scale.optim.student.name = 'sdg' is unknown; did you mean sgd"),
    ],
)
def test_wrong_setting(tmp_path: Path, capfd: pytest.CaptureFixture[str], override: str, message: str) -> None:
    assert message in error_line(capfd, arguments(tmp_path, override))
    assert not (tmp_path / "out").exists()


def test_numbers_of_thousands_of_digits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Beyond what Python reads; in every file that a user writes."""
    number = 5000 * "9"
    config, spec = tmp_path / "long.json", tmp_path / "spec.json"
    config.write_text(f'{{"train_batch_size": {number}}}')
    spec.write_text(f'{{"ds_config": "run.json", "trials": {number}}}')
    assert f"{config}: a whole number has thousands" in error_line(capfd, ["check", "--ds_config", str(config)])
    assert f"{spec}: cannot be read" in error_line(capfd, ["sweep", str(spec), "--output", str(tmp_path / "out")])
    for option in ("--seed", "--world"):
        with pytest.raises(SystemExit, match="2"):
            main(["check", "--ds_config", str(config), option, number])
        assert f"argument {option}: 99999999999999999999... is no whole number" in capfd.readouterr().err


def test_a_summary_that_is_cut_short(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [*arguments(tmp_path), "--max_steps", "1"]
    assert main(command) == 0
    capfd.readouterr()
    summary = tmp_path / "out" / "summary.json"
    summary.write_text(summary.read_text()[:100])
    for again in (command, ["report", str(tmp_path / "out"), "--output", str(tmp_path / "report.html")]):
        assert f"{summary}: cannot be read as JSON" in error_line(capfd, again)


def test_missing_data_set(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "absent"
    command = arguments(tmp_path, "mpl_scale.data.source=folder", f"mpl_scale.data.root={root}")
    assert str(root) in error_line(capfd, command)


def test_unreadable_image(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = load_images(DataConfig(source="digits"))
    root = tmp_path / "images"
    shutil.copytree(Path(str(images.paths[0])).parents[1], root)
    victim = sorted(root.glob("3/*.png"))[5]
    victim.write_bytes(victim.read_bytes()[:40])
    settings = ("mpl_scale.data.source=folder", f"mpl_scale.data.root={root}", "mpl_scale.data.max_bad_fraction=0.0005")
    line = error_line(capfd, arguments(tmp_path, *settings))  # one of 1,797 is 0.00056
    assert str(victim) in line


def test_more_ranks_than_images(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "80")
    monkeypatch.setenv("RANK", "0")
    line = error_line(capfd, arguments(tmp_path, "train_batch_size=80"))
    assert "40 labelled images for 80 data ranks" in line


def test_output_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    assert "--output" in error_line(capfd, arguments(tmp_path))
    assert (tmp_path / "out").read_text() == "a file"


def test_the_launched_script_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    script = DIGITS.parents[1] / "train.py"
    command = [sys.executable, str(script), "--ds_config", write(tmp_path, tiny()), "--set", "train_batch_sise=4"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ}, check=False)
    assert ended.returncode == 2
    assert 'unknown key "train_batch_sise"; did you mean train_batch_size' in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_error_while_training_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that has a good header and a good end, and pixels that cannot be decoded: found while training."""
    images = load_images(DataConfig(source="digits"))
    root = tmp_path / "images"
    shutil.copytree(Path(str(images.paths[0])).parents[1], root)
    for victim in sorted(root.glob("*/*.png"))[::3]:
        encoded = bytearray(victim.read_bytes())
        start = encoded.index(b"IDAT") + 6
        encoded[start : start + 20] = b"\xff" * 20
        victim.write_bytes(encoded)
    command = arguments(
        tmp_path, "mpl_scale.data.source=folder", f"mpl_scale.data.root={root}", "mpl_scale.parallel.engine=flat"
    )
    assert main(command) == 2
    line = capfd.readouterr().err.splitlines()[-1]  # libpng has its say before
    assert line.startswith("mpl-scale: error: ")  # of one rank
    assert "delete or replace each" in line


def test_a_width_that_leaves_ranks_without_columns(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allowed by default; 8 pixels over 8 ranks are 4 columns behind the first stride."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    overrides = ("mpl_scale.parallel.width=8", "mpl_scale.parallel.switch_at=never", "mpl_scale.parallel.engine=flat")
    line = error_line(capfd, arguments(tmp_path, *overrides, "mpl_scale.parallel.empty_slices=false"))
    assert "mpl_scale.parallel.width = 8 cannot split mpl_scale.model.teacher.name = digits_cnn" in line
    assert "4 columns leave some rank without one" in line


def test_a_run_over_every_kind_of_bad_file_ends(tmp_path: Path) -> None:
    """Every bad kind once in each of two classes: refused at the start or met while training, each counted once."""
    root, bad = tmp_path / "images", set()
    for label in range(2):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(40):
            (folder / f"good{index:02d}.png").write_bytes(encoded(photograph(40 * label + index, 8, 8)))
        for kind, make in GOOD.items():
            (folder / f"unusual_{kind}").write_bytes(make())
        for kind in [*BAD, *NO_FILE]:
            path = folder / kind
            if kind in BAD:
                path.write_bytes(BAD[kind][0]())
            else:
                NO_FILE[kind](path)
            if kind not in ("missing.jpg", "folder.jpg"):  # one is not there, the other a folder without images
                bad.add(str(path))
    source = ("mpl_scale.data.source=folder", f"mpl_scale.data.root={root}", "mpl_scale.data.max_bad_fraction=0.9")
    settings = ("mpl_scale.model.num_classes=2", "mpl_scale.data.weak.pad=0", "mpl_scale.parallel.engine=flat")
    assert main(arguments(tmp_path, *source, *settings, "mpl_scale.phases.train.steps=12")) == 0
    images = load_images(DataConfig(source="folder", root=str(root), max_bad_fraction=0.9))
    refused = {images.name(int(sample)) for sample in images.refused}
    lines = (tmp_path / "out" / "quarantine-rank0.jsonl").read_text().splitlines()
    met = [json.loads(line)["name"] for line in lines]
    assert len(met) == len(set(met))
    assert refused.isdisjoint(met)
    assert refused | set(met) == bad
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["results"]["finetuned"]["images"] > 20


def test_a_run_over_a_few_bad_images_ends(tmp_path: Path) -> None:
    """Pixels that cannot be decoded, behind good headers: counted, listed, and the results are written."""
    images = load_images(DataConfig(source="digits"))
    root = tmp_path / "images"
    shutil.copytree(Path(str(images.paths[0])).parents[1], root)
    victims = sorted(root.glob("*/*.png"))[::250]
    for victim in victims:
        encoded = bytearray(victim.read_bytes())
        start = encoded.index(b"IDAT") + 6
        encoded[start : start + 20] = b"\xff" * 20
        victim.write_bytes(encoded)
    command = arguments(
        tmp_path,
        "mpl_scale.data.source=folder",
        f"mpl_scale.data.root={root}",
        "mpl_scale.parallel.engine=flat",
        "mpl_scale.phases.train.steps=40",
    )
    assert main(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine-rank0.jsonl").read_text().splitlines()]
    names = [line["name"] for line in lines]
    assert sorted(names) == sorted(set(names))
    assert set(names) <= set(map(str, victims))
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    counts = [line["bad_images"] for line in metrics if "bad_images" in line]
    assert counts == sorted(counts)
    assert 0 < counts[-1] <= len(names)  # the last evaluation may have met one more
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    held_out = len(
        make_splits(load_images(DataConfig(source="folder", root=str(root))), config=DataConfig(), seed=0).test
    )
    assert held_out - len(victims) <= summary["results"]["student"]["images"] <= held_out


def missing(name: str) -> Path:
    return Path("/proc/no_process") / name  # root may write everywhere, but not here


def test_an_output_that_cannot_be_made_is_refused_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By every command, before it reads what it works on."""
    spec, nothing = DIGITS.parent / "sweeps" / "digits.json", str(tmp_path / "nothing")
    for command in (
        ["train", "--ds_config", str(DIGITS), "--output", str(missing("run"))],
        ["export", nothing, "--output", str(missing("folder"))],
        ["index", nothing, "--source", "folder", "--output", str(missing("index"))],
        ["select", "--index", nothing, "--output", str(missing("index")), "--per_class", "3", "--checkpoint", nothing],
        ["sweep", str(spec), "--output", str(missing("sweep"))],
        ["report", nothing, "--output", str(missing("report.html"))],
    ):
        assert "nothing can be written to /proc" in error_line(capfd, command), command
    (tmp_path / "file").write_text("mine")
    command = ["export", nothing, "--output", str(tmp_path / "file")]
    assert f"{tmp_path / 'file'} is a file; name a folder" in error_line(capfd, command)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_is_a_link_to_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert f"{tmp_path / 'out'} is a link to nothing; remove the link" in error_line(capfd, arguments(tmp_path))
    command = ["export", "nothing", "--output", str(tmp_path / "out" / "below")]
    assert f"{tmp_path / 'out'} is a link to nothing" in error_line(capfd, command)


@pytest.mark.parametrize(
    ("folder", "message"),
    [("/proc/x", r"the digits cannot be written to '/proc/x/digits'"), ("~nobody_here/x", "no home folder is known")],
)
def test_a_folder_of_data_that_cannot_be(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str, message: str
) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", folder)
    assert message in error_line(capfd, arguments(tmp_path))
    monkeypatch.delenv("MPL_SCALE_DATA")
    command = arguments(tmp_path, "mpl_scale.data.source=folder", f"mpl_scale.data.root={folder}")
    assert folder in error_line(capfd, command)


@pytest.mark.parametrize("name", ["checkpoints", "splits", "metrics.jsonl", "summary.json", "config.json"])
def test_what_stands_in_the_place_of_a_runs_files(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """It is refused before anything of the run that was there is touched."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "DONE").touch()
    if "." in name:
        (output / name).mkdir()
    else:
        (output / name).touch()
    assert f"{output / name} is a " in error_line(capfd, arguments(tmp_path))
    assert sorted(path.name for path in output.iterdir()) == sorted(["DONE", name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Auto", "did you mean auto"),
        ("newer", "did you mean never"),
        ("/nowhere/step_1", "no checkpoint there"),
    ],
)
def test_resume_is_judged_before_the_data_are_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    where = ["--set", "mpl_scale.data.source=folder", "--set", f"mpl_scale.data.root={tmp_path / 'nothing'}"]
    line = error_line(capfd, [*arguments(tmp_path), *where, "--resume", given])
    assert f"--resume {given}: no checkpoint there" in line
    assert message in line
