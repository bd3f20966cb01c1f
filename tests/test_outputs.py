"""Commands never put their results among, or in place of, the files of a run or a checkpoint."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpl_scale.cli import main
from mpl_scale.cli.command import replace_missing_characters
from mpl_scale.config import check, load_config
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.files import create_array, refuse_run
from mpl_scale.monitor import format_table
from mpl_scale.sweep import Sweep, read_spec
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import DIGITS, tiny, write
from tests.support.faults import no_file_above
from tests.support.mini_imagenet import files, tar_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A config and the folder of its finished run."""
    folder = tmp_path_factory.mktemp("run")
    config = write(folder, tiny())
    train(load_config(config), Options(folder / "out", max_steps=2))
    return config, folder / "out"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_command_writes_over_a_run(run: tuple[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    config, out = run
    before = content(out)
    checkpoint = next((out / "checkpoints").glob("step_*"))
    for command in (
        ["export", str(out), "--output", str(out)],
        ["export", str(out), "--output", str(checkpoint)],
        ["distributions", "--ds_config", config, "--checkpoint", str(out), "--output", str(out / "summary.json")],
        ["report", str(out), "--output", str(out / "metrics.jsonl")],
        ["predict", str(out), str(out), "--output", str(out / "metrics.jsonl")],
        ["sweep", str(DIGITS.parent / "sweeps" / "digits.json"), "--output", str(out)],
        ["select", "--index", str(out), "--write_hashes", str(out / "summary.json")],
    ):
        assert main(command) == 2, command
        assert "holds a run or a checkpoint" in capfd.readouterr().err, command
    assert content(out) == before


@pytest.mark.parametrize(
    "option", ["--output o", "--top 3", "--seed 1", "--argmax_only", "--chunk 7", "--ds_config c", "--overwrite"]
)
def test_writing_hashes_refuses_what_it_does_not_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str
) -> None:
    command = ["select", "--index", str(tmp_path), "--write_hashes", str(tmp_path / "hashes.txt")]
    assert main([*command, *option.split()]) == 2
    assert f"{option.split()[0]} means nothing with --write_hashes" in capfd.readouterr().err


def test_a_file_of_its_own_beside_them_is_allowed(run: tuple[str, Path]) -> None:
    refuse_run(run[1] / "teacher.npy")
    refuse_run(run[1] / "exported")


def test_a_network_sees_images_as_it_was_trained_on(
    run: tuple[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, out = run
    command = ["distributions", "--ds_config", config, "--checkpoint", str(out), "--output", str(tmp_path / "d.npy")]
    for setting in ("data.mean=[0.9,0.9,0.9]", "data.std=[0.9,0.9,0.9]", "model.image_size=16", "model.bn_eps=0.5"):
        assert main([*command, "--set", f"mpl_scale.{setting}"]) == 2
        assert f"mpl_scale.{setting.partition('=')[0]} = " in capfd.readouterr().err
    assert not (tmp_path / "d.npy").exists()


def test_distributions_are_written_by_one_rank(
    run: tuple[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["distributions", "--ds_config", run[0], "--checkpoint", str(run[1]), "--output", str(tmp_path / "d.npy")]
    assert main(command) == 2
    assert "WORLD_SIZE = 2: one rank writes all of it" in capfd.readouterr().err


@pytest.mark.parametrize(
    "setting", ["mean=[127, 127, 127]", "std=[64, 64, 64]", "std=[1e-30, 1, 1]", "mean=[-2, 0, 0]"]
)
def test_means_of_pixels_on_another_scale(setting: str) -> None:
    with pytest.raises(ValueError, match="pixels are from 0 to 1 here"):
        check(load_config(DIGITS, overrides=[f"mpl_scale.data.{setting}"]), world=1, cuda=False)


def test_a_second_archive_behind_the_first_is_a_damaged_shard(tmp_path: Path) -> None:
    image = files()[0]
    archive = tar_of([("a.png", image), ("a.cls", b"0"), ("b.png", image), ("b.cls", b"1")])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-000.tar").write_bytes(archive + archive)
    build_index("webdataset", tmp_path / "data", output=tmp_path / "index")
    (lost,) = IndexedImages(tmp_path / "index").lost()
    assert "bytes behind its end marker, as of a second archive" in lost


def test_a_long_chain_of_includes(tmp_path: Path) -> None:
    for number in range(1200):
        (tmp_path / f"{number}.json").write_text(f'{{"include": "{number + 1}.json"}}')
    with pytest.raises(ValueError, match="more than 50 files include one another"):
        load_config(tmp_path / "0.json")


@pytest.mark.parametrize("setting", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "utf-8"}])
def test_characters_that_a_terminal_lacks_are_replaced(tmp_path: Path, setting: dict[str, str]) -> None:
    """In what a finished sweep says: the bytes of a folder's name that are no UTF-8."""
    raw = {**tiny(), "mpl_scale": {**tiny()["mpl_scale"], "phases": {"train": {"steps": 1}}}}
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    space = {"mpl_scale.optim.student.lr": {"uniform": [0.1, 0.2]}}
    spec = {"ds_config": write(tmp_path, raw), "space": space, "trials": 1}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = ["sweep", str(tmp_path / "spec.json"), "--output", str(folder / "out")]
    sweep = Sweep(read_spec(tmp_path / "spec.json"), folder / "out")
    sweep.prepare(sweep.trials)
    (sweep.trials[0].folder / "summary.json").write_text('{"results": {"student": {"top1": 50.0}}}')
    (sweep.trials[0].folder / "DONE").touch()
    done = subprocess.run(
        [sys.executable, "-m", "mpl_scale.cli", *map(os.fsencode, [*command, "--summary"])],
        env={**os.environ, **setting},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"/caf?/out" in done.stdout


def test_a_table_on_a_terminal_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    replace_missing_characters()
    rows = [{"method": "mpl", "top-1": value} for value in (1.0, 2.0)]
    print(format_table(rows, by=["method"], columns={"top-1": ".2f"}), flush=True)
    assert b"1.50 ? 0.71" in written.getvalue()


def test_a_full_disk_names_the_file(tmp_path: Path, run: tuple[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Of an index, of its parts, and of a report's pictures; a shard is not called damaged for it."""
    for folder, image in zip(("a", "b"), files(), strict=False):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for number in range(100):
            (tmp_path / "images" / folder / f"{number:04d}.png").write_bytes(image)
    index = ["index", str(tmp_path / "images"), "--source", "folder", "--workers", "1", "--output", str(tmp_path / "i")]
    pages = ["report", str(run[1]), "--output", str(tmp_path / "r.html")]
    for size, command, name in ((1000, index, r"i\.partial/\d+\.npy"), (1000, pages, r"r-[\w-]+\.png")):
        with no_file_above(size):
            assert main(command) == 2
        assert re.search(rf"File too large: '{tmp_path}/{name}'", capfd.readouterr().err)
    assert main(index) == 0


def test_a_new_array_takes_its_room_at_once(tmp_path: Path) -> None:
    with no_file_above(4096), pytest.raises(OSError, match=f"'{tmp_path / 'a.npy'}'"):
        create_array(tmp_path / "a.npy", dtype="<f4", shape=(2000,))
    assert create_array(tmp_path / "b.npy", dtype="<f4", shape=(20, 3)).sum() == 0
    taken = create_array(tmp_path / "c.npy", dtype="<i8", shape=(1 << 16,))
    assert os.stat(tmp_path / "c.npy").st_blocks * 512 >= taken.nbytes
