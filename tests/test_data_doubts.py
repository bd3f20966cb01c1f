"""Data that can be meant in two ways are refused, or said, never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images
from mpl_scale.data.formats.folder import read_folder
from mpl_scale.data.index.build import build_index
from mpl_scale.mesh import adopt_slurm_environment
from mpl_scale.trainer.output import check_output
from tests.support import mini_imagenet as mini
from tests.support.labelled_sets import example, feature, load
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
        ({"cls": b"0", "jpg": mini.files("JPEG")[0]}, r"train\.tar: two images of key 'c'"),
        ({"cls": b"0", "CLS": b"0"}, r"train\.tar: two members of one name of key 'c'"),
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


def archive(root: Path, name: str, *rows: tuple[str, int, str]) -> None:
    """A tar file of (key, label, class name or "") in this order."""
    members = []
    for key, label, text in rows:
        document = {"label": label} | ({"class_name": text} if text else {})
        members += [(f"{key}.png", files()[len(members) % 48]), (f"{key}.json", json.dumps(document).encode())]
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(tar_of(members))


def records(root: Path, name: str, *rows: tuple[int, str, str]) -> None:
    """A TFRecord file of (label, text, synset), "" for none."""
    root.mkdir(exist_ok=True)
    texts = [
        {f"image__class__{kind}": feature(1, text.encode()) for kind, text in (("text", t), ("synset", s)) if text}
        for _, t, s in rows
    ]
    contents = [
        example(image__class__label=feature(3, mini.varint(label)), **text)
        for (label, _, _), text in zip(rows, texts, strict=True)
    ]
    (root / name).write_bytes(b"".join(map(mini.record, contents)))


def test_a_key_that_stands_in_a_shard_twice(tmp_path: Path) -> None:
    for number, again in enumerate(("a", "./a")):
        archive(tmp_path / str(number), "train.tar", ("a", 0, ""), ("b", 1, ""), (again, 1, ""))
        with pytest.raises(ValueError, match=r"train\.tar: two samples of key 'a'"):
            load(tmp_path / str(number), "webdataset")


def test_one_key_in_two_shards_is_two_images(tmp_path: Path) -> None:
    archive(tmp_path, "train-0.tar", ("a", 0, ""), ("b", 1, ""))
    archive(tmp_path, "train-1.tar", ("a", 1, ""), ("b", 0, ""))
    assert load(tmp_path, "webdataset").labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("wanted", ["image/class/label", "image/encoded"])
def test_a_feature_that_stands_in_an_example_twice(tmp_path: Path, wanted: str) -> None:
    first = example(image__class__label=feature(3, b"\1"))
    value = feature(3, b"\2") if wanted.endswith("label") else feature(1, files()[1])
    entry = mini.field(1, wanted.encode()) + mini.field(2, value)
    records(tmp_path, "train-0.tfrecord", (1, "", ""), (2, "", ""))
    (tmp_path / "train-1.tfrecord").write_bytes(mini.record(first + mini.field(1, mini.field(1, entry))))
    with pytest.raises(ValueError, match=rf"2 (labels|images) in {wanted}"):
        load(tmp_path, "tfrecord")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((("c", 2, "dog"),), "class 'dog' has label 2 here, 1 elsewhere"),
        ((("c", 0, "dog"), ("d", 2, "cow")), "label 0 stands beside class 'dog' here, beside 'cat' elsewhere"),
    ],
    ids=["one class, two labels", "one label, two classes"],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_labels_that_contradict_the_samples_own_class(
    tmp_path: Path, shards: int, other: tuple[tuple[str, int, str], ...], message: str
) -> None:
    good = (("a", 0, "cat"), ("b", 1, "dog"), ("e", 2, ""))
    archive(tmp_path / "tar", "train-0.tar", *good, *(other if shards == 1 else ()))
    if shards == 2:
        archive(tmp_path / "tar", "train-1.tar", *other)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "tar", "webdataset")
    first, second = ([(label, text, "") for _, label, text in rows] for rows in (good, other))
    records(tmp_path / "tfrecord", "train-0.tfrecord", *first, *(second if shards == 1 else ()))
    if shards == 2:
        records(tmp_path / "tfrecord", "train-1.tfrecord", *second)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "tfrecord", "tfrecord", label_offset=0)


def test_classes_of_one_text_are_told_apart_by_their_synset(tmp_path: Path) -> None:
    """ImageNet has a bird and a machine that are both called crane."""
    records(tmp_path, "train.tfrecord", (1, "crane", "n02012849"), (2, "crane", "n03126707"))
    assert load(tmp_path, "tfrecord").labels.tolist() == [0, 1]


def test_class_names_in_another_order_than_the_samples_say(tmp_path: Path) -> None:
    archive(tmp_path, "train.tar", ("a", 0, "cat"), ("b", 1, "dog"))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert load(tmp_path, "webdataset").labels.tolist() == [0, 1]
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(ValueError, match=r"train\.tar: label 0 stands beside class 'cat', not 'dog'"):
        load(tmp_path, "webdataset")


def test_classes_that_look_the_same_are_named(tmp_path: Path) -> None:
    images = read_folder(put(tmp_path, "Cat/1.png", "cat/1.png", "dog/1.png", "a/1.png", "A/1.png"))
    assert "classes that are told apart by capitals, blanks or encoding alone: 'Cat', 'cat'" in images.contents()
    assert len([line for line in images.contents() if "alone" in line]) == 1


def test_no_folder_of_a_run_lies_among_the_images(tmp_path: Path) -> None:
    root, index = put(tmp_path / "data", "cat/1.png", "dog/1.png"), tmp_path / "index"
    (tmp_path / "link").symlink_to(root)
    build_index("folder", root, output=index)
    for data in (DataConfig(source="folder", root=str(root)), DataConfig(source="folder", index=str(index))):
        for output in (root, root / "runs" / "a", tmp_path / "link" / "a"):
            with pytest.raises(ValueError, match=rf"--output {output} lies in the data set {root}"):
                check_output(output, resume="auto", data=data)
        check_output(tmp_path / "runs" / "a", resume="auto", data=data)
    with pytest.raises(ValueError, match=rf"--output {root}/index lies in the data set {root}"):
        build_index("folder", root, output=root / "index")


def test_no_index_lies_among_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "data", "train.tar", ("a", 0, ""), ("b", 1, ""))
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "data" / "cache"))
    with pytest.raises(ValueError, match=r"MPL_SCALE_DATA = .*cache lies in the data set .*data, whose images"):
        load(tmp_path / "data", "webdataset")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["train.tar"]


@pytest.mark.parametrize(
    ("link", "target"),
    [("cow", "cat"), ("dog/more", "../cat"), ("cat/deep", "../dog/deep")],
    ids=["class", "up", "deep"],
)
def test_a_folder_that_a_link_puts_into_two_classes(tmp_path: Path, link: str, target: str) -> None:
    root = put(tmp_path, "cat/1.png", "dog/1.png", "dog/deep/2.png")
    (root / link).symlink_to(target)
    with pytest.raises(ValueError, match="are one folder, by a link, in two classes or parts"):
        read_folder(root)


def test_classes_without_an_image_for_training_are_named(tmp_path: Path) -> None:
    said = "classes without an image for training: 'cow'"
    assert said in read_folder(put(tmp_path / "a", "train/cat/1.png", "train/dog/1.png", "test/cow/1.png")).contents()
    archive(tmp_path / "b", "train.tar", ("a", 0, ""), ("b", 2, ""))
    archive(tmp_path / "b", "test.tar", ("a", 0, ""), ("b", 1, ""))
    (tmp_path / "b" / "classes.txt").write_text("cat\ncow\ndog\n")
    assert said in load(tmp_path / "b", "webdataset").contents()


def test_images_without_labels_lack_no_class(tmp_path: Path) -> None:
    images = load(put(tmp_path / "data", "1.png", "more/2.png"), "images")
    assert images.contents() == ["images by part: unlabelled 2 (., more)", "images by format: 2 png"]
    flat = load(put(tmp_path / "flat", "1.png", "2.png"), "images")
    assert flat.contents()[0] == "images by part: unlabelled 2"


def test_class_names_that_are_not_read_are_listed(tmp_path: Path) -> None:
    (put(tmp_path, "cat/1.png", "dog/1.png") / "classes.txt").write_text("dog\ncat\n")
    assert "not used: 1 (1 .txt): classes.txt" in read_folder(tmp_path).contents()


def test_class_names_that_contradict_the_schema(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(mini.parquet(mini.table(files()[:2], [0, 1], ["cat", "dog"])))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(ValueError, match=r"'train\.parquet' name the same classes in another order, such as 'cat'"):
        load(tmp_path, "parquet")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "train.parquet").write_bytes(mini.parquet(mini.table(files()[:3], [0, 1, 2], ["cat", "dog", "cat"])))
    with pytest.raises(ValueError, match="its schema gives two classes one name"):
        load(tmp_path, "parquet")
