"""Source table: files and labels by a list, its parts, its classes, and rows that cannot be meant."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images, make_splits
from mpl_scale.data.formats.listing import Listing, read_summary, summarise, write_listing
from mpl_scale.data.formats.table import read_rows
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.detect import find_format
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.samples.twins import without_twins
from tests.support.image_sets import write_folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders whose names say nothing, 6 images each."""
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))
    return write_folder(tmp_path / "data", images=6)


def table(root: Path, *rows: str, columns: str = "path,label,split") -> Path:
    (root / "table.csv").write_text("\n".join([columns, *rows]) + "\n")
    return root


def load(root: Path, **settings: object) -> IndexedImages:
    images = load_images(DataConfig(source="table", root=str(root), **settings))
    assert isinstance(images, IndexedImages)
    return images


def by_name(images: IndexedImages) -> dict[str, int]:
    return {
        str(Path(images.name(sample)).relative_to(images.root)): int(images.labels[sample])
        for sample in range(len(images))
    }


def names(images: IndexedImages, ids: np.ndarray) -> set[str]:
    return {str(Path(images.name(sample)).relative_to(images.root)) for sample in ids.tolist()}


MIXED = (
    "class0/0.png,dog,train",
    "class0/1.png,cat,",
    "class1/0.png,cat,train",
    "class0/2.png,dog,val",
    "class1/1.png,cat,test",
    "./class1//2.png,,unlabelled",
)


def test_parts_labels_and_classes_are_those_of_the_table(root: Path) -> None:
    """Rows of one folder may be of several parts; names are sorted; files that are not listed are not read."""
    images = load(table(root, *MIXED))
    assert images.classes == ("cat", "dog")
    found = by_name(images)
    assert found.pop("class1/2.png") == 0  # unlabelled
    assert found == {"class0/0.png": 1, "class0/1.png": 0, "class1/0.png": 0, "class0/2.png": 1, "class1/1.png": 0}
    assert names(images, images.ids_of("test")) == {"class0/2.png", "class1/1.png"}
    assert names(images, images.ids_of("unlabelled")) == {"class1/2.png"}
    config = DataConfig(source="table", root=str(root), split="test_files", labelled_per_class=1)
    splits = make_splits(images, config=config, seed=0)
    assert names(images, splits.test) == {"class0/2.png", "class1/1.png"}
    assert names(images, splits.unlabelled) == {"class0/0.png", "class0/1.png", "class1/0.png", "class1/2.png"}
    (root / "classes.txt").write_text("dog\nbird\ncat\n")
    again = load(root)
    assert again.classes == ("dog", "bird", "cat")
    assert by_name(again)["class0/1.png"] == 2


def test_numbers_may_start_anywhere_and_a_changed_table_is_read_again(root: Path) -> None:
    rows = [f"class{label}/{number}.png,{label + 3}" for label in (0, 1) for number in range(6)]
    table(root, *rows, columns="path,label")
    with pytest.raises(ValueError, match=r"labels start at 3, not at 0; .*label_offset = 3"):
        load(root)
    images = load(root, label_offset=3)
    assert sorted(by_name(images).values()) == [0] * 6 + [1] * 6
    table(root, *rows[:-1], columns="path,label")
    assert len(load(root, label_offset=3)) == 11
    table(root, "label 4 lies first", columns="note")
    (root / "table.csv").unlink()
    rows_ = [{"path": f"class{label}/{number}.png", "label": label} for label in (0, 1) for number in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(rows_), root / "table.parquet")
    assert sorted(by_name(load(root)).values()) == [0] * 6 + [1] * 6


def test_a_table_is_a_place_and_comes_before_the_files_beside_it(root: Path, tmp_path: Path) -> None:
    """As the unlabelled place its labels are not read, nor are images of its test part trained on."""
    table(root, *MIXED)
    assert find_format(root) == find_format(root, labels=False) == "table"
    labelled = write_folder(tmp_path / "labelled", images=6, side=9)
    config = DataConfig(labelled=str(labelled), unlabelled=str(root))
    images = load_images(config)
    splits = without_twins(make_splits(images, config=config, seed=0))
    found = {Path(images.name(sample)).relative_to(root).as_posix() for sample in splits.unlabelled.tolist()}
    assert found == {"class0/0.png", "class0/1.png", "class1/0.png", "class1/2.png"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_table_read_in_pieces_is_that_read_whole(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int
) -> None:
    """Rows of folders and parts in any order; ids go by part, folder and then the table's order."""
    drawn = np.random.default_rng(0)
    rows = [
        (f"class{label}/{number}.png", str(drawn.integers(3)), str(drawn.choice(["", "test", "unlabelled"])))
        for label in (0, 1)
        for number in range(6)
    ]
    rows = [rows[row] for row in drawn.permutation(len(rows))]
    if kind == "csv":
        table(root, *map(",".join, rows))
    else:
        columns = dict(zip(("path", "label", "split"), zip(*rows, strict=True), strict=True))
        parquet.write_table(pyarrow.table(columns), root / "table.parquet", row_group_size=5)
    monkeypatch.setattr("mpl_scale.data.formats.table.PIECE_ROWS", 5)
    if workers == 1:  # which a process of its own does not see
        monkeypatch.setattr("mpl_scale.data.formats.listing.SHARD_ROWS", 2)
    build_index("table", root, output=tmp_path / "index", workers=workers)
    images = IndexedImages(tmp_path / "index")
    parts = {"": "train", "test": "test", "unlabelled": "unlabelled"}
    expected = sorted(rows, key=lambda row: (row[2] == "test", row[0].partition("/")[0], parts[row[2]]))
    assert list(by_name(images)) == [path for path, _, _ in expected]
    assert images.labels.tolist() == [0 if split == "unlabelled" else int(label) for _, label, split in expected]
    for split, part in parts.items():
        assert names(images, images.ids_of(part)) == {path for path, _, other in rows if other == split}


def test_a_path_that_stands_there_twice_is_found_pieces_apart(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpl_scale.data.formats.table.PIECE_ROWS", 2)
    rows = [f"class{label}/{number}.png,{label},train" for number in range(6) for label in (0, 1)]
    with pytest.raises(ValueError, match=r"line 14: 'class1/0\.png' stands there twice"):
        load(table(root, *rows, "./class1/0.png,1,test", rows[2]))


def test_a_table_that_changes_while_it_is_read_is_not_mixed_up(root: Path, tmp_path: Path) -> None:
    """Between the two times that it is read it gains a folder."""
    path = table(root, "class0/0.png,a,") / "table.csv"
    before = summarise(path, read_rows)
    table(root, "class1/0.png,a,", "class0/0.png,b,")
    with pytest.raises(ValueError, match=r"table\.csv' has changed while it was read; run the same command again"):
        write_listing(tmp_path / "listing", path, read_rows, lambda: before, unchanged=lambda: False)
    assert not (tmp_path / "listing").exists()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter and numpy hold at most, when a table's rows are laid on disk."""
    monkeypatch.setattr("mpl_scale.data.formats.table.PIECE_ROWS", 1000)
    monkeypatch.setattr("mpl_scale.data.formats.listing._BLOCK", 1000)

    def peak(rows: int) -> int:
        path, folder = tmp_path / f"{rows}.csv", tmp_path / f"{rows}"
        path.write_text("path,label\n" + "".join(f"class{row % 9}/{row}.png,{row % 7}\n" for row in range(rows)))
        tracemalloc.start()
        write_listing(folder, path, read_rows, lambda: summarise(path, read_rows), unchanged=lambda: True)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(Listing(folder, read_summary(folder)).labels) == rows
        return most

    few = peak(4000)
    assert peak(40_000) < 1.2 * few


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["../x.png,a,"], r"line 2: path '\.\./x\.png' is not below the table's folder"),
        (["class0/0.png,a,", "/x.png,b,"], r"line 3: path '/x\.png' is not below"),
        ([",a,"], r"line 2: path '' is not below"),
        ([",,"], r"line 2: path '' is not below"),
        (["class0/..,a,"], r"line 2: path 'class0/\.\.' is not below"),
        (["class0/a\0b.png,a,"], r"line 2: path 'class0/a\0b\.png' is not below"),
        (["class0/0.png,a,maybe"], r"line 2: split 'maybe' is none of train, training, val"),
        (["class0/0.png,a,", "class0/../class0/0.png,b,"], r"line 3: 'class0/0\.png' stands there twice"),
        (["nowhere/0.png,a,"], r"has no folder 'nowhere', which its table names"),
        ([], r"has no rows; list the images"),
        (["class0/0.png,1.0,", "class1/0.png,0.0,"], r"its labels are numbers such as 0\.0; write them as whole"),
        (
            ["class0/0.png,a,", "class1/0.png,b,", "class1/1.png,,"],
            r"labels of .*1 label\(s\) cannot be used.*no label",
        ),
        (["class0/0.png,-1,", "class1/0.png,1,"], r"labels start at -1"),
        (['class0/0.png,"a,'], r"cannot be read after line 2: .*; write comma-separated values in UTF-8"),
        (["class0/0.png,a"], r"line 2: 2 value\(s\), where the first line names 3 columns"),
        (["class0/0,1.png,a,train"], r"line 2: 4 value\(s\), .*comma stands in double quotes"),
        (["class0/0.png,1,", "class1/0.png,01,"], r"labels '1' and '01' are one number"),
        (["class0/0.png,0.0,", "class1/0.png,NaN,"], r"numbers such as 0\.0; write them as whole"),
    ],
)
def test_rows_that_cannot_be_meant_are_named(root: Path, rows: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(table(root, *rows))


@pytest.mark.parametrize("piece", [1, 2, 1 << 16])
def test_a_row_is_named_by_its_line_whatever_the_pieces(
    root: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Blank lines and values of several lines count; values on the last lines of a piece, too."""
    monkeypatch.setattr("mpl_scale.data.formats.table.PIECE_ROWS", piece)
    rows = ["", "class0/0.png,b,", 'class0/1.png,"a', 'c",', "", "", "class1/0.png,d,test,,"]
    assert load(table(root, *rows)).classes == ("a\nc", "b", "d")
    for row, message in (("class0/2.png", "1 value"), ("class0/2.png,a,x", "split 'x'"), (rows[1], "stands there twi")):
        with pytest.raises(ValueError, match=rf"table\.csv', line 9: .*{message}"):
            load(table(root, *rows, row))


def test_a_column_of_other_values_than_classes_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpl_scale.data.formats.listing.MOST_CLASSES", 3)
    rows = [f"class0/{number}.png,{number},train" for number in range(3)]
    assert len(load(table(root, *rows, "class1/0.png,5,unlabelled"))) == 4
    with pytest.raises(ValueError, match=r"more than 3 labels; if its column .label. does not hold classes, rename"):
        load(table(root, *rows, "class1/0.png,5,train"))


def test_columns_and_files_that_are_wrong(root: Path) -> None:
    with pytest.raises(ValueError, match=r"has the columns \['file', 'label'\]; its first line must have path"):
        load(table(root, "class0/0.png,1", columns="file,label"))
    for name in ("Split", " split"):  # its test images would be trained on
        with pytest.raises(ValueError, match=rf"has a column '{name}'; write it as 'split'"):
            load(table(root, "class0/0.png,1,test", columns=f"path,label,{name}"))
    rows = [f"class{label}/{number}.png,{label}" for label in (0, 1) for number in range(7)]
    images = load(table(root, *rows, columns="path,label"), max_bad_fraction=0.5)
    reasons = images.refusals(5)
    assert sorted(Path(name).name for name in reasons) == ["6.png", "6.png"]
    assert set(reasons.values()) == {"cannot be read: No such file or directory"}
    parquet.write_table(pyarrow.table({"path": ["class0/0.png"]}), root / "table.parquet")
    with pytest.raises(ValueError, match=r"holds table\.csv and table\.parquet; remove one"):
        load(root)
    (root / "table.csv").unlink()
    twice = pyarrow.Table.from_arrays([pyarrow.array(["class0/0.png"])] * 2, ["path", "path"])
    parquet.write_table(twice, root / "table.parquet")
    with pytest.raises(ValueError, match=r"table\.parquet' has several columns 'path'; remove all but one"):
        load(root)


def test_parquet_columns_are_read_as_those_of_csv_or_refused(root: Path) -> None:
    paths = ["class0/0.png", "class1/0.png", "class1/1.png"]
    parquet.write_table(pyarrow.table({"path": paths, "label": ["a ", "a", "b"]}), root / "table.parquet")
    assert load(root).classes == ("a", "b")
    for labels, kind in (([b"a", b"b", b"b"], "binary"), ([[0], [1], [1]], "list<element: int64>")):
        parquet.write_table(pyarrow.table({"path": paths, "label": labels}), root / "table.parquet")
        with pytest.raises(ValueError, match=rf"table\.parquet': column 'label' is {kind}; write text, or whole"):
            load(root)
