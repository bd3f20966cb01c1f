"""Images of neither 1 nor 3 channels, arrays [N, H, W, C]: each channel is seen as one of an RGB image is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpl_scale.augment import StrongView
from mpl_scale.augment.registry import OF_ANY_CHANNELS
from mpl_scale.cli.main import main
from mpl_scale.config import RunConfig, load_config
from mpl_scale.config.schema import DataConfig, StrongConfig
from mpl_scale.trainer.prepare import Options, train
from tests.support import mini_imagenet as mini
from tests.support.batches import data_rank, splits_of, take, train_loader
from tests.support.channels import from_arrays_to_timm
from tests.support.configs import tiny, write

OPERATIONS = ["rotate", "shear_x", "translate_y", "cutout", "posterize"]


def write_arrays(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> str:
    folder.mkdir()
    np.save(folder / "images.npy", pixels)
    np.save(folder / "labels.npy", labels)
    return str(folder)


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arrays of 6 channels, and of its first three and last three."""
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))
    pictures, labels = mini.pictures()
    pixels = np.concatenate([pictures, np.roll(255 - pictures, 5, axis=1)], axis=3)
    parts = {"six": pixels, "first": pixels[..., :3].copy(), "last": pixels[..., 3:].copy()}
    return [write_arrays(tmp_path / name, part, labels) for name, part in parts.items()]


@pytest.mark.parametrize(
    ("weak", "resident"),
    [
        ({"kind": "shift_crop", "pad": 3, "fill": 9}, "on"),
        ({"kind": "shift_crop", "pad": 3, "fill": 9}, "off"),
        ({"kind": "random_resized_crop"}, "off"),
    ],
)
@pytest.mark.parametrize("size", [32, 24])
def test_a_batch_of_six_channels_is_two_of_three(
    roots: list[str], weak: dict[str, Any], resident: str, size: int
) -> None:
    batches = []
    for root, channels in zip(roots, (6, 3, 3), strict=True):
        config = DataConfig(
            source="arrays",
            root=root,
            weak=weak,
            resident=resident,
            strong=StrongConfig(ops=OPERATIONS, num_ops=3, cutout=5),
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
        )
        view = StrongView(config.strong, seed=0, stream=1)
        batches.append(take(train_loader(config, splits_of(config), data_rank(), image_size=size, strong_view=view), 3))
    for six, *threes in zip(*batches, strict=True):
        for name in ("labelled", "weak", "strong"):
            found = six.normalise(getattr(six, name))
            assert torch.equal(found, torch.cat([part.normalise(getattr(part, name)) for part in threes], dim=1))
            assert found.shape[1:] == (6, size, size)


@pytest.mark.parametrize("name", OF_ANY_CHANNELS)
@pytest.mark.parametrize("side", [17, 130])
def test_operations_of_any_channels_treat_each_alike(name: str, side: int) -> None:
    """On small images in a batch, on large ones one by one, and in the form of fixed shapes, which GPUs run."""
    config = StrongConfig(ops=[name], num_ops=2, cutout=5)
    view = StrongView(config, seed=3, stream=1, candidates=np.arange(9))
    ids, epochs = np.arange(12), np.zeros(12, np.int64)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 6, side, side), dtype=np.uint8))
    pairs, parameters = images.flip(0), view.parameters(ids, epochs, size=(side, side), device=images.device)
    expected = torch.cat(
        [view(part, ids, epochs, pair) for part, pair in zip(images.split(3, 1), pairs.split(3, 1), strict=True)], 1
    )
    assert not torch.equal(expected, images)
    assert torch.equal(view(images, ids, epochs, pairs), expected)
    assert view.static is not None
    assert torch.equal(view.static(images, parameters, pairs), expected)


def config_of(folder: Path, root: str, **data: Any) -> RunConfig:
    raw = tiny(train_batch_size=6)
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["model"] |= {"in_chans": 6, "num_classes": 6, "image_size": 32}
    section["model"] |= {"teacher": {"name": "test_efficientnet"}, "student": {"name": "test_efficientnet"}}
    section["data"] |= {"source": "arrays", "root": root, "test_fraction": 0.25, "mean": [0.5] * 6, "std": [0.25] * 6}
    section["data"] |= {"strong": {"ops": OPERATIONS}, **data}
    return load_config(write(folder, raw))


def test_a_run_from_arrays_to_timm(roots: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from_arrays_to_timm(config_of(tmp_path, roots[0]), tmp_path)
    assert main(["predict", str(tmp_path / "run"), roots[0], "--output", str(tmp_path / "predictions.csv")]) == 2
    assert "image files have 1 or 3 channels; mpl-scale evaluate --data takes arrays" in capfd.readouterr().err
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "6-channel images of 32 x 32" in card
    assert "PIL" not in card
    assert "create_transform" not in card


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"strong": {"op_set": "no_pairing"}}, r"strong draws autocontrast, color, .*in_chans = 6; set strong.ops to"),
        ({"strong": {"preset": "autoaugment"}}, r"data\.strong draws .*equalize.*set strong.ops to some of rotate"),
        ({"weak": {}}, r"in_chans = 6 takes source arrays, uint8 \[N, H, W, 6\], and this is an image of 1 or 3"),
        ({"source": "synthetic"}, r"model\.in_chans = 6 takes source arrays"),
    ],
)
def test_what_has_no_such_channels_is_refused(
    roots: list[str], tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    root = roots["weak" in data]  # of three channels
    with pytest.raises(ValueError, match=message):
        train(config_of(tmp_path, root, **data), Options(tmp_path / "out"))


def test_networks_of_other_channels_are_told_what_to_set(roots: list[str], tmp_path: Path) -> None:
    raw = json.loads(config_of(tmp_path, roots[0], mean=[0.5] * 3, std=[0.25] * 3).path.read_text())
    raw["mpl_scale"]["model"]["in_chans"] = 3
    with pytest.raises(ValueError, match=r"pixels of 6 channels; set mpl_scale\.model\.in_chans = 6, and mean and std"):
        train(load_config(write(tmp_path, raw)), Options(tmp_path / "out"))
