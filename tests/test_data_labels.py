"""Labels are right, or an error of their own that says why."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from mpl_scale.cli.main import main
from mpl_scale.data import ImageFiles, register_source
from mpl_scale.data.formats.example import read_example
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.labels import range_hint
from mpl_scale.data.registry import SOURCES
from tests.support import mini_imagenet as mini
from tests.support.labelled_sets import FIRST_LABEL, example, feature, load, write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("source", "start"),
    [
        ("tfrecord", 0),
        ("tfrecord", 2),
        ("webdataset", 1),
        ("webdataset", 5),
        ("parquet", 1),
        ("arrow", 2),
        ("arrays", 1),
        ("arrays", 5),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_labels_that_start_elsewhere_are_refused_with_the_offset(
    tmp_path: Path, source: str, start: int, named: bool
) -> None:
    custom = FIRST_LABEL[source]
    root = write(tmp_path / "data", source, [start + n % 4 for n in range(12)])
    if named:
        (root / "classes.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(ValueError, match=rf"labels start at {start}, not at {custom}; .*label_offset = {start} "):
        load(root, source)
    images = load(root, source, label_offset=start)
    assert images.labels.tolist() == [n % 4 for n in range(12)]
    assert images.bad == 0
    assert images.classes[0] == ("a" if named else {"tfrecord": f"name of {start}"}.get(source, "class 0"))


@pytest.mark.parametrize("source", FIRST_LABEL)
def test_an_empty_first_class_has_to_be_confirmed(tmp_path: Path, source: str) -> None:
    custom = FIRST_LABEL[source]
    root = write(tmp_path / "data", source, [custom + 1, custom + 2] * 3)
    with pytest.raises(ValueError, match=rf"or set mpl_scale\.data\.label_offset = {custom} .*if they are right"):
        load(root, source)
    assert load(root, source, label_offset=custom).labels.tolist() == [1, 2] * 3


@pytest.mark.parametrize("source", FIRST_LABEL)
def test_more_names_than_classes_have_to_be_confirmed(tmp_path: Path, source: str) -> None:
    """Names that begin with one for the background would all be off by one."""
    custom = FIRST_LABEL[source]
    root = write(tmp_path / "data", source, [custom, custom + 1] * 3)
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    with pytest.raises(ValueError, match=rf"labels run from {custom} to {custom + 1}, and there are 3 class names"):
        load(root, source)
    assert len(load(root, source, label_offset=custom).classes) == 3


@pytest.mark.parametrize("source", FIRST_LABEL)
def test_fewer_names_than_classes_are_refused(tmp_path: Path, source: str) -> None:
    custom = FIRST_LABEL[source]
    root = write(tmp_path / "data", source, [custom + n % 4 for n in range(12)])
    (root / "classes.txt").write_text("a\nb\nc\n")
    for offset in (None, custom):
        with pytest.raises(ValueError, match=r"3 label\(s\) cannot be used .*and there are 3 class names"):
            load(root, source, label_offset=offset)


@pytest.mark.parametrize("source", FIRST_LABEL)
def test_test_files_that_count_from_another_number_are_refused(tmp_path: Path, source: str) -> None:
    custom = FIRST_LABEL[source]
    train, test = [custom + n % 4 for n in range(12)], [custom + 1 + n % 4 for n in range(8)]
    for number, parts in enumerate(((train, test), (test, train))):
        root = write(tmp_path / f"{number}", source, parts[0], test=parts[1])
        with pytest.raises(ValueError, match="in the test files: number both alike"):
            load(root, source)
    write(tmp_path / "alike", source, train, test=train[:8])
    assert len(load(tmp_path / "alike", source).classes) == 4


def test_another_number_of_classes_than_the_networks_names_the_labels_found(tmp_path: Path) -> None:
    """Labels from 0 whose class 0 has no image look like labels from 1."""
    images = load(write(tmp_path / "data", "tfrecord", [1, 2, 3]), "tfrecord")
    assert range_hint(images.meta).endswith("the files hold labels 1 to 3, and 1 is the first class")
    mini.write_svhn(tmp_path / "svhn")
    assert range_hint(load(tmp_path / "svhn", "svhn").meta) == ""


def test_a_marker_of_no_label_is_no_offset(tmp_path: Path) -> None:
    for source in ("webdataset", "arrays"):
        root = write(tmp_path / source, source, [0, 1, -1, 0])
        with pytest.raises(ValueError, match=r"label -1 is below 0.*remove images without a label"):
            load(root, source)


def tfrecord(*values: bytes, number: int = 3) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write(root, "tfrecord", [1, 2] * 4)
        with open(root / "train.tfrecord", "ab") as file:
            file.write(mini.record(example(image__class__label=feature(number, *values))))
        return root

    return make


def webdataset(**label: bytes) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write(root, "webdataset", [0, 1] * 4)
        members = [("z.png", mini.files()[0]), *((f"z.{ending}", content) for ending, content in label.items())]
        (root / "more.tar").write_bytes(mini.tar_of(members))
        return root

    return make


def arrays(labels: np.ndarray) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write(root, "arrays", [0, 1] * 4, test=[0, 1])
        np.save(root / "test_labels.npy", labels)
        return root

    return make


def cifar(root: Path) -> Path:
    mini.write_cifar_binary(root)
    path = root / "data_batch_3.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    return root


def cifar100(labels: list[object]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        mini.write_cifar100(root)
        batch = {"data": np.zeros((8, 3072), np.uint8), "fine_labels": labels, "coarse_labels": [0] * 8}
        (root / "test").write_bytes(pickle.dumps(batch))
        return root

    return make


def stl10(labels: bytes) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        mini.write_stl10(root)
        (root / "test_y.bin").write_bytes(labels)
        return root

    return make


def svhn(label: int) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        mini.write_svhn(root)
        images, labels = mini.pictures()
        labels = labels[36:].copy()
        labels[labels == 3] = label
        (root / "test_32x32.mat").write_bytes(_mat(images[36:], labels))
        return root

    return make


def _mat(images: np.ndarray, labels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"X": images.transpose(1, 2, 3, 0), "y": labels.astype(np.uint8)[:, None]})
    return buffer.getvalue()


FAULTS: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "several packed": ("tfrecord", tfrecord(b"\x01\x02\x83\x01"), "3 labels in image/class/label"),
    "several fields": ("tfrecord", tfrecord(b"\x01", b"\x02"), "2 labels in image/class/label"),
    "the same twice": ("tfrecord", tfrecord(b"\x01\x01"), "2 labels in image/class/label"),
    "floats": ("tfrecord", tfrecord(struct.pack("<f", 1.0), number=2), "image/class/label holds floats"),
    "text": ("tfrecord", tfrecord(b"cat", number=1), "image/class/label holds bytes"),
    "huge": ("tfrecord", tfrecord(b"\xff" * 8 + b"\x7f"), "label 9223372036854775807 is above"),
    "word": ("webdataset", webdataset(cls=b"cat"), "the label 'cat' is no number"),
    "decimal": ("webdataset", webdataset(cls=b"1.0"), "the label '1.0' is no number"),
    "two numbers": ("webdataset", webdataset(cls=b"0 1"), "the label '0 1' is no number"),
    "nothing": ("webdataset", webdataset(cls=b""), "the label '' is no number"),
    "list": ("webdataset", webdataset(json=b'{"label": [0, 1]}'), r"has \[0, 1\] as 'label', not a whole number"),
    "string": ("webdataset", webdataset(json=b'{"label": "1"}'), "has \"1\" as 'label', not a whole number"),
    "bool": ("webdataset", webdataset(json=b'{"label": true}'), "has true as 'label', not a whole number"),
    "float": ("webdataset", webdataset(json=b'{"label": 1.0}'), r"has 1\.0 as 'label', not a whole number"),
    "null": ("webdataset", webdataset(json=b'{"label": null}'), "has null as 'label', not a whole number"),
    "long": ("webdataset", webdataset(json=b'{"label": 1' + b"0" * 30 + b"}"), "as 'label', not a whole number"),
    "both cases": ("webdataset", webdataset(cls=b"0", CLS=b"1"), "two members of one name"),
    "npy of floats": ("arrays", arrays(np.zeros(2)), r"'test_labels\.npy' holds float64 \[2\]"),
    "npy of rows": ("arrays", arrays(np.zeros((2, 1), int)), r"'test_labels\.npy' holds int64 \[2, 1\]"),
    "npy one hot": ("arrays", arrays(np.eye(2, dtype=int)), r"'test_labels\.npy' holds int64 \[2, 2\]"),
    "npy of bools": ("arrays", arrays(np.zeros(2, bool)), r"'test_labels\.npy' is no \.npy file of plain numbers"),
    "npy too short": ("arrays", arrays(np.zeros(1, int)), r"int64 \[1\], not one whole number per image, \[2\]"),
    "npy huge": ("arrays", arrays(np.array([0, 1 << 63], np.uint64)), "holds 9223372036854775808, which is no class"),
    "cifar": ("cifar10", cifar, "label 10 is above 9, the last class"),
    "cifar100 above": ("cifar100", cifar100([0] * 7 + [100]), "label 100 is above 99, the last class"),
    "cifar100 too few": ("cifar100", cifar100([0] * 7), "fine_labels is no list of one whole number per image"),
    "cifar100 text": ("cifar100", cifar100(["0"] * 8), "fine_labels is no list of one whole number per image"),
    "stl10 above": ("stl10", stl10(b"\1" * 11 + b"\x0b"), r"'test_y\.bin' gives image 11 the label 11, not 1 to 10"),
    "stl10 zero": ("stl10", stl10(bytes(12)), r"'test_y\.bin' gives image 0 the label 0, not 1 to 10"),
    "stl10 too few": ("stl10", stl10(b"\1"), r"'test_y\.bin' is missing, or holds 1 labels for 12 images"),
    "svhn above": ("svhn", svhn(11), "y holds other labels than 1 to 10, or 0 to 9"),
    "svhn both": ("svhn", svhn(10), "y holds both 0 and 10"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_bad_label_is_refused_whatever_max_bad_fraction_allows(tmp_path: Path, name: str) -> None:
    source, make, message = FAULTS[name]
    root = make(tmp_path / "data")
    with pytest.raises(ValueError, match=rf"label\(s\) cannot be used \(.*{message}") as caught:
        load(root, source)
    assert "correct them" in str(caught.value)
    assert "\n" not in str(caught.value)
    build_index(source, root, output=tmp_path / "index")
    lines = [json.loads(line) for line in (tmp_path / "index" / "refused.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["label"] * len(lines)
    with pytest.raises(ValueError, match=r"label\(s\) cannot be used"):
        load(root, source, index=str(tmp_path / "index"))


def test_an_image_that_cannot_be_read_is_no_bad_label(tmp_path: Path) -> None:
    root = write(tmp_path / "data", "webdataset", [0, 1] * 4)
    (root / "more.tar").write_bytes(mini.tar_of([("z.png", b"GIF89a"), ("z.cls", b"1"), ("y.png", mini.files()[0])]))
    assert load(root, "webdataset").bad == 2  # no image, and no label beside the image


def test_values_of_a_feature_are_counted() -> None:
    numbers = b"".join(mini.varint(number) for number in (1, 300, 70_000))
    found = read_example(
        example(a=feature(3, numbers, numbers), b=feature(1, b"x", b"y"), c=feature(2, bytes(8)), d=feature(3, b""))
    )
    assert (found["a"].values, found["a"].integer) == (6, 1)
    assert (found["b"].values, found["b"].kind) == (2, "bytes")
    assert (found["c"].integer, found["c"].kind) == (None, "floats")
    assert found["d"].kind is None


@pytest.mark.parametrize(("compress", "name"), [(gzip.compress, "GZIP"), (zlib.compress, "ZLIB")])
def test_compressed_records_are_named(tmp_path: Path, compress: Callable[[bytes], bytes], name: str) -> None:
    root = write(tmp_path / "data", "tfrecord", [1, 2])
    path = root / "train.tfrecord"
    path.write_bytes(compress(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{name}-compressed TFRecord: decompress it"):
        load(root, "tfrecord")


def test_names_of_tensorflow_datasets_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = example(image__encoded=b"", image=feature(1, mini.files()[0]), label=feature(3, b"\x01"))
    (tmp_path / "data" / "train.tfrecord").write_bytes(mini.record(data))
    with pytest.raises(ValueError, match=r"a name of TensorFlow Datasets.*image/encoded and image/class/label"):
        load(tmp_path / "data", "tfrecord")


def test_the_command_ends_with_the_labels_fault_each_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data", "tfrecord", [0, 1] * 3)
    command = ["index", str(root), "--source", "tfrecord", "--output", str(tmp_path / "index")]
    for _ in range(2):
        assert main(command) == 2
        assert "mpl-scale index --label_offset 0" in capfd.readouterr().err
    assert main([*command, "--label_offset", "0"]) == 0


def test_labels_of_a_registered_source_are_checked(tmp_path: Path) -> None:
    register_source("shifted_labels")(
        lambda root: ImageFiles(np.array(["a", "b"]), np.array([1, 2]), np.ones((2, 2), np.int32), ("x", "y"))
    )
    try:
        with pytest.raises(ValueError, match=r"1 label\(s\) are outside 0 to 1, the first one 2 of b"):
            load(tmp_path, "shifted_labels")
    finally:
        del SOURCES["shifted_labels"]
