"""A made-up ImageNet of 6 classes x 8 real photographs' parts, and a writer of it for each format that is read.

The writers are written against the formats' descriptions, not against the readers: scipy writes the .mat files, pickle,
pyarrow and tarfile theirs, and the protocol buffers and checksums of TFRecord are built here, bit by bit.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import scipy.io
from PIL import Image

from tests.support.photographs import encoded, photograph

CLASSES, PER_CLASS, SIDE = 6, 8, 32
COUNT = CLASSES * PER_CLASS


@functools.cache
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [48, 32, 32, 3] and labels int64 [48], classes in turn."""
    photographs = [np.asarray(photograph(index, 320, 240)) for index in range(3)]
    images = []
    for index in range(COUNT):
        top, left = 7 * (index % 8) * 4 % 208, 41 * index % 288
        images.append(photographs[index % 3][top : top + SIDE, left : left + SIDE])
    return np.stack(images), np.arange(COUNT) % CLASSES


def twelfths(first: int, last: int) -> slice:
    """The rows of some of the pictures, as writers divide them over files."""
    return slice(len(pictures()[1]) * first // 12, len(pictures()[1]) * last // 12)


def files(kind: str = "PNG") -> list[bytes]:
    """The pictures as encoded files."""
    return [encoded(Image.fromarray(image), kind) for image in pictures()[0]]


def put(path: Path, content: bytes) -> None:
    """Write a file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_folder(root: Path, kind: str = "PNG") -> None:
    """Named so that the order within a class is that of the pictures."""
    for index, (content, label) in enumerate(zip(files(kind), pictures()[1], strict=True)):
        put(root / f"class{label}" / f"{index:03d}.{'png' if kind == 'PNG' else 'jpg'}", content)


def crc32c_bitwise(data: bytes) -> int:
    """The definition, one bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c_bitwise(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(image: bytes, label: int, **others: bytes) -> bytes:
    """A serialised tf.train.Example of Inception's layout."""
    features = {
        "image/height": field(3, field(1, varint(SIDE))),
        "image/class/label": field(3, field(1, varint(label))),  # packed
        "image/class/text": field(1, field(1, f"name of {label}".encode())),
        "image/object/bbox/xmin": field(2, field(1, struct.pack("<2f", 0.25, 0.5))),
        "image/encoded": field(1, field(1, image)),
        **{name: field(1, field(1, content)) for name, content in others.items()},
    }
    return field(1, b"".join(field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items()))


def record(data: bytes) -> bytes:
    """A TFRecord record."""
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def _shards(shards: int) -> list[range]:
    count = len(pictures()[1])
    each = -(-count // shards)
    return [range(first, min(count, first + each)) for first in range(0, count, each)]


def write_tfrecord(root: Path, kind: str = "PNG", *, shards: int = 4, first: int = 1) -> None:
    contents, labels = files(kind), pictures()[1]
    for shard, rows in enumerate(_shards(shards)):
        records = [record(example(contents[row], int(labels[row]) + first)) for row in rows]
        put(root / f"train-{shard:05d}-of-{shards:05d}", b"".join(records))


def tar_of(members: Sequence[tuple[str, bytes]], **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def samples(rows: range, kind: str = "PNG") -> list[tuple[str, bytes]]:
    """The members of these pictures: labels as .cls of the even ones, .json of the odd ones."""
    contents, labels, members = files(kind), pictures()[1], []
    for row in rows:
        label = json.dumps({"label": int(labels[row]), "w": 1}) if row % 2 else str(labels[row])
        members.append((f"a/{row:04d}.{'png' if kind == 'PNG' else 'jpg'}", contents[row]))
        members.append((f"a/{row:04d}.{'json' if row % 2 else 'cls'}", label.encode()))
    return members


def write_webdataset(root: Path, kind: str = "PNG", *, shards: int = 3) -> None:
    for shard, rows in enumerate(_shards(shards)):
        style = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[shard % 3]
        put(root / f"train-{shard:06d}.tar", tar_of(samples(rows, kind), format=style))


def table(contents: Sequence[bytes | None], labels: Sequence[int | None], names: Sequence[str] = ()) -> pyarrow.Table:
    """As `datasets` lays out images and labels. names: of the classes, where the schema gives them."""
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    rows = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(contents)]
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    schema = pyarrow.schema(
        {"image": image, "label": pyarrow.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})} if names else None,
    )
    return pyarrow.table([pyarrow.array(rows, image), pyarrow.array(labels, pyarrow.int64())], schema=schema)


def parquet(table: pyarrow.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


def arrow(table: pyarrow.Table, *, rows: int = 1000, compression: str | None = None) -> bytes:
    """A stream, as save_to_disk writes it. rows: of a batch."""
    buffer = io.BytesIO()
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_stream(buffer, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return buffer.getvalue()


def _tables(shards: int, kind: str) -> list[pyarrow.Table]:
    contents, labels = files(kind), pictures()[1].tolist()
    names = [f"name of {label}" for label in range(max(labels) + 1)]
    return [table(contents[r.start : r.stop], labels[r.start : r.stop], names) for r in _shards(shards)]


def write_parquet(root: Path, kind: str = "PNG", *, shards: int = 3, plain: bool = False) -> None:
    """As on Hugging Face's hub; plain: the column holds the bytes themselves."""
    for number, rows in enumerate(_tables(shards, kind)):
        if plain:
            rows = rows.set_column(0, "image", rows["image"].combine_chunks().field("bytes"))
        content = parquet(rows, row_group_size=5, compression=("snappy", "zstd", "none")[number % 3])
        put(root / "data" / f"train-{number:05d}-of-{shards:05d}.parquet", content)


def write_arrow(root: Path, kind: str = "PNG", *, shards: int = 3) -> None:
    """As DatasetDict.save_to_disk."""
    put(root / "dataset_dict.json", b'{"splits": ["train"]}')
    for name in ("dataset_info.json", "state.json"):
        put(root / "train" / name, b"{}")
    for number, rows in enumerate(_tables(shards, kind)):
        put(root / "train" / f"data-{number:05d}-of-{shards:05d}.arrow", arrow(rows, rows=5))


def _batches() -> list[tuple[str, slice]]:
    """CIFAR's file names, with a sixth of the pictures each: 8."""
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return [(name, twelfths(2 * index, 2 * index + 2)) for index, name in enumerate(names)]


def write_cifar_binary(root: Path) -> None:
    images, labels = pictures()
    for name, rows in _batches():
        planes = images[rows].transpose(0, 3, 1, 2).reshape(-1, 3 * SIDE * SIDE)
        labelled = np.concatenate([labels[rows, None].astype(np.uint8), planes], axis=1)
        put(root / f"{name}.bin", labelled.tobytes())


def cifar_batch(
    rows: slice = slice(0, 8), protocol: int = 2, python: int = 3, key: bytes = b"labels", **others: object
) -> bytes:
    """A pickled batch; Python 2 wrote text for the keys, and its strings for bytes. others: further values by key."""
    images, labels = pictures()
    batch = {
        b"batch_label": b"training batch",
        key: labels[rows].tolist(),
        **{name.encode(): value for name, value in others.items()},
        b"data": np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2)).reshape(-1, 3072),
        b"filenames": [b"%d.png" % row for row in range(8)],
    }
    if python == 2:
        return python2_pickle(batch)
    named = {key.decode(): value for key, value in batch.items()} if protocol > 2 else batch
    return pickle.dumps(named, protocol=protocol)


def python2_pickle(batch: dict[bytes, object]) -> bytes:
    """Protocol 2 as Python 2 and its numpy wrote the official files: strings are SHORT_BINSTRING and BINSTRING."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"K" + bytes([value])

    def value_of(value: object) -> bytes:
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, list):
            return b"](" + b"".join(number(v) if isinstance(v, int) else text(v) for v in value) + b"e"
        assert isinstance(value, np.ndarray)
        shape = b"".join(b"M" + struct.pack("<H", side) for side in value.shape)
        dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff"
        dtype += b"J\xff\xff\xff\xffK\x00tb"
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR(K\x01" + shape
        ) + (b"\x86" + dtype + b"\x89" + text(value.tobytes()) + b"tb")

    return b"\x80\x02}(" + b"".join(text(key) + value_of(value) for key, value in batch.items()) + b"u."


def write_cifar_python(root: Path) -> None:
    """Each file by another writer of pickles."""
    writers = [{"python": 2}, {"protocol": 0}, {"protocol": 1}, {"protocol": 2}, {"protocol": 3}, {"protocol": 4}]
    for (name, rows), writer in zip(_batches(), writers, strict=True):
        put(root / name, cifar_batch(rows, **writer))


NAMES_100 = [f"fine {label}" for label in range(100)]


def cifar100_meta(names: list[str] = NAMES_100, protocol: int = 2, python: int = 3) -> bytes:
    coarse = [f"coarse {label}" for label in range(20)]
    if python == 2:
        return python2_pickle(
            {b"fine_label_names": [n.encode() for n in names], b"coarse_label_names": [n.encode() for n in coarse]}
        )
    return pickle.dumps({"fine_label_names": names, "coarse_label_names": coarse}, protocol=protocol)


def write_cifar100(root: Path, folder: str = "", **writer: int) -> None:
    """writer: of pickles, see cifar_batch; the coarse labels are others than the fine ones."""
    for name, rows in (("train", twelfths(0, 10)), ("test", twelfths(10, 12))):
        coarse = [19] * (rows.stop - rows.start)
        put(root / folder / name, cifar_batch(rows, key=b"fine_labels", coarse_labels=coarse, **writer))
    put(root / folder / "meta", cifar100_meta(**writer))


def mat(images: np.ndarray, labels: np.ndarray, *, compress: bool = True) -> bytes:
    """X [32, 32, 3, N] and y [N, 1], where the digit 0 is called 10."""
    buffer = io.BytesIO()
    y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
    scipy.io.savemat(buffer, {"X": images.transpose(1, 2, 3, 0), "y": y}, do_compression=compress)
    return buffer.getvalue()


def mat_7_3() -> bytes:
    """How a file of version 7.3 begins: a header as of version 5 in 512 bytes, then HDF5's signature."""
    return (
        (b"MATLAB 7.3 MAT-file".ljust(116) + bytes(8) + b"\0\2IM").ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n" + bytes(88)
    )


def write_svhn(root: Path) -> None:
    images, labels = pictures()
    for name, rows in (("train", twelfths(0, 5)), ("extra", twelfths(5, 9)), ("test", twelfths(9, 12))):
        put(root / f"{name}_32x32.mat", mat(images[rows], labels[rows], compress=name != "extra"))


def write_arrays(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    images, labels = pictures()
    train, test = twelfths(0, 10), twelfths(10, 12)
    np.save(root / "images.npy", images[train])
    np.save(root / "labels.npy", labels[train].astype(np.int32))
    np.save(root / "test_images.npy", images[test])
    np.save(root / "test_labels.npy", labels[test])


def idx(images: np.ndarray, labels: np.ndarray) -> tuple[bytes, bytes]:
    """The first channel [N, H, W] as an idx3 file, and the labels as an idx1 file."""
    header = struct.pack(">I3I", 0x803, *images.shape[:3])
    return header + images[..., 0].tobytes(), struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()


def write_idx(root: Path, names: str = "{part}-{kind}-ubyte", *, packed: bool = False) -> None:
    images, labels = pictures()
    for part, rows in (("train", twelfths(0, 10)), ("t10k", twelfths(10, 12))):
        for kind, content in zip(("images-idx3", "labels-idx1"), idx(images[rows], labels[rows]), strict=True):
            name = names.format(part=part, kind=kind)
            if packed:
                put(root / f"{name}.gz", gzip.compress(content, mtime=0))
            else:
                put(root / name, content)


UNLABELLED = (5, 9)
"""Twelfths of the pictures that `write_stl10` writes without a label."""


def stl10(rows: slice) -> bytes:
    """These pictures as STL-10 stores them, each pixel three times in height and in width: 96 x 96."""
    return as_read("stl10")[0][rows].transpose(0, 3, 2, 1).tobytes()


def write_stl10(root: Path, folder: str = "") -> None:
    for name, rows in (("train", twelfths(0, 5)), ("unlabeled", twelfths(*UNLABELLED)), ("test", twelfths(9, 12))):
        put(root / folder / f"{name}_X.bin", stl10(rows))
        if name != "unlabeled":
            put(root / folder / f"{name}_y.bin", (pictures()[1][rows] + 1).astype(np.uint8).tobytes())
    for name in ("class_names.txt", "fold_indices.txt"):
        (root / folder / name).touch()


def as_read(source: str) -> tuple[np.ndarray, np.ndarray]:
    """The pictures, uint8 [48, H, W, 3], and labels, as a source's writer stores them: grey, larger, unlabelled."""
    images, labels = pictures()
    if source == "idx":
        images = images[..., :1].repeat(3, axis=-1)
    if source == "stl10":
        images, labels = images.repeat(3, axis=1).repeat(3, axis=2), labels.copy()
        labels[twelfths(*UNLABELLED)] = 0
    return images, labels


def write_table(root: Path, kind: str = "PNG", *, table: str = "csv") -> None:
    """Two folders that do not stand for classes; labels are names in CSV, numbers in parquet."""
    rows = []
    for index, (content, label) in enumerate(zip(files(kind), pictures()[1].tolist(), strict=True)):
        path = root / "images" / ("a" if index < 20 else "b") / f"{index:03d}.{'png' if kind == 'PNG' else 'jpg'}"
        put(path, content)
        rows.append({"path": str(path.relative_to(root)), "label": f"name, {label}" if table == "csv" else label})
    if table == "parquet":
        return pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "table.parquet")
    with open(root / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "path"), *((row["label"], row["path"]) for row in rows)])


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "folder": ("folder", write_folder),
    "tfrecord": ("tfrecord", write_tfrecord),
    "webdataset": ("webdataset", write_webdataset),
    "parquet": ("parquet", write_parquet),
    "parquet, plain bytes": ("parquet", functools.partial(write_parquet, plain=True)),
    "arrow": ("arrow", write_arrow),
    "cifar10 binary": ("cifar10", write_cifar_binary),
    "cifar10 python": ("cifar10", write_cifar_python),
    "cifar100": ("cifar100", functools.partial(write_cifar100, python=2)),
    "cifar100, torchvision": ("cifar100", functools.partial(write_cifar100, folder="cifar-100-python", protocol=4)),
    "svhn": ("svhn", write_svhn),
    "stl10": ("stl10", write_stl10),
    "idx": ("idx", write_idx),
    "idx, packed": ("idx", functools.partial(write_idx, packed=True)),
    "arrays": ("arrays", write_arrays),
    "table": ("table", write_table),
    "table, parquet": ("table", functools.partial(write_table, table="parquet")),
}
"""The source and a writer by format."""
