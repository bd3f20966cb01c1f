"""MNIST's files: where they are found, what their classes are called, what is refused."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.format import FORMATS
from mpl_scale.data.index.reader import IndexedImages
from tests.support import mini_imagenet as mini

TRAIN, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))


def of_ten_classes(root: Path, names: str = "{part}-{kind}-ubyte") -> None:
    """The labels run to 9, as they do in MNIST."""
    mini.write_idx(root, names)
    labels = root / names.format(part="train", kind="labels-idx1")
    labels.write_bytes(struct.pack(">II", 0x801, 40) + bytes(range(10)) * 4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("root", "names", "third"),
    [
        ("fashion-mnist", "{part}-{kind}-ubyte", "Pullover"),
        ("data", "FashionMNIST/raw/{part}-{kind}-ubyte", "Pullover"),
        ("FashionMNIST", "raw/{part}-{kind}-ubyte", "Pullover"),
        ("data", "KMNIST/raw/{part}-{kind}-ubyte", "su"),
        ("MNIST", "{part}-{kind}-ubyte", "2"),
        ("data", "{part}-{kind}-ubyte", "class 2"),
    ],
)
def test_idx_files_are_found_and_their_classes_named(
    tmp_path: Path, root: str, names: str, third: str, packed: bool
) -> None:
    of_ten_classes(tmp_path / root, names)
    if packed:
        for path in list((tmp_path / root).rglob("*-ubyte")):
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    images = load_images(DataConfig(source="idx", root=str(tmp_path / root)))
    assert isinstance(images, IndexedImages)
    assert images.classes[2] == third
    assert len(images.classes) == 10
    assert images.ids_of("test").tolist() == list(range(40, 48))
    assert not any("not used" in line for line in images.contents())


def test_idx_pixels_are_those_of_pils_rgb(tmp_path: Path) -> None:
    mini.write_idx(tmp_path / "data")
    images = load_images(DataConfig(source="idx", root=str(tmp_path / "data")))
    grey = mini.pictures()[0][:, :, :, 0]
    for sample in (0, 47):
        *_, pixels = images.read(sample).tobytes().split(b"\n255\n", 1)
        assert pixels == Image.fromarray(grey[sample]).convert("RGB").tobytes()


def test_emnists_exchanged_rows_and_columns_are_put_right(tmp_path: Path) -> None:
    images, labels = mini.pictures()
    tall = images[:8, :20]  # 20 rows, 32 columns
    for kind, content in zip(
        ("images-idx3", "labels-idx1"), mini.idx(tall.swapaxes(1, 2), labels[:8] + 1), strict=True
    ):
        (tmp_path / f"emnist-letters-train-{kind}-ubyte").write_bytes(content)
    config = DataConfig(source="idx", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"labels start at 1, not at 0; .*label_offset = 1 "):
        load_images(config)
    build_index("idx", tmp_path, output=tmp_path / "index")
    found = IndexedImages(tmp_path / "index")
    assert found.sizes[0].tolist() == [20, 32]
    assert found.read(0)[-3 * 20 * 32 :: 3].tobytes() == tall[0, :, :, 0].tobytes()
    assert "".join(FORMATS["idx"].classes(tmp_path) or ()) == "abcdefghijklmnopqrstuvwxyz"


def test_several_sets_below_one_folder_are_named(tmp_path: Path) -> None:
    for name in ("MNIST", "KMNIST"):
        mini.write_idx(tmp_path / name / "raw")
    with pytest.raises(ValueError, match=r"holds 2 data sets, KMNIST/raw, MNIST/raw; name the folder of one"):
        load_images(DataConfig(source="idx", root=str(tmp_path)))


Edit = Callable[[bytes], bytes]
DAMAGED: dict[str, tuple[str, Edit, str]] = {
    "magic": (TRAIN, lambda good: b"PK\3\4" + good[4:], "it begins with 50 4b 03 04, not with 00 00 08 03"),
    "labels as images": (TRAIN, lambda good: b"\0\0\x08\x01" + good[4:], "it begins with 00 00 08 01, not with"),
    "cut": (TRAIN, lambda good: good[:-1], "the file ends before what its header says"),
    "cut in its header": (TRAIN, lambda good: good[:9], "the file ends before what its header says"),
    "longer": (TRAIN, lambda good: good + b"x", "the file holds more than its header says"),
    "huge count": (TRAIN, lambda good: good[:4] + b"\xff" * 4 + good[8:], r"its header says \[4294967295, 32, 32\]"),
    "huge images": (TRAIN, lambda good: good[:8] + b"\xff" * 8, "its header says"),
    "no pixels": (TRAIN, lambda good: good[:8] + bytes(8), "its header says"),
    "more images": (TRAIN, lambda good: good[:4] + struct.pack(">I", 41) + good[8:], f"'{TRAIN_LABELS}': 40 labels"),
    "labels cut": (TRAIN_LABELS, lambda good: good[:-1], f"'{TRAIN_LABELS}': the file ends before"),
    "labels longer": (TRAIN_LABELS, lambda good: good + b"\1", f"'{TRAIN_LABELS}': the file holds more than"),
    "labels of another kind": (TRAIN_LABELS, lambda good: good[1:], f"'{TRAIN_LABELS}': it begins with 00 08 01 00"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_idx_files_are_named(tmp_path: Path, kind: str) -> None:
    name, damage, reason = DAMAGED[kind]
    mini.write_idx(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{TRAIN}.*: the whole shard is lost: {reason}") as caught:
        load_images(DataConfig(source="idx", root=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda packed: packed[:-9], lambda packed: b"x" + packed], ids=["cut", "no gzip"])
def test_a_damaged_gz_is_named(tmp_path: Path, damage: Edit) -> None:
    mini.write_idx(tmp_path, packed=True)
    for name, where in ((TRAIN, ""), (TRAIN_LABELS, f"'{TRAIN_LABELS}.gz': ")):
        path = tmp_path / f"{name}.gz"
        good = path.read_bytes()
        path.write_bytes(damage(good))
        with pytest.raises(ValueError, match=rf"{TRAIN}\.gz.*the whole shard is lost: {where}it cannot be unpacked"):
            load_images(DataConfig(source="idx", root=str(tmp_path)))
        path.write_bytes(good)


def test_labels_of_idx_files_are_checked(tmp_path: Path) -> None:
    root = tmp_path / "mnist"
    of_ten_classes(root)
    labels = root / TRAIN_LABELS
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(ValueError, match=r"label 10 is above 9, the last class"):
        load_images(DataConfig(source="idx", root=str(root)))
    labels.unlink()
    with pytest.raises(ValueError, match=rf"there is no '{TRAIN_LABELS}', plain or \.gz"):
        load_images(DataConfig(source="idx", root=str(root)))
