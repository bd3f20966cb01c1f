"""What a data set holds is read, or counted and named; parts are told by exact names only."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpl_scale.cli import main
from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images, make_splits
from mpl_scale.data.index.build import build_index, why_not_current
from mpl_scale.data.index.format import ScanOptions
from mpl_scale.data.index.parts import PARTS, doubtful, part_of
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.trainer.preflight import record_splits
from tests.support import mini_imagenet as mini
from tests.support.photographs import encoded, photograph

OTHER_FORMATS = {
    "webp": "WEBP",
    "bmp": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "tiff": "TIFF",
    "ppm": "PPM",
    "jfif": "JPEG",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))


def picture(index: int, kind: str = "PNG") -> bytes:
    return encoded(photograph(index, 20 + index, 16), kind)


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content or picture(len(path.name)))
    return path


def shard(path: Path, keys: list[str], *, ending: str = "png", kind: str = "PNG") -> Path:
    members = [
        member
        for index, key in enumerate(keys)
        for member in ((f"{key}.{ending}", picture(index, kind)), (f"{key}.cls", b"%d" % (index % 2)))
    ]
    return put(path, mini.tar_of(members))


def indexed(root: Path, source: str = "webdataset") -> IndexedImages:
    build_index(source, root, output=root.with_name(f"{root.name}.index"))
    return IndexedImages(root.with_name(f"{root.name}.index"))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *[(f"{word}-000.tar", part) for word, part in PARTS.items()],
        *[(f"{word.upper()}_0001.tar.gz", part) for word, part in PARTS.items()],
        *[(f"{word}/000.tar", part) for word, part in PARTS.items()],
        ("validation-00000-of-00128", "test"),
        ("imagenet-val-000000.tar", "test"),
        ("imagenet-train-000000.tar", "train"),
        ("cifar10-test.tfrecord-00000-of-00001", "test"),
        ("imagenet-val-00000-of-00002.parquet", "test"),
        ("imagefolder-test-00000-of-00002.arrow", "test"),
        ("data/train-00000-of-00002-b21d2a0a8d8b8e2c.parquet", "train"),
        ("my-test/train-000.tar", "train"),
        ("test/train-000.tar", "train"),
        ("train/val-000.tar", "test"),
        ("my-test/000.tar", "train"),
        ("latest-000.tar", "train"),
        ("contest/000.tar", "train"),
        ("developers-000.tar", "train"),
        ("000.tar", "train"),
    ],
)
def test_the_part_is_told_by_the_exact_name(name: str, part: str) -> None:
    assert part_of(name) == part


def test_doubtful_names_are_those_that_no_exact_name_decides() -> None:
    assert [
        name
        for name in ("my-test/000.tar", "a-test-split-0.tar", "val_of_my/7.tar")
        if not doubtful(name, part_of(name))
    ] == []
    certain = ("my-test/train-0.tar", "latest-0.tar", "test-0.tar", "0.tar", "train/my_test_x.tar")
    assert not any(doubtful(name, part_of(name)) for name in certain)


def test_index_says_what_each_shard_was_taken_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    shard(root / "train-000.tar", ["a", "b", "c"])
    shard(root / "train-001.tar", ["d"])
    shard(root / "eval-000.tar", ["e", "f"])
    shard(root / "my-test" / "000.tar", ["g"])
    put(root / "eval-001.tar.xz", b"x")
    put(root / "notes.txt", b"x")
    put(root / "classes.txt", b"one\ntwo\n")
    for _ in range(2):  # built, and up to date
        assert main(["index", str(root), "--source", "webdataset", "--workers", "1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "images by part: train 5 (my-test/*.tar, train-*.tar), test 2 (eval-*.tar)" in lines
        assert any("speaks of another part: my-test/000.tar; if they are test data" in line for line in lines)
        assert lines[-2:] == [
            "images by format: 7 png",
            "not used: 2 (1 .txt, 1 compressed shards; decompress them): eval-001.tar.xz, notes.txt",
        ]
    shard(root / "train-002.tar", ["h"])
    index = root.with_name("data.index")
    reason = why_not_current(index, source="webdataset", root=root, options=ScanOptions())
    assert reason == "shard 'train-002.tar' is new"


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    root = tmp_path / "data"
    shard(tmp_path / "elsewhere" / "val" / "000.tar", ["a", "b"])
    shard(root / "train-000.tar", ["c", "d"])
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked" / "val" / "back").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    images = indexed(root)
    assert [(each.name, each.part) for each in images.shards] == [
        ("train-000.tar", "train"),
        ("linked/val/000.tar", "test"),
    ]
    assert "not used: 2 (2 links to a folder above): up, linked/val/back" in images.contents()


def tree(root: Path) -> None:
    """Two classes of 12 images: in the class folder, below it, behind a link; in all formats."""
    for label in range(2):
        folder = root / f"c{label}"
        for index in range(3):
            put(folder / f"{index}.png")
        put(folder / "a" / "b" / "deep.jpg", picture(1, "JPEG"))
        put(root.parent / f"linked{label}" / "far.PNG")
        (folder / "link").symlink_to(root.parent / f"linked{label}")
        for ending, kind in OTHER_FORMATS.items():
            put(folder / "others" / f"x.{ending}", picture(2, kind))
        put(folder / "others" / "caption.txt", b"x")
        put(folder / "others" / "x.heic", b"x")
        (folder / "a" / "loop").symlink_to(folder)


def test_class_folders_are_read_to_any_depth(tmp_path: Path) -> None:
    root = tmp_path / "data"
    tree(root)
    config = DataConfig(source="folder", root=str(root))
    images, through_index = load_images(config), indexed(root, "folder")
    assert len(images) == len(through_index) == 2 * (3 + 1 + 1 + len(OTHER_FORMATS))
    assert not images.bad
    assert [through_index.name(sample) for sample in range(len(images))] == images.paths.tolist()
    assert np.array_equal(through_index.labels, images.labels)
    assert np.array_equal(through_index.sizes, images.sizes)
    assert images.contents() == through_index.contents()
    assert images.contents()[1:] == [
        "images by format: 8 png, 4 jpeg, 4 tiff (decoded by PIL), 2 bmp (decoded by PIL), 2 gif (decoded by PIL), "
        "2 ppm, 2 webp (decoded by PIL)",
        "not used: 6 (2 .heic, 2 .txt, 2 links to a folder above): c0/a/loop, c0/others/caption.txt, "
        "c0/others/x.heic, c1/a/loop, c1/others/caption.txt, c1/others/x.heic",
    ]
    put(root / "c0" / "others" / "new.png")
    with pytest.raises(ValueError, match="has changed since"):  # below the class folder, too
        IndexedImages(tmp_path / "data.index")


def test_the_start_of_a_run_names_what_is_not_used(tmp_path: Path) -> None:
    tree(tmp_path / "data")
    config = DataConfig(source="folder", root=str(tmp_path / "data"))
    notes = record_splits(make_splits(load_images(config), config=config, seed=0), tmp_path / "run")
    assert notes[0].startswith("data: 8 labelled, ")
    assert "c0/others/x.heic" in notes[-1]


def test_folders_named_after_parts_hold_class_folders(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for part, count in (("val", 2), ("train", 6)):
        for name in ("cat", "dog"):
            for index in range(count):
                put(root / part / name / f"{index}.png")
    config = DataConfig(source="folder", root=str(root), split="test_files", labelled_per_class=1)
    for images in (load_images(config), indexed(root, "folder")):
        assert images.classes == ("cat", "dog")
        assert images.labels.tolist() == [0] * 6 + [1] * 6 + [0] * 2 + [1] * 2
        assert make_splits(images, config=config, seed=0).test.tolist() == [12, 13, 14, 15]
        stratified = make_splits(images, config=config.model_copy(update={"split": "stratified"}), seed=0)
        assert max(stratified.test.max(), stratified.unlabelled.max()) < 12
    notes = record_splits(stratified, tmp_path / "run")
    assert notes[-1].startswith("the data set's own test part, 4 images, is not used; mpl_scale.data.split = test_fi")
    put(root / "bus" / "0.png")  # train may be a class, as of COCO, but not one with folders
    with pytest.raises(ValueError, match="holds 'train', a part with folders of its own, beside 'bus'"):
        load_images(config)


def test_dots_in_keys_lose_nothing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    shard(root / "train-000.tar", [f"photo_v1.{index:03d}" for index in range(6)])
    shard(root / "train-001.tar", [f"web{index}" for index in range(4)], ending="WebP", kind="WEBP")
    members = [("a.png", picture(0)), ("a.depth.png", picture(1)), ("a.cls", b"1"), ("a.json", b"{}"), ("a.txt", b"")]
    members += [("b.1.png", picture(0)), ("b.1.cls", b"0"), ("b.2.png", picture(1)), ("b.2.txt", b"")]
    members += [("c.1.cls", b"0"), ("d.txt", b""), ("noending", b"")]
    put(root / "train-002.tar", mini.tar_of(members))
    images = indexed(root)
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0]
    assert images.refused.tolist() == [12]
    assert list(images.refusals(9).values()) == [
        "no .cls or .json member beside the image, only .txt",
        "member 'c.1.cls' has no image beside it",
    ]
    assert images.contents()[1:] == [
        "images by format: 8 png, 4 webp (decoded by PIL)",
        "not used: 6 (3 .txt, 1 .json, 1 .png, 1 without an ending): a.json, a.txt, a.depth.png, b.2.txt, d.txt, "
        "noending",
    ]


def test_a_folder_of_compressed_shards_only_says_so(tmp_path: Path) -> None:
    put(tmp_path / "data" / "train-000.tar.xz", b"x")
    with pytest.raises(ValueError, match=r"holds no \.tar file; decompress its shards, such as 'train-000\.tar\.xz'"):
        indexed(tmp_path / "data")


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz"])
def test_compressed_shards_are_read(tmp_path: Path, ending: str) -> None:
    root = tmp_path / "data"
    plain = shard(tmp_path / "plain" / "train-000.tar", ["a", "b", "c"])
    packed = gzip.compress(plain.read_bytes())
    put(root / f"train-000{ending}", packed)
    put(root / f"train-001{ending}", packed[:-40])
    images, expected = indexed(root), indexed(plain.parent)
    assert len(images) == 3
    assert [images.read(row).tobytes() for row in range(3)] == [expected.read(row).tobytes() for row in range(3)]
    assert "the whole shard is lost: it cannot be decompressed" in next(iter(images.refusals(1).values()))


def test_max_pixels_decides_alone(tmp_path: Path) -> None:
    """Above 50 million pixels, too, where an index is built whatever the setting; PIL's own limit does not count."""
    root = tmp_path / "data"
    for label in range(2):
        put(root / f"c{label}" / "0.png")
    buffer = io.BytesIO()
    Image.new("1", (14000, 14000)).save(buffer, "TIFF", compression="group4")
    put(root / "c1" / "scan.tiff", buffer.getvalue())
    images = load_images(DataConfig(source="folder", root=str(root), max_pixels=200_000_000))
    assert images.sizes.max() == 14000
    assert not images.bad
    with pytest.raises(ValueError, match="max_pixels"):
        DataConfig(max_pixels=1 << 40)


def test_hidden_files_are_not_listed(tmp_path: Path) -> None:
    for label in range(2):
        put(tmp_path / "data" / f"c{label}" / "0.png")
        put(tmp_path / "data" / f"c{label}" / ".thumbnails" / "0.png")
    assert len(load_images(DataConfig(source="folder", root=str(tmp_path / "data")))) == 2
    assert os.listdir(tmp_path / "data" / "c0" / ".thumbnails") == ["0.png"]
