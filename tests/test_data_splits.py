"""The splits of appendix C.1, number by number; what is refused is in none; the manifest of what a run used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images, make_splits, write_manifest
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.reader import ARRAYS, IndexedImages
from mpl_scale.data.samples.splits import SPLITS
from mpl_scale.trainer.preflight import record_splits
from tests.support import mini_imagenet as mini
from tests.support.image_sets import describe_index, image_set, split, write_folder


def index_of(folder: Path, shards: list[tuple[str, int]], *, refused: list[int] | None = None) -> IndexedImages:
    """An index of empty files: (part, images) of each shard; ten classes in turn."""
    counts = [count for _, count in shards]
    total = sum(counts)
    named = [(f"{number:05d}", part) for number, (part, _) in enumerate(shards)]
    describe_index(folder, named, classes=list("0123456789"), count=total, refused=len(refused or []))
    for name, dtype in ARRAYS.items():
        np.save(folder / f"{name}.npy", np.zeros((total, 2) if name == "size" else total, dtype))
    np.save(folder / "shard.npy", np.repeat(np.arange(len(shards)), counts).astype(ARRAYS["shard"]))
    np.save(folder / "label.npy", np.arange(total) % 10)
    np.save(folder / "refused.npy", np.array(refused or [], np.int64))
    return IndexedImages(folder)


CIFAR = [*[("train", 10_000)] * 5, ("test", 10_000)]
SVHN = [("train", 73_257), ("extra", 531_131), ("test", 26_032)]


def ids(first: int, last: int) -> np.ndarray:
    return np.arange(first, last)


def equal(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == np.int64 and np.array_equal(found, expected)


def test_cifar10_4k(tmp_path: Path) -> None:
    found = split(index_of(tmp_path, CIFAR), "cifar10_4k")
    assert equal(found.held_out, ids(0, 5_000))
    assert equal(found.labelled, ids(5_000, 9_000))
    assert equal(found.unlabelled, ids(9_000, 50_000))
    assert len(found.unlabelled) == 41_000
    assert equal(found.test, ids(50_000, 60_000))


def test_svhn_1k(tmp_path: Path) -> None:
    found = split(index_of(tmp_path, SVHN), "svhn_1k")
    assert equal(found.held_out, ids(0, 5_000))
    assert equal(found.labelled, ids(5_000, 6_000))
    assert equal(found.unlabelled, ids(6_000, 604_388))
    assert equal(found.test, ids(604_388, 630_420))


@pytest.mark.parametrize(("fraction", "shards"), [(0.1, 102), (0.2, 204), (0.29, 296), (0.5, 512), (1 / 1024, 1)])
def test_imagenet_counts_shards(tmp_path: Path, fraction: float, shards: int) -> None:
    sizes = [1251 if shard % 3 else 1252 for shard in range(1024)]
    images = index_of(tmp_path, [*[("train", size) for size in sizes], *[("test", 390)] * 128])
    found = split(images, "imagenet_10", labelled_fraction=fraction)
    first, last, end = sum(sizes[:shards]), sum(sizes[:-20]), sum(sizes)
    assert equal(found.labelled, ids(0, first))
    assert equal(found.unlabelled, ids(first, last))
    assert equal(found.held_out, ids(last, end))
    assert equal(found.test, ids(end, end + 390 * 128))


def test_splits_of_c1_do_not_depend_on_the_seed_and_may_be_tuned_on(tmp_path: Path) -> None:
    images = index_of(tmp_path, CIFAR)
    first, second = split(images, "cifar10_4k"), split(images, "cifar10_4k", seed=1, split_seed=5)
    assert np.array_equal(first.labelled, second.labelled)
    tuned = split(images, "cifar10_4k", evaluate_on="held_out")
    assert equal(tuned.test, ids(0, 5_000))
    assert not len(tuned.held_out)
    whole = split(images, "cifar10_4k", unlabelled_from="training")
    assert equal(whole.unlabelled, ids(5_000, 50_000))
    assert equal(split(images, "cifar10_4k", unlabelled_from="labelled").unlabelled, ids(5_000, 9_000))  # D.2


def test_refused_images_keep_their_ids_and_are_in_no_part(tmp_path: Path) -> None:
    bad = [0, 4_999, 5_000, 8_999, 9_000, 30_000, 59_999]
    images = index_of(tmp_path / "bad", CIFAR, refused=bad)
    for name in ("cifar10_4k", "stratified", "test_files"):
        found = split(images, name)
        everything = np.concatenate([found.test, found.held_out, found.labelled, found.unlabelled])
        assert not np.isin(bad, everything).any()
        assert len(np.unique(everything)) == (50_000 - 6 if name == "stratified" else 60_000 - 7)
    whole, less = split(index_of(tmp_path / "whole", CIFAR), "cifar10_4k"), split(images, "cifar10_4k")
    for part in ("test", "held_out", "labelled", "unlabelled"):
        assert np.array_equal(getattr(less, part), np.setdiff1d(getattr(whole, part), bad))


def test_any_split_by_seed_and_count_keeps_the_test_files_out(tmp_path: Path) -> None:
    images = index_of(tmp_path, [("train", 500), ("extra", 300), ("test", 100)])
    found = split(images, "test_files", labelled_per_class=7)
    assert equal(found.test, ids(800, 900))
    assert np.bincount(images.labels[found.labelled]).tolist() == [7] * 10
    assert found.labelled.max() < 500
    assert equal(found.unlabelled, ids(0, 800))
    assert equal(
        split(images, "test_files", labelled_per_class=7, unlabelled_from="rest").unlabelled,
        np.setdiff1d(ids(0, 800), found.labelled),
    )
    assert not np.array_equal(split(images, "test_files", seed=1, labelled_per_class=7).labelled, found.labelled)
    drawn = split(images, "stratified", test_fraction=0.25)
    assert np.bincount(images.labels[drawn.test]).tolist() == [20] * 10
    assert drawn.test.max() < 800


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cifar10_4k", {}, r"'cifar10_4k' needs more than 5000 \+ 4000 training images, and there are 500"),
        ("imagenet_10", {}, r"labelled_fraction = 0\.1 of 1 training shards is 0 labelled, and held_out_shards = 20"),
        ("test_files", {}, r"evaluate_on = 'test', and root = 'None' has no test files; add them, or set evaluate_on"),
        (
            "stratified",
            {"evaluate_on": "held_out"},
            r"split = 'stratified' holds nothing out; set evaluate_on = 'test'",
        ),
        ("cifar_4k", {}, r"mpl_scale\.data\.split = 'cifar_4k' is unknown; did you mean cifar10_4k\?"),
    ],
)
def test_impossible_splits_say_what_to_do(tmp_path: Path, name: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(index_of(tmp_path, [("train", 500)]), name, **settings)


@pytest.mark.parametrize("name", sorted(SPLITS.keys() - {"stratified", "transductive"}))
def test_plain_files_have_no_parts_of_their_own(name: str) -> None:
    with pytest.raises(ValueError, match=r"use (split = 'stratified'|.*tfrecord.* webdataset)"):
        split(image_set([30, 30]), name)


def test_parts_come_from_the_names_of_shards(tmp_path: Path) -> None:
    mini.write_tfrecord(tmp_path / "data", shards=4)
    for shard in (0, 1):
        source = tmp_path / "data" / f"train-{shard:05d}-of-00004"
        (tmp_path / "data" / f"validation-{shard:05d}-of-00002").write_bytes(source.read_bytes())
    (tmp_path / "data" / "train-latest.tfrecord").write_bytes(b"")  # "latest" is no test
    build_index("tfrecord", tmp_path / "data", output=tmp_path / "index")
    images = IndexedImages(tmp_path / "index")
    assert [shard.part for shard in images.shards] == ["train"] * 5 + ["test"] * 2
    assert equal(images.ids_of("test"), ids(48, 72))
    found = split(images, "imagenet_10", labelled_fraction=0.41, held_out_shards=1)
    assert equal(found.labelled, ids(0, 24))
    assert equal(found.unlabelled, ids(24, 48))


def test_the_manifest_says_what_was_used(tmp_path: Path) -> None:
    found = split(index_of(tmp_path / "index", CIFAR, refused=[7]), "cifar10_4k")
    assert not write_manifest(found, tmp_path / "run" / "splits")
    manifest = json.loads((tmp_path / "run" / "splits" / "manifest.json").read_text())
    assert {name: part["count"] for name, part in manifest["parts"].items()} == {
        "test": 10_000,
        "held_out": 4_999,
        "labelled": 4_000,
        "unlabelled": 41_000,
    }
    assert (manifest["images"], manifest["refused"]) == (60_000, 1)
    for name, part in manifest["parts"].items():
        stored = np.load(tmp_path / "run" / "splits" / part["file"])
        assert equal(stored, getattr(found, name))
        assert part["sha256"] == hashlib.sha256(stored.astype("<i8").tobytes()).hexdigest()
    labelled = tmp_path / "run" / "splits" / "labelled.npy"
    before = labelled.stat().st_mtime_ns
    assert not write_manifest(found, tmp_path / "run" / "splits")  # a restart
    assert labelled.stat().st_mtime_ns == before
    other = split(found.images, "test_files")
    assert write_manifest(other, tmp_path / "run" / "splits")  # another split: say so
    assert equal(np.load(labelled), other.labelled)
    assert sorted(path.name for path in (tmp_path / "run" / "splits").iterdir()) == [
        "held_out.npy",
        "labelled.npy",
        "manifest.json",
        "test.npy",
        "unlabelled.npy",
    ]


def test_refused_files_of_a_folder_are_counted_and_left_out(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", images=60)
    victims = [root / "class0" / "3.png", root / "class1" / "7.png"]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(b"GIF89a")
    config = DataConfig(source="folder", root=str(root), max_bad_fraction=0.02)
    images = load_images(config)
    assert len(images) == 120
    assert list(images.refusals(5).values()) == [
        "the file is empty",
        "neither a PNG nor a JPEG file, nor another that is read",
    ]
    found = make_splits(images, config=config, seed=0)
    assert len(found.test) + len(found.unlabelled) == 118
    used = {images.name(sample) for sample in np.concatenate([found.test, found.unlabelled])}
    assert not used & {str(victim) for victim in victims}
    for again in range(2):
        notes = record_splits(found, tmp_path / "run")
        assert notes[1:] == [
            f"data: 8 labelled, {len(found.unlabelled)} unlabelled and 40 evaluation images, 0 held out",
            "images by part: train 120 (class*)",
            "images by format: 118 png",
        ], again
        assert notes[0].startswith("2 of 120 images are left out, unreadable: ")
        assert str(victims[0]) in notes[0]
    assert (tmp_path / "run" / "splits" / "manifest.json").exists()
    other = make_splits(images, config=config, seed=1)
    assert "it is replaced" in record_splits(other, tmp_path / "run")[0]
    with pytest.raises(ValueError, match=r"2 of 120 images are more than .*max_bad_fraction = 0\.01") as caught:
        load_images(config.model_copy(update={"max_bad_fraction": 0.01}))
    assert all(str(victim) in str(caught.value) for victim in victims)
