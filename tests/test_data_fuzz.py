"""Whatever bytes a parser meets, it raises its documented error or none: damaged files, and random ones.

More examples: MPL_SCALE_FUZZ=100000 pytest tests/test_data_fuzz.py
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import pickle
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.encoded.many import KINDS, probe_many
from mpl_scale.data.encoded.probe import ppm, probe, probe_file
from mpl_scale.data.formats.cifar import read_batch, read_names
from mpl_scale.data.formats.example import read_example
from mpl_scale.data.formats.matfile import read_arrays
from mpl_scale.data.formats.pickled import read_pickle
from mpl_scale.data.formats.table import NAMES as TABLES
from mpl_scale.data.formats.tar import read_members
from mpl_scale.data.formats.tfrecord import read_records
from mpl_scale.data.index.format import FORMATS, MalformedShard, ScanOptions, Shard, classes_file
from tests.support import mini_imagenet as mini
from tests.support.photographs import encoded

EXAMPLES = int(os.environ.get("MPL_SCALE_FUZZ", "150"))
SEEDS = range(3)


def tfrecords(content: bytes) -> None:
    for offset, record, intact in _from_file(read_records, content):
        assert content[offset : offset + len(record)] == record
        if intact:
            read_example(record)


def examples(content: bytes) -> None:
    for feature in read_example(content).values():
        if feature.span is not None:
            start, length = feature.span
            assert 0 <= start <= start + length <= len(content)


def members(content: bytes) -> None:
    for member in _from_file(read_members, content):
        assert 0 <= member.offset <= member.offset + member.length <= len(content)
        if member.refused is None:
            assert not Path(member.name).is_absolute()
            assert ".." not in Path(member.name).parts


def pickles(content: bytes) -> None:
    read_pickle(content)


def batches(content: bytes) -> None:
    with _file_of(content) as path:
        pixels, labels = read_batch(path)
        assert pixels.shape == (len(labels), 3, 32, 32)


def names(content: bytes) -> None:
    with _file_of(content) as path:
        assert len({str(name) for name in read_names(path)}) == 100


def mats(content: bytes) -> None:
    for array in _from_file(read_arrays, content):
        count = int(np.prod(array.shape, dtype=np.float64))
        for start in range(0, min(count, 10**6), 4096):
            array.values.read(min(4096, count - start))


def headers(content: bytes) -> None:
    height, width = probe(content).stored
    assert height * width > 0
    assert type(height) is type(width) is int


def many_headers(content: bytes) -> None:
    """What is found of many at once is what is found of each."""
    images = [_valid()["png"], content, _valid()["jpeg"]]
    ends = np.cumsum([len(image) for image in images])
    kinds, sizes = probe_many(np.frombuffer(b"".join(images), np.uint8), np.array([0, *ends[:-1]]), ends)
    assert kinds[0]
    assert kinds[2]
    for row in np.flatnonzero(kinds):
        header = probe(images[row])
        assert (header.label, *header.stored) == (KINDS[kinds[row]], *sizes[row])


def header_files(content: bytes) -> None:
    with _file_of(content) as path:
        try:
            found = probe_file(str(path))
        except UnreadableImage:
            return
        assert found.stored == probe(content).stored


def whole_arrays(content: bytes) -> None:
    _scan("arrays", "images.npy", content, {"labels.npy": _valid()["labels"]})
    _scan("arrays", "images.npy", _valid()["npy"], {"labels.npy": content})


def whole_folder(content: bytes, source: str = "folder") -> None:
    """A file of a folder is an image, or refused."""
    with _folder_of({"a/1.png": content}) as root:
        scan = FORMATS[source].scan(root, Shard("a"), options=ScanOptions(), unpacked=root / "unpacked")
        assert scan.name_ends.tolist() == [5]
        assert scan.entries["length"].tolist() == [0 if scan.refusals else len(content)]


def whole_tar(content: bytes) -> None:
    _scan("webdataset", "train.tar", content)
    _scan("webdataset", "train.tar.gz", content)
    _scan("webdataset", "train.tgz", gzip.compress(content, 1, mtime=0))


def whole_cifar(content: bytes) -> None:
    _scan("cifar10", "data_batch_1", content)
    _scan("cifar10", "data_batch_1.bin", content)


def whole_stl10(content: bytes) -> None:
    labels = {"train_y.bin": _valid()["stl10, labels"]}
    _scan("stl10", "train_X.bin", content, labels)
    _scan("stl10", "unlabeled_X.bin", content)
    _scan("stl10", "train_X.bin", _valid()["stl10"], {"train_y.bin": content})


def whole_table(content: bytes) -> None:
    """Whatever it says, only a ValueError is raised."""
    for name in TABLES:
        with _folder_of({name: content, "1.png": _valid()["png"]}) as root, contextlib.suppress(ValueError):
            for shard in FORMATS["table"].shards(root):
                scan = FORMATS["table"].scan(root, shard, options=ScanOptions(), unpacked=root / "unpacked")
                assert len(scan.entries) == len(scan.name_ends)


def lists_of_names(content: bytes) -> None:
    """Files of class names beside the shards: each is what it has to be, or a ValueError is raised."""
    with _folder_of({"classes.txt": content}) as root, contextlib.suppress(ValueError):
        found = classes_file(root)
        assert found is not None
        assert len(found) == len(set(found)) > 1
    cifar = [f"data_batch_{number}" for number in range(1, 6)]
    for source, shards, listing in (
        ("stl10", ["train_X.bin"], "class_names.txt"),
        ("cifar10", cifar, "batches.meta.txt"),
        ("cifar10", cifar, "batches.meta"),
    ):
        with _folder_of({**dict.fromkeys(shards, b""), listing: content}) as root, contextlib.suppress(ValueError):
            assert len(FORMATS[source].shards(root)) == len(shards)


def whole_idx(content: bytes) -> None:
    images, labels = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    _scan("idx", images, content, {labels: _valid()["idx1"]})
    _scan("idx", f"{images}.gz", content, {labels: _valid()["idx1"]})
    _scan("idx", images, _valid()["idx"], {labels: content})


def _scan(source: str, name: str, content: bytes, others: dict[str, bytes] | None = None) -> None:
    """A scan refuses, and raises nothing at all."""
    with _folder_of({name: content, **(others or {})}) as root:
        scan = FORMATS[source].scan(root, Shard(name), options=ScanOptions(), unpacked=root / "unpacked")
        source_bytes = (root / "unpacked").read_bytes() if (root / "unpacked").exists() else content
        assert ((scan.entries["offset"] >= 0) & (scan.entries["length"] >= 0)).all()
        assert (scan.entries["offset"] + scan.entries["length"] <= len(source_bytes)).all()


@contextlib.contextmanager
def _folder_of(files: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        for name, content in files.items():
            mini.put(Path(folder) / name, content)
        yield Path(folder)


def _from_file(read: Callable[..., object], content: bytes) -> list:
    with tempfile.TemporaryFile(dir=_memory()) as file:
        file.write(content)
        file.seek(0)
        return list(read(file)) if read is not read_arrays else read(_kept(file))  # type: ignore[return-value]


def _kept(file: object) -> object:
    """A file that is read after this function's caller has returned."""
    return os.fdopen(os.dup(file.fileno()), "rb")  # type: ignore[attr-defined]


@contextlib.contextmanager
def _file_of(content: bytes) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(dir=_memory()) as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def _memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


PARSERS: dict[str, tuple[Callable[[bytes], None], tuple[str, ...]]] = {
    "tfrecord": (tfrecords, ("tfrecord",)),
    "example": (examples, ("example",)),
    "tar": (members, ("ustar", "gnu", "pax")),
    "pickle": (pickles, ("python 2", "protocol 0", "protocol 2", "protocol 4")),
    "cifar batch": (batches, ("python 2", "protocol 4")),
    "cifar100 names": (names, ("names, python 2", "names")),
    "mat": (mats, ("mat", "mat, compressed")),
    "probe": (headers, ("png", "jpeg", "ppm", "long jpeg", "webp", "gif", "tiff", "bmp")),
    "probe of many": (many_headers, ("png", "jpeg", "ppm", "long jpeg")),
    "probe of a file": (header_files, ("png", "jpeg", "ppm", "long jpeg")),
    "lists of names": (lists_of_names, ("classes", "batches.meta")),
    "scan of arrays": (whole_arrays, ("npy", "labels")),
    "scan of folder": (whole_folder, ("png", "jpeg", "ppm", "webp", "gif", "tiff", "bmp")),
    "scan of images": (functools.partial(whole_folder, source="images"), ("png", "jpeg")),
    "scan of tfrecord": (functools.partial(_scan, "tfrecord", "train.tfrecord"), ("tfrecord",)),
    "scan of webdataset": (whole_tar, ("ustar", "gnu", "pax", "ustar, packed")),
    "scan of parquet": (functools.partial(_scan, "parquet", "train.parquet"), ("parquet", "parquet, dictionary")),
    "scan of arrow": (functools.partial(_scan, "arrow", "train.arrow"), ("arrow",)),
    "scan of cifar10": (whole_cifar, ("python 2", "protocol 4", "binary")),
    "scan of cifar100": (functools.partial(_scan, "cifar100", "train"), ("cifar100, python 2", "cifar100")),
    "scan of stl10": (whole_stl10, ("stl10", "stl10, labels")),
    "scan of idx": (whole_idx, ("idx", "idx1", "idx, packed")),
    "scan of table": (whole_table, ("table", "table, parquet")),
    "scan of svhn": (functools.partial(_scan, "svhn", "train_32x32.mat"), ("mat", "mat, compressed")),
}


@functools.cache
def _valid() -> dict[str, bytes]:
    """Small valid files to damage."""
    import io
    import tarfile

    images, labels = mini.pictures()
    small = [encoded(Image.fromarray(image[:4, :4])) for image in images[:4]]
    two = [("a/1.png", small[0]), ("a/1.cls", b"3"), ("a/2.png", small[1]), ("a/2.json", b'{"label": 4}')]
    long = [("d" * 200 + "/1.png", small[0]), ("d" * 200 + "/1.cls", b"3")]
    jpeg = encoded(Image.fromarray(images[0][:8, :8]), "JPEG")
    array, names = io.BytesIO(), io.BytesIO()
    np.save(array, images[:2, :3, :3])
    np.save(names, labels[:2])
    grey, grey_labels = mini.idx(images[:2, :4, :4], labels[:2])
    planes = images[:1].transpose(0, 3, 1, 2).reshape(1, -1)
    rows = mini.table(small, [0, 1, None, 1], ["a", "b"])
    return {
        **{kind: encoded(Image.fromarray(images[0][:8, :8]), kind) for kind in ("webp", "gif", "tiff", "bmp")},
        "batches.meta": pickle.dumps({"label_names": ["cat", "dog"]}, 2),
        "classes": b"cat\ndog\ncow\n",
        "ustar, packed": gzip.compress(mini.tar_of(two, format=tarfile.USTAR_FORMAT), mtime=0),
        "table, parquet": mini.parquet(
            pyarrow.table({"path": ["1.png", "a/2.png"], "label": ["cat", "dog"], "split": ["", "test"]}),
            compression="none",
        ),
        "table": b'path,label,split\n1.png,cat,train\n"a/2.png",dog,test\n',
        "parquet": mini.parquet(rows, use_dictionary=False, compression="none", row_group_size=2),
        "parquet, dictionary": mini.parquet(rows),
        "arrow": mini.arrow(rows, rows=2),
        "tfrecord": b"".join(mini.record(mini.example(content, 1)) for content in small[:2]),
        "example": mini.example(small[0], 7, note=b"x"),
        "ustar": mini.tar_of(two, format=tarfile.USTAR_FORMAT)[:5120],
        "gnu": mini.tar_of(long, format=tarfile.GNU_FORMAT)[:6144],
        "pax": mini.tar_of(long, format=tarfile.PAX_FORMAT)[:6144],
        "python 2": mini.cifar_batch(slice(0, 1), python=2),
        "protocol 0": mini.cifar_batch(slice(0, 1), protocol=0),
        "protocol 2": mini.cifar_batch(slice(0, 1), protocol=2),
        "protocol 4": mini.cifar_batch(slice(0, 1), protocol=4),
        "cifar100": mini.cifar_batch(slice(0, 1), protocol=4, key=b"fine_labels"),
        "cifar100, python 2": mini.cifar_batch(slice(0, 1), python=2, key=b"fine_labels"),
        "names": mini.cifar100_meta(protocol=4),
        "names, python 2": mini.cifar100_meta(python=2),
        "stl10": mini.stl10(slice(0, 1)),
        "stl10, labels": b"\3",
        "mat": mini.mat(images[:2, :4, :4], labels[:2], compress=False),
        "mat, compressed": mini.mat(images[:2, :4, :4], labels[:2]),
        "png": small[0],
        "jpeg": jpeg,
        "ppm": ppm(images[0].tobytes(), height=32, width=32),
        "long jpeg": jpeg[:2] + 2 * (b"\xff\xfe" + struct.pack(">H", 60000) + bytes(59998)) + jpeg[2:],
        "npy": array.getvalue(),
        "labels": names.getvalue(),
        "idx": grey,
        "idx1": grey_labels,
        "idx, packed": gzip.compress(grey, mtime=0),
        "binary": b"\3" + planes.tobytes(),
    }


@st.composite
def damaged(draw: st.DrawFn, kinds: tuple[str, ...]) -> bytes:
    """A valid file after some edits: bytes and words set to telling values, pieces cut out, doubled, put in; a repaired
    checksum where the format would stop at a wrong one; or bytes of no file at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=600))
    kind = draw(st.sampled_from(kinds))
    content = bytearray(_valid()[kind])
    header = draw(st.booleans())  # where the structure is
    for _ in range(draw(st.integers(1, 6))):
        if not content:
            break
        limit = min(len(content), 700) if header else len(content)
        at = draw(st.integers(0, limit - 1))
        edit = draw(st.integers(0, 5))
        if edit == 0:
            content[at] = draw(st.sampled_from([0, 1, 0x2F, 0x30, 0x7F, 0x80, 0xFE, 0xFF]))
        elif edit == 1:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif edit == 2:
            value = draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(content), 1 << 20]))
            content[at : at + 4] = struct.pack(draw(st.sampled_from(["<I", ">I"])), value)
        elif edit == 3:
            del content[at : at + draw(st.integers(1, 600))]
        elif edit == 4:
            piece = content[at : at + draw(st.integers(1, 600))]
            content[at:at] = piece
        else:
            content[at : at + 1] = draw(st.binary(max_size=12))
    result = bytes(content)
    if kind in ("ustar", "gnu", "pax") and draw(st.booleans()):
        return _with_tar_checksums(result)
    if kind == "tfrecord" and draw(st.booleans()):
        return mini.record(result[12:-4])
    if kind == "idx" and draw(st.booleans()):
        return gzip.compress(result, mtime=0)
    if kind == "mat" and draw(st.booleans()):
        packed = zlib.compress(result[128:])
        return result[:128] + struct.pack("<II", 15, len(packed)) + packed
    return result


def _with_tar_checksums(content: bytes) -> bytes:
    """Every block whose place looks like a header's gets the checksum it should have."""
    blocks = [content[start : start + 512] for start in range(0, len(content), 512)]
    for number, block in enumerate(blocks):
        if len(block) == 512 and block[257:262] == b"ustar":
            total = sum(block[:148]) + sum(block[156:]) + 8 * 32
            blocks[number] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


def test_every_format_is_here() -> None:
    assert {f"scan of {name}" for name in FORMATS} <= PARSERS.keys()


@pytest.mark.parametrize("parser", PARSERS)
def test_only_the_documented_error(parser: str) -> None:
    read, kinds = PARSERS[parser]
    documented = UnreadableImage if parser.startswith("probe") else MalformedShard
    for kind in kinds:
        read(_valid()[kind])  # what is damaged below is good before

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        derandomize=EXAMPLES <= 1000,  # the suite tries the same files each time; a long run tries new ones
        database=None,
    )
    @given(damaged(kinds))
    def attempt(content: bytes) -> None:
        with contextlib.suppress(documented):
            read(content)

    attempt()
