"""Every source reads the same pictures to the same pixels and labels; what is damaged is refused, with the reason."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import ImageFormat, ImageSet, Splits, evaluation_batches, load_images
from mpl_scale.data.formats.pickled import read_pickle
from mpl_scale.data.formats.tfrecord import masked_crc32c
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.format import FORMATS, MalformedShard, ScanOptions
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.mesh import build_mesh
from tests.support import mini_imagenet as mini

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))


def decoded(images: ImageSet, side: int = mini.SIDE) -> list[tuple[bytes, int]]:
    """Pixels and label of every image, through the decode pipeline that trains."""
    everything = np.setdiff1d(np.arange(len(images), dtype=np.int64), images.refused)
    splits = Splits(images=images, test=everything, labelled=everything, unlabelled=everything)
    found = []
    for batch in evaluation_batches(
        DataConfig(**PLAIN, evaluation_batch=64),
        splits,
        images=ImageFormat(image_size=side, dtype=torch.float64),
        mesh=build_mesh(device=torch.device("cpu")),
    ):
        pixels = (batch.images[batch.valid] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        found += [(p.tobytes(), int(label)) for p, label in zip(pixels, batch.labels[batch.valid], strict=True)]
    return found


def expected(source: str = "") -> list[tuple[bytes, int]]:
    images, labels = mini.as_read(source)
    assert len({image.tobytes() for image in images}) == mini.COUNT
    return [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]


def by_class(pairs: list[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    """The order of a folder tree: class by class, otherwise as given."""
    return sorted(pairs, key=lambda pair: pair[1])


@pytest.mark.parametrize("kind", mini.WRITERS)
def test_every_source_reads_identical_pixels_and_labels(tmp_path: Path, kind: str) -> None:
    source, write = mini.WRITERS[kind]
    write(tmp_path / "data")
    images = load_images(DataConfig(source=source, root=str(tmp_path / "data")))
    side = mini.as_read(source)[0].shape[1]
    assert decoded(images, side) == (by_class(expected()) if source == "folder" else expected(source))
    assert (images.sizes == side).all()
    assert not len(images.refused)


def test_a_folder_tree_through_an_index(tmp_path: Path) -> None:
    mini.write_folder(tmp_path / "data")
    (tmp_path / "data" / "class0" / "notes.txt").write_text("not listed")
    build_index("folder", tmp_path / "data", output=tmp_path / "index")
    config = DataConfig(source="folder", root=str(tmp_path / "data"))
    plain, indexed = load_images(config), load_images(config.model_copy(update={"index": str(tmp_path / "index")}))
    assert decoded(indexed) == by_class(expected())
    assert [indexed.name(sample) for sample in range(48)] == plain.paths.tolist()
    assert np.array_equal(indexed.labels, plain.labels)
    assert indexed.classes == plain.classes


def test_jpeg_files_come_out_of_shards_byte_for_byte(tmp_path: Path) -> None:
    originals = mini.files("JPEG")
    for source in ("tfrecord", "webdataset", "parquet", "arrow"):
        mini.WRITERS[source][1](tmp_path / source, "JPEG")
        images = load_images(DataConfig(source=source, root=str(tmp_path / source)))
        assert [images.read(sample).tobytes() for sample in range(48)] == originals


def test_labels_of_other_customs_and_class_names(tmp_path: Path) -> None:
    mini.write_tfrecord(tmp_path / "zero", first=0)
    config = DataConfig(source="tfrecord", root=str(tmp_path / "zero"), label_offset=0)
    images = load_images(config)
    assert images.labels.tolist() == mini.pictures()[1].tolist()
    assert images.classes == tuple(f"name of {label}" for label in range(6))
    with pytest.raises(ValueError, match=r"8 label\(s\) cannot be used .*set mpl_scale\.data\.label_offset = 0 "):
        load_images(config.model_copy(update={"label_offset": None, "max_bad_fraction": 1.0}))
    (tmp_path / "zero" / "classes.txt").write_text("\n".join("abcdefghi"))
    build_index("tfrecord", tmp_path / "zero", output=tmp_path / "named", options=ScanOptions(label_offset=0))
    assert IndexedImages(tmp_path / "named").classes == tuple("abcdefghi")


@pytest.mark.parametrize("length", [0, 1, 4, 63, 64, 127, 128, 129, 1000, 4099])
def test_the_checksum_is_its_bitwise_definition(length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    assert struct.pack("<I", masked_crc32c(data)) == mini.masked(data)


def test_the_checksum_is_that_of_rfc_3720_masked() -> None:
    for data, crc in ((b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)):  # RFC 3720, B.4
        assert mini.crc32c_bitwise(data) == crc
        assert masked_crc32c(data) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scan(source: str, root: Path) -> tuple[IndexedImages, list[str]]:
    """An index of the data set, and what was refused."""
    build_index(source, root, output=root.parent / "index")
    images = IndexedImages(root.parent / "index")
    return images, [f"{where.rpartition('/')[2]}: {reason}" for where, reason in images.refusals(100).items()]


def test_damaged_records_of_a_tfrecord(tmp_path: Path) -> None:
    root = tmp_path / "data"
    mini.write_tfrecord(root, shards=4)
    paths = sorted(root.iterdir())
    flipped = bytearray(paths[0].read_bytes())
    flipped[200] ^= 1  # in the first record's data
    paths[0].write_bytes(flipped)
    header = bytearray(paths[1].read_bytes())
    header[0] ^= 1
    paths[1].write_bytes(header)
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    paths[3].write_bytes(
        paths[3].read_bytes()
        + mini.record(b"\x00nothing")
        + mini.record(mini.example(b"GIF89a", 3))
        + mini.record(mini.field(1, b""))
    )
    images, refused = scan("tfrecord", root)
    assert len(images) == 12 + 0 + 11 + 12 + 3
    assert images.refused.tolist() == [0, 35, 36, 37]
    assert refused[0].endswith("byte 12: wrong checksum of the record's data")
    assert refused[1].endswith("byte 0: the rest of the shard is lost: wrong checksum of a record's length")
    assert "the rest of the shard is lost: it ends inside a record of" in refused[2]
    assert [line.rpartition(": ")[2] for line in refused[3:]] == [
        "a field leaves its message",
        "neither a PNG nor a JPEG file, nor another that is read",
        "the example has no image/encoded",
    ]
    lost = {0, *range(12, 24), 35}
    assert decoded(images) == [pair for row, pair in enumerate(expected()) if row not in lost]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    mini.write_tfrecord(tmp_path, shards=4)
    (tmp_path / "train-00002-of-00004").unlink()
    with pytest.raises(ValueError, match=r"holds 3 of the 4 shards 'train-\*-of-00004'; number 2 is missing"):
        build_index("tfrecord", tmp_path, output=tmp_path / "index")


def test_hostile_and_damaged_members_of_a_tar(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))

        picture = mini.files()[0]
        add("folder", kind=tarfile.DIRTYPE)
        add("../outside.png", picture)
        add("/etc/absolute.png", picture)
        add("link.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.png", kind=tarfile.LNKTYPE, link="good.png")
        add("device.png", kind=tarfile.CHRTYPE)
        add("fifo.png", kind=tarfile.FIFOTYPE)
        add("unlabelled.png", picture)
        add("wordy.png", picture)
        add("wordy.cls", b"three")
        add("listed.png", picture)
        add("listed.json", b"[1]")
        add("gif.png", b"GIF89a" + bytes(100))
        add("gif.cls", b"0")
        add("alone.cls", b"1")
        add("x" * 300 + "/long.png", picture)
        add("x" * 300 + "/long.cls", b"1")
        add("x" * 300 + "/long.depth.png", b"another ending is passed over")
        add("good.JPG", mini.files("JPEG")[1])
        add("good.cls", b"5\n")
    whole = buffer.getvalue()
    (root / "a.tar").write_bytes(whole)
    cut = mini.tar_of(mini.samples(range(8)))
    (root / "b.tar").write_bytes(cut[: cut.index(b"a/0005.png") + 700])  # inside the data of picture 5
    images, refused = scan("webdataset", root)
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 5, 0, 1, 2, 3, 4]
    assert images.refused.tolist() == [0, 1, 2, 3]
    text = "\n".join(refused)
    for name, reason in {
        "../outside.png": "its path leaves the archive",
        "/etc/absolute.png": "its path leaves the archive",
        "link.png": "a symbolic link is not read",
        "hard.png": "a hard link is not read",
        "device.png": "a device is not read",
        "fifo.png": "a pipe is not read",
    }.items():
        assert f"member '{name}': {reason}" in text
    for reason in (
        "no .cls or .json member beside the image",
        "the label 'three' is no number",
        "the .json member has no whole number 'label'",
        "a gif file that PIL cannot open",
        "member 'alone.cls' has no image beside it",
        "the rest of the shard is lost: it ends inside the member 'a/0005.png'",
    ):
        assert reason in text
    assert len(refused) == images.bad == 12
    assert sorted(os.listdir(tmp_path)) == [".index.lock", "data", "index"]  # nothing was extracted


class _Trap:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (os.mkdir, ("trap",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MalformedShard, match="more than data"):
        read_pickle(pickle.dumps({"data": _Trap()}, protocol=protocol))
    assert not (tmp_path / "trap").exists()
    with pytest.raises(MalformedShard, match="another type than uint8"):
        read_pickle(pickle.dumps({"data": np.array([print], object)}, protocol=2))


def test_a_pickle_cannot_take_memory_that_it_does_not_hold() -> None:
    with pytest.raises(MalformedShard):
        read_pickle(b"\x80\x04B" + (1 << 31).to_bytes(4, "little") + b"short")  # BINBYTES of 2 GB
    assert read_pickle(b"\x80\x02Nr\xff\xff\xff\x7f.") is None  # a memo of 2**31 entries costs one
    huge = pickle.dumps(np.zeros(4, np.uint8), protocol=2).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")
    with pytest.raises(MalformedShard, match=r"an array of 2147483647 values in 4 bytes"):
        read_pickle(huge)
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20)  # encoded a thousand times: 1 GB of 1 MB
    bomb = b"\x80\x02c_codecs\nencode\nq\x00" + text + b"X\x06\0\0\0latin1\x86q\x01" + 1000 * b"h\x00h\x01R" + b"."
    with pytest.raises(MalformedShard, match="makes more bytes of its text than it has"):
        read_pickle(bomb)


NESTED = b")" + 1_000_000 * b"\x85"
DOUBLED = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(200))
TRICKS = {
    "state of a function": b"\x80\x02c_codecs\nencode\n}X\x01\0\0\0aNsb.",
    "attributes of a function": b"\x80\x02c_codecs\nencode\nN}X\x0c\0\0\0__defaults__)s\x86b.",
    "state of a dict": b"\x80\x02}}X\x01\0\0\0aNsb.",
    "an instance": b"(S'x'\nios\nmkdir\n.",
    "an instance of an allowed name": b"(X\x01\0\0\0aX\x06\0\0\0latin1i_codecs\nencode\n.",
    "a new object": b"\x80\x02cnumpy\ndtype\n)\x81.",
    "a persistent id": b"Pos\n.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "another function of an allowed module": b"c_codecs\ndecode\n.",
    "an attribute of an allowed name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    "another codec": b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0idna!\x86R.",
    "a key nested a million times": b"\x80\x02}" + NESTED + b"Ns.",
    "keys nested a million times": b"\x80\x02}(" + NESTED + b"Nu.",
    "a dict of keys nested a million times": b"\x80\x02(" + NESTED + b"Nd.",
    "a key that takes forever": b"\x80\x02" + DOUBLED + b"}h\xc8Ns.",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_pickle_does_nothing_with_the_names_that_are_allowed(trick: str) -> None:
    with pytest.raises(MalformedShard, match=r"more than|other than|not latin1"):
        read_pickle(TRICKS[trick])


def test_lost_batches_are_listed_and_the_others_read(tmp_path: Path) -> None:
    root = tmp_path / "data"
    mini.write_cifar_python(root)
    (root / "data_batch_2").write_bytes(pickle.dumps({"data": 1, "labels": []}))
    (root / "data_batch_3").write_bytes((root / "data_batch_3").read_bytes()[:3000])
    labels = bytearray((root / "data_batch_1").read_bytes())
    at = labels.index(b"](K") + 2
    labels[at : at + 2] = b"K\x63"  # the first label is 99
    (root / "data_batch_1").write_bytes(labels)
    images, refused = scan("cifar10", root)
    assert len(images) == 32
    assert images.refused.tolist() == [0]
    assert "label 99 is above 9, the last class" in refused[0]
    assert "data_batch_2, byte 0: the whole shard is lost: data is no uint8 [n, 3072]" in refused
    assert refused[2].startswith("data_batch_3, byte ")


def test_binary_batches_cut_short(tmp_path: Path) -> None:
    root = tmp_path / "data"
    mini.write_cifar_binary(root)
    path = root / "data_batch_5.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    images, refused = scan("cifar10", root)
    assert len(images) == 47
    assert refused == [
        "data_batch_5.bin, byte 21511: the rest of the shard is lost: the file ends 2073 bytes into an image"
    ]


def test_lost_mat_files_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    mini.write_svhn(root)
    damaged = bytearray((root / "test_32x32.mat").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF  # in the compressed pixels
    (root / "test_32x32.mat").write_bytes(damaged)
    (root / "extra_32x32.mat").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))
    images, refused = scan("svhn", root)
    assert len(images) == 20
    assert refused[0].startswith("extra_32x32.mat, byte 0: the whole shard is lost: no MATLAB file of version 5")
    assert refused[1].startswith("test_32x32.mat, byte 128: the whole shard is lost: ")


def test_arrays_of_another_kind_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    mini.write_arrays(root)
    np.save(root / "test_images.npy", np.array([print], object), allow_pickle=True)
    images, refused = scan("arrays", root)
    assert len(images) == 40
    assert "'test_images.npy' is no .npy file of plain numbers in C order" in refused[0]
    np.save(root / "images.npy", np.zeros((4, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"holds no usable image: images.npy: .*float32 \[4, 8, 8, 3\] is not uint8"):
        build_index("arrays", root, output=tmp_path / "other")


@pytest.mark.parametrize("source", sorted(FORMATS))
def test_an_empty_folder_says_what_is_missing(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match=r"mpl_scale\.data\.root = .*(holds no|holds 0)"):
        build_index(source, tmp_path, output=tmp_path / "index")
    with pytest.raises(ValueError, match=r"mpl_scale\.data\.root = null"):
        load_images(DataConfig(source=source))


def test_raw_pixels_are_a_ppm_file_that_pil_reads_too(tmp_path: Path) -> None:
    mini.write_cifar_binary(tmp_path / "data")
    images = load_images(DataConfig(source="cifar10", root=str(tmp_path / "data")))
    for sample in (0, 47):
        read = np.asarray(Image.open(io.BytesIO(images.read(sample).tobytes())))
        assert np.array_equal(read, mini.pictures()[0][sample])
