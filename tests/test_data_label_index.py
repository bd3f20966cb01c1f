"""What labels are read from belongs to the index: settings, files beside the shards, and indexes of version 1."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpl_scale.cli.main import main
from mpl_scale.data.index import sidecars
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.format import ScanOptions
from mpl_scale.data.index.reader import IndexedImages, StaleIndex
from tests.support import mini_imagenet as mini
from tests.support.labelled_sets import FIRST_LABEL, load, write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))


@pytest.mark.parametrize("source", FIRST_LABEL)
def test_an_offset_beside_an_index_must_be_the_indexs(tmp_path: Path, source: str) -> None:
    custom = FIRST_LABEL[source]
    root, index = write(tmp_path / "data", source, [3, 4] * 3), str(tmp_path / "index")
    build_index(source, root, output=Path(index), options=ScanOptions(label_offset=3))
    for given in (None, 3):
        assert load(root, source, index=index, label_offset=given).labels.tolist() == [0, 1] * 3
    with pytest.raises(ValueError, match=r"label_offset = 2, but .*built with 3; .*--label_offset 2"):
        load(root, source, index=index, label_offset=2)
    write(root, source, [custom, custom + 1] * 3)
    build_index(source, root, output=Path(index))
    assert len(load(root, source, index=index, label_offset=custom)) == 6  # the custom, said aloud
    with pytest.raises(ValueError, match=rf"label_offset = {custom + 1}, but .*built with {custom}"):
        load(root, source, index=index, label_offset=custom + 1)


def test_check_data_beside_an_index_must_be_the_indexs(tmp_path: Path) -> None:
    root, index = write(tmp_path / "data", "tfrecord", [1, 2]), str(tmp_path / "index")
    for built in (True, False):
        build_index("tfrecord", root, output=Path(index), options=ScanOptions(check_data=built))
        for given in (None, built):
            assert len(load(root, "tfrecord", index=index, check_data=given)) == 2
        with pytest.raises(ValueError, match=rf"check_data = {str(not built).lower()}, but .*was built with"):
            load(root, "tfrecord", index=index, check_data=not built)


@pytest.mark.parametrize("kind", ["folder", "cifar10 binary", "cifar100", "svhn", "stl10", "digits"])
def test_settings_without_effect_are_refused(tmp_path: Path, kind: str) -> None:
    source = mini.WRITERS[kind][0] if kind in mini.WRITERS else kind
    for setting in ({"label_offset": 0}, {"check_data": False}):
        with pytest.raises(ValueError, match=rf"{next(iter(setting))} = .* has no effect with source {source}"):
            load(tmp_path, source, **setting)
    if kind in mini.WRITERS:
        mini.WRITERS[kind][1](tmp_path / "data")
        with pytest.raises(ValueError, match="label_offset = 1 has no effect"):
            build_index(source, tmp_path / "data", output=tmp_path / "index", options=ScanOptions(label_offset=1))


def test_the_advice_to_rebuild_keeps_the_indexs_settings(tmp_path: Path) -> None:
    root = write(tmp_path / "data", "tfrecord", [3, 4])
    options = ScanOptions(label_offset=3, check_data=False)
    build_index("tfrecord", root, output=tmp_path / "index", options=options)
    os.utime(root / "train.tfrecord", ns=(1, 1))
    with pytest.raises(StaleIndex, match=r"--source tfrecord --output '\S+' --label_offset 3 --skip_data_crc$"):
        IndexedImages(tmp_path / "index")


def _edit(path: Path, content: bytes) -> None:
    """Without a trace in size and time."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _swap_labels(root: Path) -> None:
    data = (root / "labels.npy").read_bytes()
    _edit(root / "labels.npy", data[:-16] + data[-8:] + data[-16:-8])


def _flip_labels(path: Path) -> None:
    data = path.read_bytes()
    _edit(path, data[:8] + bytes(1 - label for label in data[8:]))


EDITS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "labels": ("arrays", "labels.npy", _swap_labels),
    "test labels": ("arrays", "test_labels.npy", lambda root: np.save(root / "test_labels.npy", np.array([1, 0]))),
    "no test labels": ("arrays", "test_labels.npy", lambda root: (root / "test_labels.npy").unlink()),
    "idx": ("idx", "train-labels-idx1-ubyte", lambda root: _flip_labels(root / "train-labels-idx1-ubyte")),
    "names": ("tfrecord", "classes.txt", lambda root: _edit(root / "classes.txt", b"b\na\n")),
    "names, tar": ("webdataset", "classes.txt", lambda root: (root / "classes.txt").write_text("cat\ndog\n")),
    "names gone": ("arrays", "classes.txt", lambda root: (root / "classes.txt").unlink()),
}


@pytest.mark.parametrize("kind", EDITS)
def test_a_file_beside_the_shards_that_changed_makes_the_index_stale(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source, name, edit = EDITS[kind]
    custom = FIRST_LABEL[source]
    root = write(tmp_path / "data", source, [custom, custom + 1] * 3, test=[custom, custom + 1])
    (root / "classes.txt").write_text("a\nb\n")
    command = ["index", str(root), "--source", source, "--output", str(tmp_path / "index")]
    assert main(command) == 0
    before = load(root, source)
    assert main(command) == 0
    assert "is up to date" in capfd.readouterr().out
    edit(root)
    with pytest.raises(StaleIndex, match=rf"{name}' has changed since index .*rebuild it: mpl-scale index"):
        load(root, source, index=str(tmp_path / "index"))
    if kind == "no test labels":
        with pytest.raises(ValueError, match=r"no labels: 'test_labels\.npy' cannot be read"):
            load(root, source)
        return
    after = load(root, source)
    assert f"{name}' has changed since index" in capfd.readouterr().err
    assert (after.labels.tolist(), after.classes) != (before.labels.tolist(), before.classes)
    assert main(command) == 0
    assert f"{name}' has changed since index" in capfd.readouterr().out
    rebuilt = load(root, source, index=str(tmp_path / "index"))
    assert (rebuilt.labels.tolist(), rebuilt.classes) == (after.labels.tolist(), after.classes)


def test_names_that_come_later_make_the_index_stale(tmp_path: Path) -> None:
    root = write(tmp_path / "data", "webdataset", [0, 1])
    assert load(root, "webdataset").classes == ("class 0", "class 1")
    (root / "classes.txt").write_text("cat\ndog\n")
    assert load(root, "webdataset").classes == ("cat", "dog")


def test_a_copied_small_file_is_the_same_and_a_touched_large_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "labels.npy").write_bytes(b"labels")
    for limit, stale in ((sidecars.HASHED_BYTES, []), (1, ["labels.npy"])):
        monkeypatch.setattr(sidecars, "HASHED_BYTES", limit)
        recorded = sidecars.record(tmp_path, ["labels.npy", "none"])
        assert sidecars.changed(tmp_path, recorded) == []
        os.utime(tmp_path / "labels.npy", ns=(1, limit))
        assert sidecars.changed(tmp_path, recorded) == stale


def test_labels_that_change_during_a_stopped_build_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "data", "arrays", [0, 1] * 3, test=[0, 1])

    def stop(done: int, total: int, images: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index("arrays", root, output=tmp_path / "index", report=stop)
    np.save(root / "labels.npy", np.array([1, 0] * 3))
    assert build_index("arrays", root, output=tmp_path / "index").reused == 0
    assert IndexedImages(tmp_path / "index").labels.tolist() == [1, 0] * 3 + [0, 1]


def test_a_new_shard_is_noticed_by_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data", "webdataset", [0, 1])
    command = ["index", str(root), "--source", "webdataset", "--output", str(tmp_path / "index")]
    assert main(command) == 0
    write(root, "webdataset", [0, 1], test=[1, 0])
    assert main(command) == 0
    assert "is stale, building it again" in capfd.readouterr().out
    assert len(IndexedImages(tmp_path / "index")) == 4


def as_version_1(folder: Path) -> None:
    """An index as it was written before labels and sidecars were recorded."""
    meta = json.loads((folder / "meta.json").read_text())
    for key in ("labels", "sidecars"):
        del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta | {"version": 1}))


def test_an_index_of_version_1_still_loads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, folder = write(tmp_path / "data", "arrays", [0, 1] * 3), tmp_path / "index"
    build_index("arrays", root, output=folder)
    as_version_1(folder)
    np.save(root / "labels.npy", np.array([1, 0] * 3))
    assert load(root, "arrays", index=str(folder)).labels.tolist() == [0, 1] * 3  # nothing is known of the file
    assert main(["index", str(root), "--source", "arrays", "--output", str(folder)]) == 0
    assert "of version 1, which does not check labels" in capfd.readouterr().out
    assert load(root, "arrays", index=str(folder)).labels.tolist() == [1, 0] * 3


def test_refused_labels_of_an_index_of_version_1_are_an_error(tmp_path: Path) -> None:
    root, folder = write(tmp_path / "data", "tfrecord", [0, 1] * 3), tmp_path / "index"
    build_index("tfrecord", root, output=folder)
    as_version_1(folder)
    with pytest.raises(ValueError, match=r"3 label\(s\) cannot be used; rebuild it: mpl-scale index"):
        load(root, "tfrecord", index=str(folder))
