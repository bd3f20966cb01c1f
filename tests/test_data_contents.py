"""Data that changed under a run: their content is compared, not names, sizes and labels alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpl_scale.cli import main
from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images, make_splits
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.contents import WHOLE, digest_of_file
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.samples.further import with_unlabelled
from mpl_scale.data.samples.manifest import describe_splits, same_samples
from mpl_scale.trainer.preflight import record_splits
from tests.support import mini_imagenet as mini
from tests.support.image_sets import write_folder
from tests.support.labelled_sets import load, write


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def reversed_arrays(root: Path) -> None:
    np.save(root / "images.npy", np.load(root / "images.npy")[::-1].copy())


def exchanged_batches(root: Path) -> None:
    exchange(root / "data_batch_1.bin", root / "data_batch_2.bin")


@pytest.mark.parametrize(
    ("source", "write", "change"),
    [
        ("arrays", mini.write_arrays, reversed_arrays),
        ("cifar10", mini.write_cifar_binary, exchanged_batches),
    ],
)
def test_other_pixels_are_other_data(tmp_path: Path, source: str, write, change) -> None:  # type: ignore[no-untyped-def]
    """Labels and sizes are the same: only the bytes of the images have moved."""
    root = tmp_path / "data"
    write(root)
    before = load(root, source).fingerprint
    shutil.copytree(root, tmp_path / "copy")
    assert load(tmp_path / "copy", source).fingerprint == before
    change(root)
    os.utime(root / next(root.iterdir()).name)
    assert load(root, source).fingerprint != before


def test_a_folder_of_plain_pixels(tmp_path: Path) -> None:
    """A bitmap's last bytes may be the same in all: its middle is compared, too."""
    root = write_folder(tmp_path / "data", classes=2, images=9, suffix=".bmp", side=16)
    config = DataConfig(source="folder", root=str(root), labelled_per_class=1)

    def described() -> dict[str, object]:
        return describe_splits(make_splits(load_images(config), config=config, seed=0))

    before = described()
    assert same_samples(before, described())
    build_index("folder", root, output=tmp_path / "index")
    fingerprint = IndexedImages(tmp_path / "index").fingerprint
    path = root / "class1" / "4.bmp"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[4:12] = 255 - pixels[4:12]
    Image.fromarray(pixels).save(path)
    assert not same_samples(before, described())
    build_index("folder", root, output=tmp_path / "index")
    assert IndexedImages(tmp_path / "index").fingerprint != fingerprint


def test_a_large_file_is_sampled(tmp_path: Path) -> None:
    path = tmp_path / "large"
    content = np.random.default_rng(0).integers(0, 256, 2 * WHOLE, dtype=np.uint8)
    content.tofile(path)
    before = digest_of_file(path)
    for place in (0, len(content) - 1):
        changed = content.copy()
        changed[place] ^= 1
        changed.tofile(path)
        assert digest_of_file(path) != before
    content[:-1].tofile(path)
    assert digest_of_file(path) != before


def test_test_data_that_are_training_data_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    mini.write_cifar_binary(root)
    shutil.copy(root / "data_batch_1.bin", root / "test_batch.bin")
    with pytest.raises(ValueError, match=r"'test_batch\.bin' is 'data_batch_1\.bin' again, byte for byte"):
        load(root, "cifar10")


def test_a_shard_that_is_there_twice_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, said = write(tmp_path / "data", "webdataset", [0, 1] * 6), "'train.tar' is 'again.tar' again, byte for byte"
    shutil.copy(root / "train.tar", root / "again.tar")
    config = DataConfig(source="webdataset", root=str(root), labelled_per_class=1)
    splits = make_splits(load_images(config), config=config, seed=0)
    assert said in record_splits(splits, tmp_path / "run")  # what a run shows at its start
    for _ in range(2):  # built, and up to date
        assert main(["index", str(root), "--source", "webdataset", "--output", str(tmp_path / "index")]) == 0
        assert said in capsys.readouterr().out


def test_test_images_among_the_unlabelled_ones_are_said(tmp_path: Path) -> None:
    """An index of unlabelled images that has the test part's file, under another name."""
    root, other = write(tmp_path / "data", "webdataset", [0, 1] * 6, test=[1, 0] * 3), tmp_path / "other"
    other.mkdir()
    for number, name in enumerate(("test.tar", "train.tar")):
        shutil.copy(root / name, other / "more.tar")
        build_index("webdataset", other, output=tmp_path / f"index{number}")
        config = DataConfig(source="webdataset", root=str(root), labelled_per_class=1, split="test_files")
        splits = make_splits(load_images(config), config=config, seed=0)
        said = record_splits(with_unlabelled(splits, tmp_path / f"index{number}"), tmp_path / "run")
        assert any("'more.tar' of mpl_scale.data.unlabelled_index is 'test.tar' again" in line for line in said) == (
            number == 0
        )
