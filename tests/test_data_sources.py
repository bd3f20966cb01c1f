"""Sources read what is there, and say which file is wrong, why, and what to do."""

from __future__ import annotations

import multiprocessing
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images, register_source
from mpl_scale.data.encoded.probe import probe_file
from tests.support.image_sets import write_folder


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG"])
def test_folder(tmp_path: Path, suffix: str) -> None:
    root = write_folder(tmp_path / "root", suffix=suffix)
    (root / "class0" / "notes.txt").write_text("not an image, and not listed")
    (root / "class0" / "._0.png").write_text("macOS leaves such files")
    (root / ".cache").mkdir()
    images = load_images(DataConfig(source="folder", root=str(root)))
    assert images.classes == ("class0", "class1")
    assert images.paths.tolist() == [f"{root}/class{label}/{index}{suffix}" for label in (0, 1) for index in range(3)]
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.sizes.tolist() == [[8, 9]] * 6


def test_digits_files_hold_the_values_of_scikit_learn(tmp_path: Path) -> None:
    images = load_images(DataConfig(root=str(tmp_path / "digits")))
    pixels, labels = load_digits(return_X_y=True)
    assert images.classes == tuple("0123456789")
    indices = [int(Path(path).stem) for path in images.paths]
    assert sorted(indices) == list(range(1797))
    assert np.array_equal(images.labels, labels[indices])
    for path, index in list(zip(images.paths, indices, strict=True))[::100]:
        assert np.array_equal(np.asarray(Image.open(path)), np.round(pixels[index].reshape(8, 8) * 255 / 16))


def test_digits_default_root_and_leftovers_of_a_killed_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path))
    leftover = tmp_path / ".digits-killed" / "0"
    leftover.mkdir(parents=True)
    (leftover / "0000.png").write_bytes(b"")
    images = load_images(DataConfig())
    assert images.paths[0].startswith(f"{tmp_path}/digits/0/")
    written = Path(images.paths[0]).stat().st_mtime_ns
    assert Path(load_images(DataConfig()).paths[0]).stat().st_mtime_ns == written  # the second time only reads


def _load_digits(root: str, start: object, results: object) -> None:
    start.wait()
    results.put(len(load_images(DataConfig(root=root))))


def test_processes_may_write_the_digits_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    start, results = context.Barrier(3), context.Queue()
    root = str(tmp_path / "digits")
    workers = [context.Process(target=_load_digits, args=(root, start, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [1797] * 3
    for worker in workers:
        worker.join()
    assert os.listdir(tmp_path) == ["digits"]


def test_digits_refuse_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"mpl_scale\.data\.root = .*/mine' holds 6 images in 2 classes, not the"):
        load_images(DataConfig(root=str(root)))


BAD_FILES = {
    "truncated": (lambda good: good[:-30], "truncated: its end marker is missing"),
    "cut in its header": (lambda good: good[:20], "truncated: a PNG file without a complete header"),
    "text": (lambda good: b"hello, I am no image\n" * 20, "neither a PNG nor a JPEG file"),
    "empty": (lambda good: b"", "the file is empty"),
    "huge": (lambda good: good[:16] + struct.pack(">II", 90000, 90000) + good[24:], "90000 x 90000 pixels is outside"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_with_the_reason_and_the_fix(tmp_path: Path, kind: str) -> None:
    spoil, reason = BAD_FILES[kind]
    root = write_folder(tmp_path / "root")
    path = root / "class1" / "1.png"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"1 unreadable image.*delete or replace") as caught:
        load_images(DataConfig(source="folder", root=str(root)))
    assert f"{path}: {reason}" in str(caught.value)


def test_truncated_jpeg_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", suffix=".jpg", side=64)
    path = root / "class0" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"class0/0\.jpg: truncated"):
        load_images(DataConfig(source="folder", root=str(root)))


def test_jpeg_with_long_metadata(tmp_path: Path) -> None:
    path = tmp_path / "long.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    good = path.read_bytes()
    comment = b"\xff\xfe" + struct.pack(">H", 60000) + b"x" * 59998
    path.write_bytes(good[:2] + 3 * comment + good[2:])
    assert probe_file(str(path)).stored == (300, 500)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (None, r"mpl_scale\.data\.root = null"),
        ("missing", r"mpl_scale\.data\.root = .*missing' is no folder; give the one"),
        ("empty", r"mpl_scale\.data\.root = .*empty' holds 0 class folders; put the images in root/<class>/<image>"),
        ("hollow", r"class folder .*hollow/b' holds no \.png"),
    ],
)
def test_folder_errors(tmp_path: Path, root: str | None, message: str) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "hollow", classes=1)
    (tmp_path / "hollow" / "b").mkdir()
    with pytest.raises(ValueError, match=message):
        load_images(DataConfig(source="folder", root=None if root is None else str(tmp_path / root)))


def test_unknown_source_suggests_the_closest() -> None:
    with pytest.raises(ValueError, match=r"mpl_scale\.data\.source = 'digit' is unknown; did you mean digits\?"):
        load_images(DataConfig(source="digit"))


def test_duplicate_source_is_refused() -> None:
    with pytest.raises(ValueError, match="'digits' is registered twice"):
        register_source("digits")(lambda root: None)
