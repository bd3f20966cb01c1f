"""`mpl-scale partition`, and runs whose networks cannot be split: a table, a proof, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpl_scale.cli import main
from mpl_scale.config import load_config
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write


def test_the_table_of_the_papers_network_is_that_of_the_design(capsys: pytest.CaptureFixture[str]) -> None:
    """DESIGN 5: EfficientNet-L2 at 512 pixels over 16 ranks; 177 exchanges, 85 MB an image and rank (bf16)."""
    assert main(["partition", "--model", "tf_efficientnet_l2", "--size", "512", "--width", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:-1]}
    assert rows["conv_stem"].startswith("512->256 32->16 3/2 x1 0,1 1 ")
    assert rows["blocks.4"].startswith("32 2 5/1 x16 2,2 1 ")
    assert rows["blocks.5"].startswith("32->16 2->1 5/2 x1, 5/1 x21 2,2 2 ")
    assert lines[-1].startswith("total: 177 exchanges, 84595712 bytes per image")


def test_the_former_name_of_the_command_works_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "digits_cnn", "--size", "8", "--width", "2"]
    assert main(["partition", *options]) == main(["split", *options]) == 0
    printed = capsys.readouterr().out
    assert printed == 2 * printed[: len(printed) // 2]


@pytest.mark.parametrize("more", [["--switch_at", "auto"], pytest.param([], marks=pytest.mark.full)], ids=str)
def test_verify_proves_equality_on_local_ranks(capfd: pytest.CaptureFixture[str], more: list[str]) -> None:
    command = [
        "partition",
        "--model",
        "digits_cnn",
        "--size",
        "9",
        "--width",
        "2",
        "--classes",
        "10",
        "--verify",
        *more,
    ]
    assert main(command) == 0
    assert "partitioned over 2 ranks equals whole images in float64" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vit_tiny_patch16_224", "--size", "224", "--width", "2"], "patch_embed (timm.layers.patch_embed"),
        (["--model", "digits_cmn", "--size", "8", "--width", "2"], "--model.name = 'digits_cmn' is unknown"),
        (["--model", "digits_cnn", "--size", "4", "--width", "8"], "images have 4 columns; use at most 4"),
        (["--model", "digits_cnn", "--size", "8", "--width", "2", "--switch_at", "stage"], "switch_at = 'stage'"),
        (
            ["--model", "digits_cnn", "--size", "8", "--width", "1", "--verify"],
            "nothing is partitioned; use a width of 2",
        ),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_refusals_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["partition", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "mpl_scale.parallel.switch_at=stage",
            r"width = 2 cannot split mpl_scale.model.teacher.name = digits_cnn: swit",
        ),
        ("mpl_scale.model.student.name=vit_tiny_patch16_224", r"cannot split mpl_scale.model.student.*patch_embed"),
    ],
)
def test_a_run_is_refused_before_its_ranks_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    """The second rank does not exist: a run that tried to join it would hang."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat", "width": 2}
    if "vit" in override:
        raw["mpl_scale"]["model"]["image_size"] = 224
        raw["mpl_scale"]["model"]["student"] = {"name": "digits_cnn"}
    with pytest.raises(ValueError, match=message):
        train(load_config(write(tmp_path, raw), overrides=[override]), Options(tmp_path / "out"))
