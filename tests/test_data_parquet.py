"""Sources parquet and arrow: which columns are read, names of classes, and what is refused of a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pytest

from mpl_scale.cli import main
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.format import FORMATS, ScanOptions, Shard
from tests.support import mini_imagenet as mini
from tests.support.labelled_sets import load, write

SOURCES = {"parquet": mini.parquet, "arrow": mini.arrow}
LABELS = [0, 1, 2, 0, 1, 2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))


def pictures(count: int = len(LABELS)) -> list[bytes | None]:
    return list(mini.files()[:count])


def put(root: Path, source: str, table: pyarrow.Table, name: str = "train", **options: object) -> Path:
    """The root, with the table as one more file in it."""
    path = root / f"{name}.{source}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(SOURCES[source](table, **options))
    return root


def images_as(kind: pyarrow.DataType, rows: list[bytes | None] | None = None) -> pyarrow.Table:
    """The pictures in a column of another type."""
    rows = pictures() if rows is None else rows
    values = [{"bytes": row} for row in rows] if pyarrow.types.is_struct(kind) else rows
    return pyarrow.table({"image": pyarrow.array(values, kind), "label": LABELS})


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "kind",
    [pyarrow.binary(), pyarrow.large_binary(), pyarrow.struct({"x": pyarrow.int8(), "bytes": pyarrow.large_binary()})],
    ids=["binary", "large binary", "struct"],
)
def test_every_type_of_bytes_is_read(tmp_path: Path, source: str, kind: pyarrow.DataType) -> None:
    images = load(put(tmp_path / "data", source, images_as(kind)), source)
    assert [images.read(sample).tobytes() for sample in range(len(LABELS))] == pictures()
    assert images.labels.tolist() == LABELS
    assert images.bad == 0


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_no_image_is_refused_and_keeps_its_place(tmp_path: Path, source: str) -> None:
    contents = pictures()
    contents[1], contents[3], contents[4] = None, b"", b"no image at all"
    table = mini.table(contents, LABELS)
    images = load(put(tmp_path / "data", source, table), source)
    assert images.refused.tolist() == [1, 3, 4]
    assert [images.read(sample).tobytes() for sample in (0, 2, 5)] == [contents[row] for row in (0, 2, 5)]
    text = " ".join(images.meta["reasons"])
    for reason in ("row N has no image, or only the path of one", "the file is empty", "neither a PNG nor a JPEG"):
        assert reason in text
    nothing = table.set_column(0, "image", pyarrow.array([None] * len(LABELS), table.schema.field("image").type))
    with pytest.raises(ValueError, match=r"holds no usable image: .*row 0 has no image"):
        load(put(tmp_path / "nothing", source, nothing), source)


def labelled(kind: pyarrow.DataType, values: Sequence[object]) -> pyarrow.Table:
    return images_as(pyarrow.binary()).set_column(1, "label", pyarrow.array(values, kind))


FAULTS: dict[str, tuple[Callable[[], pyarrow.Table], str]] = {
    "null": (lambda: mini.table(pictures(), [0, 1, None, 0, 1, 2]), "the label of row 2 is null"),
    "negative": (lambda: mini.table(pictures(), [0, 1, -1, 0, 1, 2]), "label -1 is below 0"),
    "too large": (lambda: mini.table(pictures(), LABELS, ["a", "b"]), "label 2 is above 1, the last class"),
    "floats": (lambda: labelled(pyarrow.float64(), LABELS), "column 'label' is double, not int64"),
    "text": (lambda: labelled(pyarrow.string(), list("abcabc")), "column 'label' is string, not int64"),
    "lists": (lambda: labelled(pyarrow.list_(pyarrow.int64()), [[0]] * 6), "column 'label' is list<.*>, not int64"),
    "bools": (lambda: labelled(pyarrow.bool_(), [True] * 6), "column 'label' is bool, not int64"),
    "another name": (
        lambda: images_as(pyarrow.binary()).rename_columns(["image", "fine_label"]),
        "no column 'label', or several, but 'image', 'fine_label'; rename",
    ),
    "twice": (
        lambda: images_as(pyarrow.binary()).append_column("label", pyarrow.array(LABELS)),
        "no column 'label', or several, but 'image', 'label', 'label'; rename",
    ),
    "other classes": (lambda: mini.table(pictures(), LABELS, ["c", "b", "a"]), "not those of the first shard"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_label_that_cannot_be_used_is_an_error(tmp_path: Path, source: str, fault: str) -> None:
    make, message = FAULTS[fault]
    good = mini.table(pictures(2), [0, 1], ["a", "b"] if fault in ("too large", "other classes") else ())
    root = put(put(tmp_path / "data", source, good), source, make(), "train-more")
    with pytest.raises(ValueError, match=rf"label\(s\) cannot be used \(.*{message}"):
        load(root, source)


IMAGES = {
    "another name": (
        images_as(pyarrow.binary()).rename_columns(["img", "label"]),
        "no column 'image', or several, but 'img', 'label'",
    ),
    "paths": (images_as(pyarrow.string(), ["a.png"] * 6), "column 'image' is string, neither binary nor a struct"),
    "a list": (
        pyarrow.table({"image": pyarrow.array([[1]] * 6), "label": LABELS}),
        "column 'image' is list<.*>, neither binary",
    ),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", IMAGES)
def test_another_column_of_images_is_an_error(tmp_path: Path, source: str, name: str) -> None:
    table, message = IMAGES[name]
    root = put(put(tmp_path / "data", source, mini.table(pictures(), LABELS)), source, table, "train-more")
    with pytest.raises(ValueError, match=rf"1 shard\(s\) .*{source}': the whole shard is lost: .*{message}"):
        load(root, source)


@pytest.mark.parametrize("source", SOURCES)
def test_names_of_the_classes(tmp_path: Path, source: str) -> None:
    root = put(tmp_path / "data", source, mini.table(pictures(), LABELS, ["cat", "dog", "cow"]))
    (root / "classes.txt").write_text("a\nb\nc\n")
    assert load(root, source).classes == ("cat", "dog", "cow")
    put(root, source, mini.table(pictures(), LABELS))
    assert load(root, source).classes == ("a", "b", "c")
    for metadata in (b"{", b"[]", b'{"info": {"features": {"label": {"names": [1, 2, 3]}}}}', b"[" * 100_000, b"\xff"):
        put(root, source, mini.table(pictures(), LABELS).replace_schema_metadata({b"huggingface": metadata}))
        assert load(root, source).classes == ("a", "b", "c")


@pytest.mark.parametrize("source", SOURCES)
def test_parts_and_missing_shards(tmp_path: Path, source: str) -> None:
    for name in ("data/train-00000-of-00002-0123456789abcdef", "data/train-00001-of-00002-fedcba9876543210"):
        put(tmp_path / "data", source, mini.table(pictures(), LABELS), name)
    put(tmp_path / "data", source, mini.table(pictures(3), [0, 1, 2]), "data/test-00000-of-00001")
    put(tmp_path / "data", source, mini.table(pictures(3), [0, 1, 2]), "validation/0000")
    images = load(tmp_path / "data", source)
    assert images.ids_of("train").tolist() == list(range(12))
    assert len(images.ids_of("test")) == 6
    (tmp_path / "data" / f"data/train-00001-of-00002-fedcba9876543210.{source}").unlink()
    with pytest.raises(ValueError, match=rf"holds 1 of the 2 shards .*-of-00002\.{source}'; number 1 is missing"):
        load(tmp_path / "data", source)


def test_what_save_to_disk_keeps_beside_the_data_is_no_shard(tmp_path: Path) -> None:
    mini.write_arrow(tmp_path / "data")
    put(tmp_path / "data", "arrow", pyarrow.table({"indices": [0, 1]}), "train/cache-0123456789abcdef")
    images = load(tmp_path / "data", "arrow")
    assert len(images) == mini.COUNT
    assert not any(shard.unpacked for shard in images.shards)  # read in place
    assert images.meta["census"]["names"] == ["train/cache-0123456789abcdef.arrow"]


def test_a_damaged_page_costs_the_rows_after_it(tmp_path: Path) -> None:
    root = tmp_path / "data"
    table = mini.table(pictures(), LABELS)
    options = {"use_dictionary": False, "compression": "none", "write_statistics": False, "write_page_checksum": True}
    put(root, "parquet", table, row_group_size=2, **options)
    content = bytearray((root / "train.parquet").read_bytes())
    content[content.index(pictures()[4][8:]) + 20] ^= 1
    (root / "train.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"the rest of the shard is lost: it cannot be read: .*(checksum|CRC)"):
        load(root, "parquet")
    images = load(root, "parquet", allow_damaged_shards=True)
    assert [images.read(sample).tobytes() for sample in range(4)] == pictures()[:4]


def test_a_stream_cut_between_two_batches_is_not_whole(tmp_path: Path) -> None:
    root = put(tmp_path / "data", "arrow", mini.table(pictures(), LABELS), rows=2)
    path = root / "train.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"the rest of the shard is lost: .*end marker"):
        load(root, "arrow")


def test_compressed_batches_are_refused(tmp_path: Path) -> None:
    root = put(tmp_path / "data", "arrow", mini.table(pictures(), LABELS), compression="zstd")
    with pytest.raises(ValueError, match="its batches are compressed"):
        load(root, "arrow")


@pytest.mark.parametrize("source", SOURCES)
def test_without_pyarrow_it_is_one_line_and_an_index_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    root = write(tmp_path / "data", source, LABELS)
    build_index(source, root, output=tmp_path / "index")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["index", str(root), "--source", source, "--output", str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"mpl_scale.data.source = '{source}' needs a package: pyarrow is not installed" in line
    assert not (tmp_path / "other").exists()
    assert load(root, source, index=str(tmp_path / "index")).labels.tolist() == LABELS


@pytest.mark.parametrize("source", SOURCES)
def test_memory_does_not_grow_with_the_rows_of_a_row_group(tmp_path: Path, source: str) -> None:
    """A row group of 64 MiB, in pages of 1 MiB: pyarrow holds a batch of 16 MiB, or two while one grows."""
    content = mini.files()[0] + bytes(1 << 20)
    plain = {"use_dictionary": False, "compression": "none", "write_batch_size": 1}
    options = {"parquet": plain, "arrow": {"rows": 1}}[source]
    root = put(tmp_path, source, mini.table([content] * 64, [0] * 64), **options)
    pool = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    before = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pool)
    try:
        scan = FORMATS[source].scan(
            root, Shard(f"train.{source}"), options=ScanOptions(), unpacked=tmp_path / "unpacked"
        )
    finally:
        pyarrow.set_memory_pool(before)
    assert len(scan.entries) == 64
    assert not scan.refusals
    assert pool.max_memory() < 40 << 20


@pytest.mark.parametrize("source", SOURCES)
def test_a_table_without_rows_is_whole(tmp_path: Path, source: str) -> None:
    root = put(tmp_path / "data", source, mini.table([], []), "train-empty")
    images = load(put(root, source, mini.table(pictures(), LABELS)), source)
    assert images.labels.tolist() == LABELS
    assert images.bad == 0
