"""Labelled, unlabelled, validation and test images in places of their own, of any formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpl_scale.cli.main import main
from mpl_scale.config import load_config
from mpl_scale.config.checks import check
from mpl_scale.config.schema import DataConfig
from mpl_scale.data import ImageFiles, Splits, load_images, make_splits
from mpl_scale.data.index.detect import find_format
from mpl_scale.data.index.format import FORMATS
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.joined import JoinedImages
from mpl_scale.data.samples.twins import without_twins
from mpl_scale.inference.evaluate import EvaluateOptions, evaluate
from mpl_scale.inference.scoring import StoredNetwork
from mpl_scale.trainer.prepare import Options, train
from tests.support import mini_imagenet as mini
from tests.support.configs import tiny, write
from tests.support.image_sets import write_folder
from tests.support.labelled_sets import example, feature
from tests.support.runs import StopAfter


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))


def splits_of(seed: int = 0, **places: Any) -> Splits:
    config = DataConfig(**{name: str(place) if isinstance(place, Path) else place for name, place in places.items()})
    return without_twins(make_splits(load_images(config), config=config, seed=seed))


def names_of(splits: Splits, part: str) -> set[str]:
    return {splits.images.name(sample) for sample in getattr(splits, part).tolist()}


def files_below(root: Path) -> set[str]:
    return {str(path) for path in root.rglob("*.png")}


@pytest.mark.parametrize("kind", mini.WRITERS)
def test_the_source_is_found_by_its_files(tmp_path: Path, kind: str) -> None:
    source, writer = mini.WRITERS[kind]
    writer(tmp_path / "data")
    assert find_format(tmp_path / "data") == source
    assert find_format(tmp_path / "data", labels=False) == ("images" if source == "folder" else source)
    if source not in ("folder", "table"):
        (tmp_path / "data" / "a.png").write_bytes(mini.files()[0])
        with pytest.raises(ValueError, match=rf"several formats, ({source}, images|images, {source}); name it"):
            find_format(tmp_path / "data", labels=False)


def tables(root: Path, name: str) -> None:
    rows = mini.table(mini.files(), [0] * mini.COUNT).drop_columns("label")
    (root / f"a.{name}").write_bytes(mini.parquet(rows) if name == "parquet" else mini.arrow(rows))


def tars(root: Path) -> None:
    (root / "a.tar").write_bytes(mini.tar_of([(f"{number}.png", file) for number, file in enumerate(mini.files())]))


def records(root: Path) -> None:
    rows = [mini.record(example(image__encoded=feature(1, file))) for file in mini.files()]
    (root / "a.tfrecord").write_bytes(b"".join(rows))


UNLABELLED: dict[str, Callable[[Path], object]] = {
    "webdataset": tars,
    "tfrecord": records,
    "parquet": lambda root: tables(root, "parquet"),
    "arrow": lambda root: tables(root, "arrow"),
    "arrays": lambda root: np.save(root / "images.npy", mini.pictures()[0]),
    "idx": lambda root: (root / "train-images-idx3-ubyte").write_bytes(mini.idx(*mini.pictures())[0]),
}
"""Writers of mini_imagenet's pictures without any labels."""
ALWAYS_LABELLED = {"cifar10", "cifar100", "svhn", "stl10", "folder", "images", "table"}


def test_every_format_that_can_be_without_labels_is_tested() -> None:
    assert UNLABELLED.keys() | ALWAYS_LABELLED == FORMATS.keys()


@pytest.mark.parametrize("source", [*UNLABELLED, *sorted(ALWAYS_LABELLED - {"images"})])
def test_unlabelled_images_of_every_format(tmp_path: Path, source: str) -> None:
    """Beside a labelled folder. Of a data set that has a test part, its images are not trained on."""
    root = tmp_path / "unlabelled"
    root.mkdir()
    if source in UNLABELLED:
        UNLABELLED[source](root)
        expected = mini.COUNT
    else:
        mini.WRITERS["cifar10 python" if source == "cifar10" else source][1](root)
        whole = load_images(DataConfig(source=source, root=str(root)))
        assert isinstance(whole, ImageFiles | IndexedImages)
        expected = len(whole) - len(whole.ids_of("test"))
    splits = splits_of(labelled=write_folder(tmp_path / "labelled", images=6), unlabelled=root)
    assert len(splits.unlabelled) == expected
    assert splits.unlabelled.min() == 12
    assert not len(splits.images.refused)


def test_formats_may_be_mixed_and_classes_are_those_of_the_labelled_part(tmp_path: Path) -> None:
    """The test part numbers the classes in another order: they are matched by name."""
    mini.write_folder(tmp_path / "labelled")
    (tmp_path / "tars").mkdir()
    tars(tmp_path / "tars")
    flat = tmp_path / "flat" / "deep" / "er"
    flat.mkdir(parents=True)
    pictures, labels = mini.pictures()
    for number, content in enumerate(mini.files("JPEG")):
        ((flat, *flat.parents)[number % 3] / f"{number}.jpg").write_bytes(content)
    (tmp_path / "test").mkdir()
    np.save(tmp_path / "test" / "images.npy", 255 - pictures)
    np.save(tmp_path / "test" / "labels.npy", (labels + 2) % 6)
    (tmp_path / "test" / "classes.txt").write_text("\n".join(f"class{(number - 2) % 6}" for number in range(6)))
    places = [str(tmp_path / "flat"), {"root": str(tmp_path / "tars"), "source": "webdataset"}]
    splits = splits_of(labelled=tmp_path / "labelled", unlabelled=places, test=tmp_path / "test")
    assert splits.images.classes == tuple(f"class{number}" for number in range(6))
    assert [len(getattr(splits, part)) for part in ("labelled", "unlabelled", "test", "held_out")] == [48, 96, 48, 0]
    assert splits.images.labels[splits.test].tolist() == labels.tolist()
    assert names_of(splits, "labelled") == files_below(tmp_path / "labelled")
    read = splits.images.read(int(splits.test[5])).tobytes()
    assert read.endswith((255 - pictures[5]).tobytes())
    both = splits_of(labelled=tmp_path / "labelled", unlabelled=places, unlabelled_from="training", test_fraction=0.25)
    assert len(both.unlabelled) == 36 + 48 + 36  # 12 are tested, here and in the tar; JPEG has other bytes


def test_what_is_evaluated_on_and_what_is_held_out(tmp_path: Path) -> None:
    roots = {name: tmp_path / name for name in ("labelled", "validation", "test")}
    mini.write_folder(roots["labelled"])
    for side, name in ((9, "validation"), (10, "test")):
        write_folder(roots[name], classes=6, images=2, side=side)
    share = splits_of(labelled=roots["labelled"], test_fraction=0.25)
    assert np.bincount(share.images.labels[share.test]).tolist() == [2] * 6
    assert not set(share.test) & set(share.labelled)
    assert np.array_equal(share.unlabelled, share.labelled)  # nothing else is there
    assert not np.array_equal(splits_of(1, labelled=roots["labelled"], test_fraction=0.25).test, share.test)
    alone = splits_of(labelled=roots["labelled"], validation=roots["validation"])
    assert names_of(alone, "test") == files_below(roots["validation"])
    all_three = splits_of(**roots)
    assert names_of(all_three, "test") == files_below(roots["test"])
    assert names_of(all_three, "held_out") == files_below(roots["validation"])
    tuned = splits_of(**roots, evaluate_on="held_out")
    assert names_of(tuned, "test") == files_below(roots["validation"])
    parts = tmp_path / "parts"
    shutil.copytree(roots["labelled"], parts / "train")
    shutil.copytree(roots["test"], parts / "val")
    own = splits_of(labelled=parts)
    assert names_of(own, "test") == files_below(parts / "val")
    assert len(own.labelled) == 48


def test_a_test_image_is_not_trained_on_wherever_it_lies(tmp_path: Path) -> None:
    """Two of the labelled and one of the unlabelled images are copies of test images; one more is nearly one."""
    labelled, test = write_folder(tmp_path / "labelled", images=8), write_folder(tmp_path / "test", images=8, side=9)
    (tmp_path / "unlabelled" / "below").mkdir(parents=True)
    copies = {
        labelled / "class0" / "copy.png": test / "class0" / "3.png",
        labelled / "class1" / "other.png": test / "class0" / "4.png",
        tmp_path / "unlabelled" / "below" / "x.png": test / "class1" / "5.png",
    }
    for copy, original in copies.items():
        shutil.copy(original, copy)
    content = bytearray((test / "class1" / "6.png").read_bytes())
    content[-20] ^= 1
    for name, bytes_ in (("near.png", bytes(content)), ("own.png", (labelled / "class0" / "0.png").read_bytes())):
        (tmp_path / "unlabelled" / name).write_bytes(bytes_)
    places = {"labelled": labelled, "unlabelled": tmp_path / "unlabelled", "test": test}
    splits = splits_of(**places)
    found = {splits.images.name(a): splits.images.name(b) for a, b in splits.twins.tolist()}
    assert found == {str(copy): str(original) for copy, original in copies.items()}
    assert names_of(splits, "test") == files_below(test)
    assert names_of(splits, "labelled") == files_below(labelled) - set(found)
    assert names_of(splits, "unlabelled") == {str(tmp_path / "unlabelled" / name) for name in ("near.png", "own.png")}
    assert np.array_equal(splits_of(**places).twins, splits.twins)  # kept
    shutil.copy(test / "class0" / "1.png", tmp_path / "unlabelled" / "new.png")
    assert len(splits_of(**places).twins) == 4  # other files, compared again


def run_config(folder: Path, *, classes: int = 2, **places: Any) -> str:
    raw = tiny(train_batch_size=4)
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["logging"]["progress"] = "lines"
    section["model"] |= {"num_classes": classes}
    section["data"] |= places
    section["phases"] = {"teacher_warmup": {"steps": 0}, "train": {"steps": 4}, "finetune": {"steps": 0}}
    return write(folder, raw)


def test_a_run_names_what_it_left_out_resumes_and_is_evaluated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    labelled, test = write_folder(tmp_path / "labelled", images=8), write_folder(tmp_path / "test", images=8, side=9)
    unlabelled = write_folder(tmp_path / "unlabelled", images=9, side=10)
    copy = unlabelled / "class1" / "copy.png"
    shutil.copy(test / "class0" / "3.png", copy)
    config = run_config(tmp_path, labelled=str(labelled), unlabelled=str(unlabelled), test=str(test))
    run, output = load_config(config), tmp_path / "run"
    assert main(["check", "--ds_config", config, "--device", "cpu"]) == 0
    assert train(run, Options(output), stop_requested=StopAfter(3)) is None
    said = capfd.readouterr().err
    assert f"each is, byte for byte, one to evaluate on: {copy} = {test / 'class0' / '3.png'}" in said
    assert "data: 16 labelled, 18 unlabelled and 16 evaluation images, 0 held out" in said
    assert str(copy) in (output / "splits" / "twins.csv").read_text()
    manifest = json.loads((output / "splits" / "manifest.json").read_text())
    assert [name for name, digest in manifest["apart"].items() if digest] == ["labelled", "unlabelled", "test"]
    moved = unlabelled.rename(tmp_path / "moved")
    elsewhere = load_config(config, overrides=[f"mpl_scale.data.unlabelled={moved}"])
    summary = train(elsewhere, Options(output))
    assert summary is not None
    assert summary["steps"] == 4
    network = StoredNetwork(output / "checkpoints" / "step_00000004", "student")
    found = evaluate(EvaluateOptions(network, tmp_path / "evaluated"))
    assert found["evaluated"] == 16
    assert found["top1"] == pytest.approx(summary["results"]["student"]["top1"])
    shutil.copy(moved / "class0" / "0.png", moved / "class0" / "more.png")
    with pytest.raises(ValueError, match=r"data\.unlabelled|splits\.unlabelled"):
        train(elsewhere, Options(output))


def test_an_index_is_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mini.write_webdataset(tmp_path / "shards")
    write_folder(tmp_path / "labelled", images=6)
    index = tmp_path / "shards.index"
    assert main(["index", str(tmp_path / "shards"), "--unlabelled"]) == 0
    assert f"source webdataset, by the files in '{tmp_path / 'shards'}'" in capsys.readouterr().out
    assert main(["index", str(tmp_path / "shards"), "--unlabelled"]) == 0
    assert "is up to date" in capsys.readouterr().out
    splits = splits_of(labelled=tmp_path / "labelled", unlabelled=index)
    assert len(splits.unlabelled) == 48
    assert isinstance(splits.images, JoinedImages)
    assert splits.images.sets[1].meta["options"]["labels"] is False
    with pytest.raises(ValueError, match=r"data\.labelled holds no labelled image that may be trained on"):
        splits_of(labelled=index)
    with pytest.raises(ValueError, match=r"was built from source webdataset, not mpl_scale\.data\.unlabelled\.source"):
        splits_of(labelled=tmp_path / "labelled", unlabelled={"root": str(index), "source": "tfrecord"})


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"labelled": "a", "root": "b"}, r"data\.root = b with mpl_scale\.data\.labelled: .*set it to null"),
        ({"labelled": "a", "unlabelled_index": "b"}, r"data\.unlabelled_index = b with mpl_scale\.data\.labelled"),
        ({"labelled": "a", "label_offset": 1}, r'data\.label_offset = 1 with .*\{"label_offset": \.\.\.\}'),
        ({"unlabelled": "b"}, r"data\.unlabelled without mpl_scale\.data\.labelled"),
        ({"labelled": "a", "unlabelled": "./a"}, r"data\.unlabelled and mpl_scale\.data\.labelled both name '.*/a'"),
        (
            {"labelled": "a", "unlabelled": ["b", {"root": "b"}]},
            r"data\.unlabelled and mpl_scale\.data\.unlabelled both",
        ),
        ({"labelled": "a", "unlabelled": []}, r"data\.unlabelled = \[\]: name a place"),
        ({"labelled": "a", "unlabelled": "b", "unlabelled_from": "labelled"}, r"unlabelled_from = labelled with"),
        ({"labelled": 3}, r"mpl_scale\.data\.labelled.* = 3"),
    ],
)
def test_combinations_that_say_two_things_are_refused_without_data(
    tmp_path: Path, places: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(load_config(run_config(tmp_path, **places)), world=1, cuda=False)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"unlabelled": "nowhere"}, r"mpl_scale\.data\.unlabelled = 'nowhere' is no folder"),
        ({"unlabelled": "empty"}, r"mpl_scale\.data\.unlabelled = 'empty' holds no data set of a known format"),
        ({"unlabelled": ["flat", "empty"]}, r"mpl_scale\.data\.unlabelled\[1\] = 'empty' holds no data set"),
        ({"labelled": "flat"}, r"mpl_scale\.data\.labelled = 'flat' holds 0 class folders; put the images in"),
        ({"test": "others"}, r"data\.test has 2 classes and mpl_scale\.data\.labelled has 2; only .* 'cat', 'class0'"),
        ({"test": {"root": "three", "source": "folder"}}, r"has 3 classes and .* has 2; only .* 'class2'"),
        ({"test": "same"}, r"data\.labelled has no image of class 'class0' .*: 12 are, byte for byte, images to eval"),
        ({"unlabelled": {"root": "flat", "source": "tar"}}, r"mpl_scale\.data\.unlabelled\.source = 'tar' is unknown"),
        ({"evaluate_on": "held_out"}, r"evaluate_on = 'held_out' needs mpl_scale\.data\.validation"),
        ({"unlabelled": {"root": "flat", "label_offset": 1}}, r"data\.unlabelled\.label_offset = 1 has no effect with"),
    ],
)
def test_places_that_do_not_fit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("labelled", "same", "others"):
        write_folder(Path(name), images=6)
    (Path("others") / "class0").rename(Path("others") / "cat")
    write_folder(Path("three"), classes=3, side=9)
    Path("empty").mkdir()
    Path("flat").mkdir()
    Path("flat", "a.png").write_bytes(mini.files()[0])
    with pytest.raises(ValueError, match=message):
        splits_of(**({"labelled": "labelled"} | places))


def test_settings_that_places_leave_without_effect_are_named(tmp_path: Path) -> None:
    places = {"labelled": "a", "test": "b", "labelled_per_class": 9, "split": "test_files", "test_fraction": 0.5}
    (note,) = load_config(run_config(tmp_path, **places)).notes
    for name in ("labelled_per_class", "split", "test_fraction"):
        assert f"mpl_scale.data.{name}" in note
