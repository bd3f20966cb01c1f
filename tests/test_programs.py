"""`mpl-scale export --format torch_export|onnx`: programs that give the network's logits, or nothing is written."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpl_scale.checkpoint.export import FILES, export
from mpl_scale.cli.main import main
from mpl_scale.models.registry import register_model
from tests.support.exported import MODELS, built, checkpoint_of
from tests.support.faults import no_file_above
from tests.support.tiers import full

VIT = {"name": "test_vit", "kwargs": {"img_size": 32, "patch_size": 8}}
CASES = [
    ("torch_export", MODELS[0]),
    full("torch_export", VIT),
    ("onnx", {"name": "digits_cnn"}),
    full("onnx", MODELS[1]),
    full("onnx", VIT),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
@pytest.mark.parametrize(("format", "network"), CASES)
def test_the_lines_of_the_card_give_the_logits_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, network: dict[str, Any]
) -> None:
    checkpoint, config = checkpoint_of(tmp_path, **network)
    command = ["export", str(checkpoint), "--format", format, "--output", str(tmp_path / "out")]
    assert main(command) == 0
    written = contents(tmp_path / "out")
    assert written.keys() == {FILES[format], "config.json", "README.md"}
    for content in written.values():  # no path of this machine
        assert str(tmp_path).encode() not in content
        assert str(Path(torch.__file__).parents[1]).encode() not in content
    monkeypatch.chdir(tmp_path / "out")
    (lines,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)

    ours = built(config, checkpoint)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        scope: dict[str, Any] = {"images": images if format == "torch_export" else images.numpy()}
        exec(lines, scope)
        expected = ours(images)
        assert expected.std() > 1e-3  # or a program that ignores the weights would pass
        difference = (torch.as_tensor(scope["logits"]) - expected).abs().max()
        assert difference <= 1e-4 * expected.abs().max()  # batch norms are folded into convolutions


def test_a_folder_keeps_its_network_and_its_format_until_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for number, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        checkpoint_of(tmp_path / name, long=bool(number), name="digits_cnn")
    command = ["export", str(tmp_path / "first"), "--format", "torch_export", "--output", str(out)]
    assert main(command) == 0
    before = contents(out)
    assert main(command) == 0  # the same once more
    command[1] = str(tmp_path / "second")
    assert main(command) == 2
    assert "holds another network (model.pt2); give --overwrite" in capfd.readouterr().err
    command[3] = "timm"
    assert main(command) == 2
    assert "holds another network (model.pt2)" in capfd.readouterr().err  # another format is seen before the work
    assert contents(out) == before
    assert main([*command, "--overwrite"]) == 0
    assert contents(out).keys() == {"model.safetensors", "config.json", "README.md"}


@pytest.mark.parametrize("format", ["timm", "torch_export", full("onnx")])
def test_a_full_disk_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], format: str) -> None:
    checkpoint_of(tmp_path, name="digits_cnn")
    out = tmp_path / "out"
    with no_file_above(3000):
        assert main(["export", str(tmp_path), "--format", format, "--output", str(out)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "None" not in line
    assert f"{out / '.export'}" in line
    assert contents(out) == {}


class _Otherwise(nn.Module):
    """A classifier that decides by its input's values, or that is another one while it is exported."""

    def __init__(self, num_classes: int, *, decides: bool) -> None:
        super().__init__()
        self.decides, self.classifier = decides, nn.Linear(3, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(images.mean((2, 3)))
        if self.decides:
            return logits if images.sum() > 0 else -logits
        return 1.01 * logits if torch.compiler.is_exporting() else logits


register_model("test_programs_otherwise")(_Otherwise)


@pytest.mark.parametrize(
    ("decides", "message"),
    [
        (True, r"--format torch_export: the model cannot be exported \(\w+: .*\); use --format timm$"),
        (False, r"the program's logits differ from the network's by 1.0e-02 of the largest one"),
    ],
)
def test_a_program_that_is_not_the_network_is_not_written(tmp_path: Path, decides: bool, message: str) -> None:
    checkpoint, _ = checkpoint_of(tmp_path, name="test_programs_otherwise", kwargs={"decides": decides})
    with pytest.raises(ValueError, match=message) as caught:
        export(checkpoint, tmp_path / "out", network="student", format="torch_export")
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == {}


def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint_of(tmp_path, name="digits_cnn")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(tmp_path), "--format", "onnx", "--output", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--format onnx needs a package: onnxscript is not installed: " in line
    assert "pip install 'mpl-scale[onnx]'" in line
    assert not (tmp_path / "out").exists()
