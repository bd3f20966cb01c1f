"""Shards that are cut short or empty: how much is missing is unknown, so none passes for a few unreadable images."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpl_scale.cli import main
from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images, make_splits
from mpl_scale.data.index.build import build_index
from mpl_scale.data.samples.further import with_unlabelled
from tests.support import mini_imagenet as mini
from tests.support.labelled_sets import load, write

CUT = 0.6  # of the bytes: inside an image


def cut(path: Path, share: float = CUT) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def tfrecord(root: Path) -> Path:
    write(root, "tfrecord", [1, 2] * 6)
    return root / "train.tfrecord"


def webdataset(root: Path) -> Path:
    write(root, "webdataset", [0, 1] * 6)
    return root / "train.tar"


def packed(root: Path) -> Path:
    plain = webdataset(root)
    (root / "train.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return root / "train.tar.gz"


def parquet(root: Path) -> Path:
    write(root, "parquet", [0, 1] * 6)
    return root / "train.parquet"


def arrow(root: Path) -> Path:
    write(root, "arrow", [0, 1] * 6)
    return root / "train.arrow"


def binary(root: Path) -> Path:
    mini.write_cifar_binary(root)
    return root / "data_batch_3.bin"


def pickled(root: Path) -> Path:
    mini.write_cifar_python(root)
    return root / "data_batch_3"


def matlab(root: Path) -> Path:
    mini.write_svhn(root)
    return root / "extra_32x32.mat"


def fine(root: Path) -> Path:
    mini.write_cifar100(root)
    return root / "train"


def mnist(root: Path) -> Path:
    mini.write_idx(root)
    return root / "train-images-idx3-ubyte"


def stl(root: Path) -> Path:
    mini.write_stl10(root)
    return root / "unlabeled_X.bin"


KINDS = {
    "tfrecord": tfrecord,
    "webdataset": webdataset,
    "webdataset packed": packed,
    "parquet": parquet,
    "arrow": arrow,
    "cifar10 binary": binary,
    "cifar10": pickled,
    "cifar100": fine,
    "svhn": matlab,
    "idx": mnist,
    "stl10": stl,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [CUT, 0.0], ids=["cut", "empty"])
def test_a_damaged_shard_is_refused_unless_it_is_allowed(tmp_path: Path, kind: str, share: float) -> None:
    root = tmp_path / "data"
    damaged, source = KINDS[kind](root), kind.partition(" ")[0]
    if source in ("tfrecord", "webdataset", "parquet", "arrow"):  # a whole one beside it: something is left to train on
        (root / damaged.name.replace("train", "train-b")).write_bytes(damaged.read_bytes())
    cut(damaged, share)
    with pytest.raises(ValueError, match=rf"1 shard\(s\) .* '{damaged.name}': the .* lost: .*allow_damaged_shards"):
        load(root, source)
    images = load(root, source, allow_damaged_shards=True)
    assert len(images.lost()) == 1
    assert len(images) > len(images.refused)


def test_the_index_command_ends_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    cut(webdataset(root))
    for _ in range(2):  # built, and up to date
        assert main(["index", str(root), "--source", "webdataset", "--output", str(tmp_path / "index")]) == 2
        assert "1 shard(s)" in capsys.readouterr().err


def test_an_index_of_unlabelled_images_is_no_exception(tmp_path: Path) -> None:
    whole, other = write(tmp_path / "whole", "webdataset", [0, 1] * 6), tmp_path / "other"
    cut(webdataset(other))
    build_index("webdataset", other, output=tmp_path / "index")
    splits = make_splits(load(whole, "webdataset"), config=DataConfig(labelled_per_class=1), seed=0)
    with pytest.raises(ValueError, match=r"unlabelled_index: 1 shard\(s\)"):
        with_unlabelled(splits, tmp_path / "index")
    assert len(with_unlabelled(splits, tmp_path / "index", allow_damaged=True).unlabelled)


def no_third_batch(root: Path) -> None:
    binary(root).unlink()


def labels_alone(root: Path) -> None:
    write(root, "arrays", [0, 1])
    np.save(root / "test_labels.npy", np.zeros(3, int))


def no_training_part(root: Path) -> None:
    write(root, "arrays", [0, 1])
    for name in ("images", "labels"):
        (root / f"{name}.npy").rename(root / f"test_{name}.npy")


def both_archives(root: Path) -> None:
    plain = webdataset(root)
    (root / "train.tgz").write_bytes(gzip.compress(plain.read_bytes()))


def classes(text: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        webdataset(root)
        (root / "classes.txt").write_text(text)

    return make


@pytest.mark.parametrize(
    ("source", "make", "message"),
    [
        ("cifar10", no_third_batch, "but not data_batch_3"),
        ("arrays", labels_alone, "test_labels.npy and no test_images.npy"),
        ("arrays", no_training_part, "holds no images.npy"),
        ("webdataset", both_archives, "both 'train.tar' and 'train.tgz'"),
        ("webdataset", classes("cat\n\ndog\n"), "line 2 is blank"),
        ("webdataset", classes("cat\ndog\ncat\n"), "names class 'cat' twice"),
        ("webdataset", classes("\n"), "fewer than two names"),
    ],
)
def test_a_data_set_that_is_not_complete_is_refused(
    tmp_path: Path, source: str, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "data", source)


@pytest.mark.parametrize("given", [True, False])
def test_checksums_of_a_source_that_has_none(given: bool) -> None:
    with pytest.raises(ValueError, match=r"check_data = .* has no effect with source digits"):
        load_images(DataConfig(source="digits", check_data=given))


def copies(root: Path, source: str, names: list[str]) -> Path:
    """Shards of these names, each of its own images."""
    for number, name in enumerate(names):
        suffix = {"webdataset": "tar"}.get(source, source)
        own = write(root / "own", source, [1, 2] * (number + 1) if source == "tfrecord" else [0, 1] * (number + 1))
        (own / f"train.{suffix}").rename(root / name)
    (root / "own").rmdir()
    return root


@pytest.mark.parametrize(
    ("source", "names", "missing"),
    [
        ("webdataset", ["train-000.tar", "train-002.tar"], r"'train-\*\.tar' lacks number 1, between 0 and 2"),
        ("tfrecord", ["a1.tfrecord", "a2.tfrecord", "a5.tfrecord"], r"lacks number 3, between 1 and 5"),
        ("parquet", ["part-0-x9.parquet", "part-1-x9.parquet", "part-3-x9.parquet"], "lacks number 2"),
        ("webdataset", ["train-000.tar", "train-001.tar", "val-1.tar", "val-3.tar"], r"'val-\*\.tar' lacks number 2"),
    ],
)
def test_a_missing_number_is_refused_unless_it_is_allowed(
    tmp_path: Path, source: str, names: list[str], missing: str
) -> None:
    root = copies(tmp_path / "data", source, names)
    with pytest.raises(ValueError, match=rf"shards of '.*' are missing: .*{missing}.*allow_damaged_shards"):
        load(root, source)
    assert len(load(root, source, allow_damaged_shards=True).shards) == len(names)
    with pytest.raises(ValueError, match=missing):  # an index that is there already
        load(root, source)


@pytest.mark.parametrize(
    "names",
    [
        ["train-2024-01-15.tar", "train-2024-02-17.tar"],
        ["w0-s0.tar", "w1-s2.tar"],
        ["train-0.tar", "val-2.tar"],
        ["0007.tar"],
        ["train-00001-of-00002.tar", "train-00002-of-00002.tar"],
    ],
)
def test_names_that_promise_no_other_shard(tmp_path: Path, names: list[str]) -> None:
    images = load(copies(tmp_path / "data", "webdataset", names), "webdataset")
    assert len(images.shards) == len(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-1-of-3.tfrecord", "train-3-of-3.tfrecord"], "holds 2 of the 3 shards .* number 2 is missing"),
        (["train-2-of-3.tfrecord", "train-3-of-3.tfrecord"], "number 1 is missing"),
        ([f"train-{n}-of-2.tfrecord" for n in range(3)], "holds number 2 of the 2 shards .*, beside number 0"),
        (["train-0-of-1.tfrecord", "train-00-of-01.tfrecord"], "holds shard 0 twice"),
        (
            ["a-0-of-1.tfrecord", "a-0-of-2.tfrecord", "a-1-of-2.tfrecord"],
            "holds both .*: its images would be",
        ),
    ],
)
def test_numbers_of_a_set_of_known_size(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(copies(tmp_path / "data", "tfrecord", names), "tfrecord")


def test_a_set_that_begins_late_is_named(tmp_path: Path) -> None:
    images = load(copies(tmp_path / "data", "webdataset", ["train-3.tar", "train-4.tar"]), "webdataset")
    assert any("the numbers of 'train-*.tar' begin at 3" in line for line in images.contents())


def test_an_archive_without_a_sample_is_refused(tmp_path: Path) -> None:
    root = copies(tmp_path / "data", "webdataset", ["train-0.tar", "train-1.tar"])
    (root / "train-1.tar").write_bytes(mini.tar_of([]))
    with pytest.raises(ValueError, match=r"'train-1\.tar': the whole shard is lost: it holds no sample"):
        load(root, "webdataset")
    assert any(
        "shards without an image: 1, as 'train-1.tar'" in line
        for line in load(root, "webdataset", allow_damaged_shards=True).contents()
    )
