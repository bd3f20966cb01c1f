"""Data that can be meant in two ways are refused, or said, never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images
from mpl_scale.data.formats.folder import read_folder
from mpl_scale.mesh import adopt_slurm_environment
from tests.support.labelled_sets import load
from tests.support.mini_imagenet import files, tar_of


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files()[0])
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png", "unlabeled/1.png"),
        ("train/cat/1.png", "cat/1.png", "dog/1.png"),
    ],
    ids=["a third part", "a part among classes"],
)
def test_parts_beside_other_folders_are_not_taken_for_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="are these classes, or parts"):
        load_images(DataConfig(source="folder", root=str(put(tmp_path, *names))))


def test_a_class_may_have_a_parts_name(tmp_path: Path) -> None:
    assert read_folder(put(tmp_path, "test/1.png", "production/1.png")).classes == ("production", "test")


def test_a_file_right_in_a_part_is_listed(tmp_path: Path) -> None:
    images = read_folder(put(tmp_path, "train/a/1.png", "train/b/1.png", "train/3.png", "val/1.png", "val/2.png"))
    assert len(images) == 2
    assert "not used: 3 (3 .png): train/3.png, val/1.png, val/2.png" in images.contents()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cls": b"0", "json": b'{"label": 5}'}, "the .cls member says 0, the .json member 5"),
        ({"json": b'{"label": 1, "label": 2}'}, "several 'label'"),
    ],
)
def test_two_labels_of_one_image(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    image = files()[0]
    good = [("a.png", image), ("a.cls", b"1"), ("b.png", image), ("b.cls", b"0")]
    doubtful = [("c.png", image), *((f"c.{ending}", text) for ending, text in members.items())]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tar").write_bytes(tar_of([*good, *doubtful]))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "data", "webdataset")


def test_a_caption_beside_the_label_is_no_label(tmp_path: Path) -> None:
    image = files()[0]
    members = [("a.png", image), ("a.cls", b"1"), ("a.json", b'{"text": "x"}'), ("b.png", image), ("b.cls", b"0")]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tar").write_bytes(tar_of(members))
    assert load(tmp_path / "data", "webdataset").labels.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpiruns_ranks_do_not_train_alone(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = '2', and RANK is not set"):
        adopt_slurm_environment({name: "2"})
    adopt_slurm_environment({name: "2", "RANK": "0", "WORLD_SIZE": "2"})
    adopt_slurm_environment({name: "1"})
