"""Networks of grey images, model.in_chans = 1: the views, the layers, a whole run, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpl_scale.config import RunConfig, check, load_config
from mpl_scale.config.schema import DataConfig, StrongConfig
from mpl_scale.data import load_images, make_splits
from mpl_scale.data.decode.pipeline import grey_of
from mpl_scale.trainer.preflight import check_models
from tests.support import mini_imagenet as mini
from tests.support.batches import data_rank, take, train_loader
from tests.support.channels import from_arrays_to_timm
from tests.support.configs import tiny, write

GREY = {"mean": [0.5], "std": [0.25]}


def config_of(folder: Path, root: Path, **model: Any) -> RunConfig:
    raw = tiny(train_batch_size=6)
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["model"] |= {"in_chans": 1, "num_classes": 6, "image_size": 32, **model}
    section["data"] |= {"source": "arrays", "root": str(root), "test_fraction": 0.25, **GREY}
    return load_config(write(folder, raw))


@pytest.fixture
def arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """uint8 [48, 32, 32], and labels."""
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))
    pictures, labels = mini.pictures()
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "images.npy", pictures[..., 1])
    np.save(tmp_path / "arrays" / "labels.npy", labels)
    return tmp_path / "arrays"


def test_grey_is_that_of_pil_and_grey_images_stay() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 50, 60), dtype=np.uint8))
    for images in (pixels, pixels.to(memory_format=torch.channels_last)):
        found = grey_of(images)
        assert found.stride() == images.stride()
        for image, one in zip(images, found, strict=True):
            expected = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
            assert all(np.array_equal(channel, expected) for channel in one.numpy())
        assert torch.equal(grey_of(found), found)


@pytest.mark.parametrize("shape", [(48, 32, 32), (48, 32, 32, 1)], ids=str)
def test_grey_arrays_are_read_as_they_are(arrays: Path, shape: tuple[int, ...]) -> None:
    pixels = np.load(arrays / "images.npy").reshape(shape)
    np.save(arrays / "images.npy", pixels)
    images = load_images(DataConfig(source="arrays", root=str(arrays)))
    for sample in range(0, len(images), 5):
        read = images.read(sample)[-3 * 32 * 32 :].reshape(32, 32, 3)
        assert (read == pixels[sample].reshape(32, 32, 1)).all()


def test_a_batch_is_one_channel_of_the_batch_of_three(arrays: Path) -> None:
    """Of grey images; weak, strong and labelled views as a network is given them."""
    given: dict[str, Any] = {
        "source": "arrays",
        "root": str(arrays),
        "weak": {"pad": 3, "fill": 9},
        "strong": StrongConfig(op_set="no_pairing", num_ops=3, cutout=5),
    }
    three = DataConfig(**given, mean=(0.5,) * 3, std=(0.25,) * 3)
    one = DataConfig(**given, mean=(0.5,), std=(0.25,))
    splits = make_splits(load_images(one), config=one, seed=0)
    expected, found = (take(train_loader(config, splits, data_rank()), 3) for config in (three, one))
    for batch, grey in zip(expected, found, strict=True):
        for view in ("labelled", "weak", "strong"):
            inputs, own = batch.normalise(getattr(batch, view)), grey.normalise(getattr(grey, view))
            assert own.shape == (len(inputs), 1, *inputs.shape[2:])
            assert torch.equal(own.expand_as(inputs), inputs)


def test_colour_files_are_seen_in_grey(tmp_path: Path) -> None:
    mini.write_folder(tmp_path)
    config = DataConfig(source="folder", root=str(tmp_path), mean=(0.0,), std=(1.0,))
    splits = make_splits(load_images(config), config=config, seed=0)
    (batch,) = take(train_loader(config, splits, data_rank(), image_size=32), 1)
    seen = batch.normalise(batch.weak)
    known = {np.asarray(Image.open(path).convert("L")).tobytes() for path in tmp_path.rglob("*.png")}
    assert {np.round(255 * image[0].numpy()).astype(np.uint8).tobytes() for image in seen} <= known


@pytest.mark.parametrize("name", ["digits_cnn", "wide_resnet28_2", "resnet10t", "test_efficientnet"])
@pytest.mark.parametrize("width", [1, 2])
def test_networks_take_one_channel_on_any_width(arrays: Path, tmp_path: Path, name: str, width: int) -> None:
    network = {"name": name}
    run = config_of(tmp_path, arrays, teacher=network, student=network)
    overrides = [f"mpl_scale.parallel.width={width}", "mpl_scale.parallel.switch_at=never"]
    check_models(load_config(run.path, overrides=overrides if width > 1 else []))


def test_a_grey_run_from_arrays_to_timm(arrays: Path, tmp_path: Path) -> None:
    network = {"name": "test_efficientnet"}
    from_arrays_to_timm(config_of(tmp_path, arrays, teacher=network, student=network), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mpl_scale.model.in_chans=3"], r"data\.mean = \[0\.5\] with mpl_scale\.model\.in_chans = 3: give 3 values"),
        (["mpl_scale.data.std=[1,1,1]"], r"data\.std = \[1\.0, 1\.0, 1\.0\] with .*in_chans = 1: give 1 value$"),
        (["mpl_scale.model.in_chans=0"], r"mpl_scale\.model\.in_chans = 0: input should be greater than or equal to 1"),
        (['mpl_scale.model.student.kwargs={"in_chans":1}'], r"in_chans = 1: set mpl_scale\.model\.in_chans, for both"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    arrays: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    path = config_of(tmp_path, arrays).path
    with pytest.raises(ValueError, match=message):
        check(load_config(path, overrides=overrides), world=1, cuda=False)
