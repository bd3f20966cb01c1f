"""CIFAR's and STL-10's archives: where their files are found, what their classes are called, what is refused."""

from __future__ import annotations

import gzip
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.reader import IndexedImages, StaleIndex
from mpl_scale.data.samples.splits import SPLITS
from tests.support import mini_imagenet as mini
from tests.support.image_sets import split


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))


def load(root: Path, source: str) -> IndexedImages:
    images = load_images(DataConfig(source=source, root=str(root)))
    assert isinstance(images, IndexedImages)
    return images


IN_FOLDERS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "cifar10 python": ("cifar10", "cifar-10-batches-py", mini.write_cifar_python),
    "cifar10 binary": ("cifar10", "cifar-10-batches-bin", mini.write_cifar_binary),
    "cifar100": ("cifar100", "cifar-100-python", mini.write_cifar100),
    "stl10": ("stl10", "stl10_binary", mini.write_stl10),
}
"""The folder that each archive unpacks to."""


@pytest.mark.parametrize("kind", IN_FOLDERS)
def test_the_folder_of_an_archive_is_found(tmp_path: Path, kind: str) -> None:
    """torchvision's download folder and the archive's own are the same data set."""
    source, folder, write = IN_FOLDERS[kind]
    write(tmp_path / "data" / folder)
    outer, inner = load(tmp_path / "data", source), load(tmp_path / "data" / folder, source)
    assert [shard.name for shard in outer.shards] == [f"{folder}/{shard.name}" for shard in inner.shards]
    for sample in (0, len(inner) - 1):
        assert outer.read(sample).tobytes() == inner.read(sample).tobytes()
    for images in (outer, inner):
        assert images.ids_of("test").tolist() == list(range(36 if source == "stl10" else 40, 48))
        assert not any("not used" in line for line in images.contents())


def test_cifar100_has_its_fine_names_and_is_stale_when_they_change(tmp_path: Path) -> None:
    mini.write_cifar100(tmp_path / "data", "cifar-100-python")
    build_index("cifar100", tmp_path / "data", output=tmp_path / "index")
    assert list(IndexedImages(tmp_path / "index").classes) == mini.NAMES_100
    meta = tmp_path / "data" / "cifar-100-python" / "meta"
    status = meta.stat()
    meta.write_bytes(mini.cifar100_meta([name.upper() for name in mini.NAMES_100]))
    os.utime(meta, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(StaleIndex, match=r"cifar-100-python/meta' has changed"):
        IndexedImages(tmp_path / "index")


NO_NAMES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "No such file or directory"),
    "cut": (mini.cifar100_meta()[:-300], "it cannot be unpickled"),
    "no pickle": (b"names", "it cannot be unpickled"),
    "no dict": (b"N.", "no dict of fine_label_names"),
    "too few": (mini.cifar100_meta(mini.NAMES_100[:-1]), "fine_label_names is no list of 100 names"),
    "doubled": (mini.cifar100_meta([*mini.NAMES_100[:-1], "fine 0"]), "fine_label_names is no list of 100 names"),
    "a batch": (mini.cifar_batch(), "fine_label_names is no list of 100 names"),
}


@pytest.mark.parametrize("kind", NO_NAMES)
def test_class_names_that_cannot_be_read_are_an_error(tmp_path: Path, kind: str) -> None:
    content, reason = NO_NAMES[kind]
    mini.write_cifar100(tmp_path)
    (tmp_path / "meta").unlink()
    if content is not None:
        (tmp_path / "meta").write_bytes(content)
    with pytest.raises(ValueError, match=rf"/meta' holds no class names: {reason}.*; unpack cifar-100-py") as caught:
        load(tmp_path, "cifar100")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(SPLITS.keys() - {"cifar10_4k", "svhn_1k", "imagenet_10"}))
def test_stl10s_unlabelled_images_have_no_labels_in_any_split(tmp_path: Path, name: str) -> None:
    """They are unlabelled images of every split, and never labelled, held out or tested on."""
    mini.write_stl10(tmp_path)
    (tmp_path / "train_y.bin").write_bytes(bytes(range(1, 11)) * 2)
    images = load(tmp_path, "stl10")
    without = np.arange(mini.COUNT)[mini.twelfths(*mini.UNLABELLED)]
    found = split(images, name, labelled_per_class=1, held_out_shards=0, unlabelled_from="rest")
    assert np.isin(without, found.unlabelled).all()
    for part in (found.labelled, found.test, found.held_out):
        assert not np.isin(without, part).any()
    assert np.isin(without, split(images, name, labelled_per_class=1, held_out_shards=0).unlabelled).all()
    assert "unlabelled 16 (unlabeled_X.bin)" in "\n".join(images.contents())


CUT: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "images": ("train_X.bin", lambda good: good[:-1], "it is empty, or ends 27647 bytes into an image; unpack stl10"),
    "no image": ("unlabeled_X.bin", lambda good: b"", "it is empty, or ends 0 bytes into an image; unpack stl10"),
    "unlabelled": ("unlabeled_X.bin", lambda good: good[:-5], "it is empty, or ends 27643 bytes into an image"),
    "an image less": ("train_X.bin", lambda good: good[27648:], "'train_y.bin' is missing, or holds 20 labels for 19"),
}


@pytest.mark.parametrize("kind", CUT)
def test_files_of_stl10_cut_short_are_named(tmp_path: Path, kind: str) -> None:
    name, damage, reason = CUT[kind]
    mini.write_stl10(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}.*: the whole shard is lost: {reason}") as caught:
        load(tmp_path, "stl10")
    assert "\n" not in str(caught.value)


def test_stl10_without_labels_is_an_error(tmp_path: Path) -> None:
    mini.write_stl10(tmp_path)
    (tmp_path / "test_y.bin").unlink()
    with pytest.raises(ValueError, match=r"test_X\.bin: .*'test_y\.bin' is missing, or holds 0 labels for 12 images"):
        load(tmp_path, "stl10")


def append(content: bytes) -> Callable[[bytes], bytes]:
    return lambda good: good + content


MORE: dict[str, tuple[str, Callable[[Path], None], str, Callable[[bytes], bytes], str]] = {
    "cifar10": ("cifar10", mini.write_cifar_python, "data_batch_3", append(b"x"), "1 bytes after its end"),
    "a second batch": ("cifar10", mini.write_cifar_python, "test_batch", lambda good: 2 * good, "bytes after its end"),
    "cifar100": ("cifar100", mini.write_cifar100, "train", append(b"N."), "2 bytes after its end"),
    "npy": ("arrays", mini.write_arrays, "images.npy", append(b"x"), "'images.npy' holds 1 bytes after its"),
    "labels": ("arrays", mini.write_arrays, "labels.npy", append(bytes(8)), "'labels.npy' holds 8 bytes after its"),
    "svhn": ("svhn", mini.write_svhn, "train_32x32.mat", lambda good: good + good[128:], "two arrays X"),
    "HDF5": ("svhn", mini.write_svhn, "test_32x32.mat", lambda good: mini.mat_7_3(), "one of version 7.3 is HDF5"),
    "only HDF5": ("svhn", mini.write_svhn, "test_32x32.mat", lambda good: mini.mat_7_3()[512:], "one of version 7.3"),
}
"""Source, writer, file, what is done to it, what is said of it."""


@pytest.mark.parametrize("kind", MORE)
def test_files_that_hold_more_or_something_else_are_refused(tmp_path: Path, kind: str) -> None:
    source, write, name, change, reason = MORE[kind]
    write(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{name.replace('labels', 'images')}.*: .*{reason}"):
        load(tmp_path, source)


def test_batches_of_pickle_protocol_5_are_read(tmp_path: Path) -> None:
    mini.write_cifar_python(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(mini.cifar_batch(slice(8, 16), protocol=5))
    images = load(tmp_path, "cifar10")
    assert images.labels.tolist() == mini.pictures()[1].tolist()
    assert images.read(9).tobytes().endswith(mini.pictures()[0][9].tobytes())


def _with_both_keys(good: bytes) -> bytes:
    batch = pickle.loads(good)
    return pickle.dumps(batch | {b"labels": batch["labels"], "labels": [5] * 8}, protocol=4)


def _with_labels_twice(good: bytes) -> bytes:
    (number,) = mini.python2_pickle({b"labels": [1] * 8})[4:].split(b"u.")[:1]
    return good[:-2] + number + b"u."


CONTRADICTORY: dict[str, tuple[str, Callable[[Path], None], str, Callable[[bytes], bytes], str]] = {
    "text and bytes": ("cifar10", mini.write_cifar_python, "test_batch", _with_both_keys, "labels twice, as text"),
    "a key twice": (
        "cifar10",
        mini.write_cifar_python,
        "data_batch_1",
        _with_labels_twice,
        "a dict with one key twice",
    ),
    "coarse": (
        "cifar100",
        mini.write_cifar100,
        "test",
        lambda good: mini.cifar_batch(slice(40, 48), key=b"fine_labels", coarse_labels=[0, 1, 2, 3, 4, 5, 0, 9]),
        "image 7 of fine label 5 has coarse label 9, another has 1",
    ),
    "names": (
        "cifar10",
        mini.write_cifar_binary,
        "batches.meta.txt",
        lambda good: b"cat\ndog\n",
        "names class 0 'cat'",
    ),
    "pickled names": (
        "cifar10",
        mini.write_cifar_python,
        "batches.meta",
        lambda good: pickle.dumps({"label_names": ["cat"]}, protocol=2),
        "names class 0 'cat', not 'airplane'",
    ),
    "names of stl10": ("stl10", mini.write_stl10, "class_names.txt", lambda good: b"dog cat", "names class 0 'dog'"),
    "two labels": (
        "idx",
        mini.write_idx,
        "train-labels-idx1-ubyte.gz",
        lambda good: gzip.compress(mini.idx(*mini.pictures())[1]),
        r"there is a 'train-labels-idx1-ubyte\.gz' of other content",
    ),
    "two files of images": (
        "idx",
        mini.write_idx,
        "train-images-idx3-ubyte.gz",
        lambda good: gzip.compress(bytes(99)),
        r"there is a 'train-images-idx3-ubyte\.gz' of other content",
    ),
    "elsewhere": (
        "stl10",
        mini.write_stl10,
        "stl10_binary/test_X.bin",
        lambda good: b"",
        "holds both 'train_X.bin' and",
    ),
}
"""As MORE, of files that are there or not."""


@pytest.mark.parametrize("kind", CONTRADICTORY)
def test_what_contradicts_itself_is_refused(tmp_path: Path, kind: str) -> None:
    source, write, name, change, reason = CONTRADICTORY[kind]
    write(tmp_path)
    load(tmp_path, source)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    with pytest.raises(ValueError, match=reason):
        load(tmp_path, source)


def test_files_that_say_the_same_twice(tmp_path: Path) -> None:
    mini.write_idx(tmp_path)
    for name in ("train-labels-idx1-ubyte", "train-images-idx3-ubyte"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    mini.write_cifar_binary(tmp_path)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (tmp_path / "batches.meta.txt").write_text("\n".join([*names, "", ""]))
    assert len(load(tmp_path, "idx")) == len(load(tmp_path, "cifar10")) == 48
