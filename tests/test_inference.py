"""`mpl-scale evaluate` and `predict`: the network's own numbers, on any ranks, after a stop, and beside bad files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpl_scale.checkpoint import find
from mpl_scale.checkpoint.export import class_names, read_network
from mpl_scale.cli import main
from mpl_scale.config import load_config
from mpl_scale.data import digits
from mpl_scale.data.formats.folder import read_unlabelled
from mpl_scale.inference.evaluate import EvaluateOptions, evaluate
from mpl_scale.inference.labelled import DataChoice
from mpl_scale.inference.predict import PredictOptions, predict
from mpl_scale.inference.scores import Scorer
from mpl_scale.inference.scoring import StoredNetwork
from mpl_scale.models import build_model
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.ranks import pool

STEP = 37  # of the digits, every one in so many is an image of the folders


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A network trained for a few steps, and new images: root/a, root/b/c, and by class below labelled."""
    folder = tmp_path_factory.mktemp("inference")
    raw = tiny()
    raw["mpl_scale"]["data"] |= {"evaluation_batch": 16}
    raw["mpl_scale"]["phases"] = {"train": {"steps": 30}}
    raw["mpl_scale"]["model"]["bn_decay"] = 0.9
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks of the pool
    config = load_config(write(folder, raw))
    summary = train(config, Options(folder / "run"))
    assert summary is not None
    images = digits.read_digits(None)
    for number, sample in enumerate(range(0, len(images), STEP)):
        content, label = images.read(sample).tobytes(), images.classes[images.labels[sample]]
        for path in (
            folder / "new" / ("a" if number % 2 else "b/c") / f"{sample:04d}.png",
            folder / "labelled" / label / f"{sample:04d}.png",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (folder / "new" / "a" / "notes.txt").write_text("not an image")
    yield {"folder": folder, "summary": summary, "checkpoint": find(folder / "run" / "checkpoints")[0], "run": config}
    torch.set_num_threads(threads)


def network(made: dict[str, Any], name: str = "student") -> StoredNetwork:
    return StoredNetwork(made["checkpoint"], name)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def probabilities(made: dict[str, Any], paths: list[Path], name: str = "student") -> np.ndarray:
    """float32 [n, 10], by PIL and the stored weights, in one batch."""
    config = made["run"].mpl
    module = build_model(config.model.student, config.model, field="student", seed=0).eval()
    module.load_state_dict(read_network(made["checkpoint"], name))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) for path in paths]) / 255
    inputs = (pixels - np.array(config.data.mean, np.float32)) / np.array(config.data.std, np.float32)
    with torch.no_grad():
        return module(torch.from_numpy(inputs).permute(0, 3, 1, 2)).softmax(1).numpy()


def test_predictions_are_the_networks(made: dict[str, Any], tmp_path: Path) -> None:
    found = predict(PredictOptions(network(made, "ema"), made["folder"] / "new", tmp_path / "out.csv", top=3))
    rows = table(tmp_path / "out.csv")
    paths = [made["folder"] / "new" / row["file"] for row in rows]
    assert paths == sorted((made["folder"] / "new").rglob("*.png"))
    assert (found["images"], found["unreadable"]) == (len(rows), 0)
    assert any("notes.txt" in note for note in found["notes"])
    expected = probabilities(made, paths, "ema")
    order = np.argsort(-expected, axis=1)
    for rank, ending in enumerate(("", "_2", "_3")):
        assert [int(row[f"class{ending}"]) for row in rows] == order[:, rank].tolist()
        assert [float(row[f"probability{ending}"]) for row in rows] == pytest.approx(
            np.sort(expected, axis=1)[:, -1 - rank], abs=1e-5
        )
    assert {row["error"] for row in rows} == {""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv"]


def test_one_image_and_parquet(made: dict[str, Any], tmp_path: Path) -> None:
    from pyarrow import parquet

    image = next((made["folder"] / "new" / "a").glob("*.png"))
    command = ["predict", str(made["folder"] / "run"), str(image), "--output"]
    assert main([*command, str(tmp_path / "one.csv")]) == 0
    assert main([*command, str(tmp_path / "one.parquet")]) == 0
    (row,) = table(tmp_path / "one.csv")
    (same,) = parquet.read_table(tmp_path / "one.parquet").to_pylist()
    assert row["file"] == same["file"] == image.name
    assert row["class"] == same["class"]
    assert float(row["probability"]) == pytest.approx(same["probability"])
    assert same["error"] is None


def spoil(folder: Path) -> dict[str, str]:
    """Spoil three images in three ways; part of the reason by name."""
    paths = sorted(folder.rglob("*.png"))
    content = bytearray(paths[2].read_bytes())
    start = content.index(b"IDAT") + 6
    content[start : start + 12] = bytes(12)  # a header, an end, and between them what nobody can decode
    paths[2].write_bytes(content)
    paths[5].write_bytes(b"")
    paths[7].write_bytes(b"text")
    names = [str(paths[place].relative_to(folder)) for place in (2, 5, 7)]
    return dict(zip(names, ("wrong checksum", "", ""), strict=True))


def test_bad_files_are_named_in_the_table(made: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(made["folder"] / "new", tmp_path / "new")
    reasons = spoil(tmp_path / "new")
    assert len(read_unlabelled(tmp_path / "new").reasons) == 2  # the third is found when it is decoded
    assert predict(PredictOptions(network(made), tmp_path / "new", tmp_path / "out.csv"))["unreadable"] == 3
    predict(PredictOptions(network(made), made["folder"] / "new", tmp_path / "whole.csv"))
    for row, whole in zip(table(tmp_path / "out.csv"), table(tmp_path / "whole.csv"), strict=True):
        if row["file"] in reasons:
            assert (row["class"], row["probability"]) == ("", "")
            assert reasons[row["file"]] in row["error"]
            assert row["error"]
        else:
            assert row == whole


def predicted(options: PredictOptions) -> dict[str, Any]:
    return predict(options)


def evaluated(options: EvaluateOptions) -> dict[str, Any]:
    return evaluate(options)


def test_two_ranks_say_what_one_says(made: dict[str, Any], tmp_path: Path) -> None:
    settings = {"top": 2, "chunk": 16}
    predict(PredictOptions(network(made), made["folder"] / "new", tmp_path / "one.csv", **settings))
    both = PredictOptions(network(made), made["folder"] / "new", tmp_path / "two.csv", **settings)
    first, second = pool(2).run(predicted, both)
    assert first == second
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    alone = evaluate(EvaluateOptions(network(made), tmp_path / "one", chunk=64))
    first, second = pool(2).run(evaluated, EvaluateOptions(network(made), tmp_path / "two", chunk=64))
    assert first == second == {**alone, "command": first["command"]}


def test_a_stopped_command_is_taken_up(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = PredictOptions(network(made), made["folder"] / "new", tmp_path / "out.csv", chunk=16)
    predict(PredictOptions(network(made), made["folder"] / "new", tmp_path / "whole.csv", chunk=16))
    score, asked = Scorer.score, []

    def score_one(self: Scorer, chunks: list[int], **others: Any) -> None:
        asked.append(list(chunks))
        score(self, chunks[:1] if len(asked) == 1 else chunks, **others)
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Scorer, "score", score_one)
    with pytest.raises(KeyboardInterrupt):
        predict(options)
    with pytest.raises(ValueError, match="scores of another --network"):
        predict(PredictOptions(network(made, "ema"), options.images, options.output, chunk=16))
    predict(options)
    assert asked[-1] == asked[0][1:]
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "out.csv.partial").exists()


def test_the_runs_own_test_images_give_the_runs_results(made: dict[str, Any], tmp_path: Path) -> None:
    for name, expected in made["summary"]["results"].items():
        found = evaluate(EvaluateOptions(network(made, name), tmp_path / name))
        assert found["evaluated"] == expected["images"]
        for key in ("top1", "top5", "loss"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (name, key)  # other batches, fp32


def test_another_labelled_set_by_the_names_of_its_classes(made: dict[str, Any], tmp_path: Path) -> None:
    """Four of the ten classes: their labels in the folder are 0 to 3, in the network 3, 5, 6, 8."""
    kept = ["3", "5", "6", "8"]
    for name in kept:
        shutil.copytree(made["folder"] / "labelled" / name, tmp_path / "some" / name)
    assert (
        main(["evaluate", str(made["folder"] / "run"), "--data", str(tmp_path / "some"), "--output", str(tmp_path)])
        == 0
    )
    found = json.loads((tmp_path / "evaluation.json").read_text())
    paths = sorted((tmp_path / "some").rglob("*.png"))
    expected, labels = probabilities(made, paths), np.array([int(path.parent.name) for path in paths])
    right = expected.argmax(1) == labels
    assert found["top1"] == pytest.approx(100 * right.mean())
    assert found["loss"] == pytest.approx(-np.log(expected[np.arange(len(labels)), labels]).mean(), rel=1e-4)
    assert found["calibration_error"] == pytest.approx(calibration_error(expected, right), rel=1e-4)
    assert list(found["classes"]) == kept
    confusion = table(tmp_path / "confusion.csv")
    counts = np.array([[int(row[name]) for name in map(str, range(10))] for row in confusion])
    assert counts.sum() == len(paths)
    assert counts.diagonal().sum() == right.sum()
    assert [row["images"] for row in table(tmp_path / "classes.csv")] == [str(count) for count in counts.sum(1)]
    assert Image.open(tmp_path / "confusion.png").size[0] > 100


def calibration_error(found: np.ndarray, right: np.ndarray) -> float:
    """In percent, by its definition: 15 bins of the confidence."""
    confidence, error = found.max(1).astype(np.float64), 0.0
    for low in np.arange(15) / 15:
        own = (confidence >= low) & (confidence < low + 1 / 15)
        if own.any():
            error += own.mean() * abs(right[own].mean() - confidence[own].mean())
    return 100 * error


def test_classes_that_the_network_does_not_know_are_refused(
    made: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert class_names(made["checkpoint"]) == [str(digit) for digit in range(10)]
    shutil.copytree(made["folder"] / "labelled", tmp_path / "set")
    (tmp_path / "set" / "7").rename(tmp_path / "set" / "seven")
    command = ["evaluate", str(made["folder"] / "run"), "--output", str(tmp_path / "out")]
    assert main([*command, "--data", str(tmp_path / "set")]) == 2
    assert "unknown to it: seven" in capfd.readouterr().err
    assert main([*command, "--source", "tfrecord"]) == 2
    assert "--source and --label_offset are of --data" in capfd.readouterr().err
    arrays = DataChoice(tmp_path / "arrays", "arrays")
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "images.npy", np.zeros((10, 8, 8, 3), np.uint8))
    np.save(tmp_path / "arrays" / "labels.npy", np.arange(10))
    assert evaluate(EvaluateOptions(network(made), tmp_path / "out", arrays))["evaluated"] == 10  # labels by number


@pytest.mark.parametrize(
    ("images", "output", "message"),
    [
        ("nothing", "out.csv", "is neither a folder of images nor an image"),
        ("empty", "out.csv", r"holds no \.png"),
        ("empty", "out.txt", r"name a \.csv or \.parquet file"),
    ],
)
def test_bad_input_of_predict(made: dict[str, Any], tmp_path: Path, images: str, output: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        predict(PredictOptions(network(made), tmp_path / images, tmp_path / output))


def test_real_labels_by_hand(made: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Right where the class is one of several; without a label left out; by the order of file names, not of folders."""
    paths = sorted((made["folder"] / "labelled").rglob("*.png"), key=lambda path: path.name)
    predicted = probabilities(made, paths).argmax(1)
    kinds = [lambda k: [k], lambda k: [(k + 1) % 10, k, (k + 2) % 10], lambda k: [(k + 3) % 10], lambda k: []]
    labels = [kinds[place % 4](int(k)) for place, k in enumerate(predicted)]
    counted = [place for place in range(len(paths)) if place % 4 != 3]
    own = [int(path.parent.name) in labels[place] for place, path in enumerate(paths)]
    command = ["evaluate", str(made["folder"] / "run"), "--data", str(made["folder"] / "labelled")]
    for name, content in {"list": labels, "named": dict(zip([p.name for p in paths], labels, strict=True))}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        given = ["--real_labels", str(tmp_path / f"{name}.json"), "--output", str(tmp_path / name)]
        assert main([*command, *given]) == 0
        found = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert found["real_images"] == len(counted)
        assert found["real_top1"] == pytest.approx(100 * sum(place % 4 < 2 for place in counted) / len(counted))
        assert found["real_agreement"] == pytest.approx(100 * sum(own) / len(counted))
    assert f"of the {len(counted)} images that have one" in capfd.readouterr().out
    assert "real_top1" not in evaluate(EvaluateOptions(network(made), tmp_path / "without"))


@pytest.mark.parametrize(
    ("spoil_labels", "message"),
    [
        (lambda labels: labels[:-1], r"48 entries for 49 images"),
        (lambda labels: [[10], *labels[1:]], r"'0000\.png' has \[10\]; give a list of classes from 0 to 9"),
        (lambda labels: [[-1], *labels[1:]], r"classes from 0 to 9"),
        (lambda labels: [3, *labels[1:]], r"'0000\.png' has 3; give a list"),
        (lambda labels: [[] for _ in labels], r"no image has a label"),
        (lambda labels: {"0000.png": [1]}, r"48 names are only in it or only among the images, '0037\.png' first"),
        (lambda labels: "labels", r"neither a list of lists of classes nor an object"),
    ],
)
def test_bad_real_labels(made: dict[str, Any], tmp_path: Path, spoil_labels: Any, message: str) -> None:
    labels = [[1] for _ in (made["folder"] / "labelled").rglob("*.png")]
    (tmp_path / "real.json").write_text(json.dumps(spoil_labels(labels)))
    options = EvaluateOptions(
        network(made), tmp_path / "out", DataChoice(made["folder"] / "labelled"), real_labels=tmp_path / "real.json"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(options)
    assert not (tmp_path / "out").exists()  # before anything was scored


def test_real_labels_need_names(made: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(made["folder"] / "labelled", tmp_path / "twice")
    first = next((tmp_path / "twice" / "3").glob("*.png"))
    shutil.copy(first, tmp_path / "twice" / "4" / first.name)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "images.npy", np.zeros((10, 8, 8, 3), np.uint8))
    np.save(tmp_path / "arrays" / "labels.npy", np.arange(10))
    (tmp_path / "real.json").write_text(json.dumps([[1]] * 10))
    for choice, message in (
        (DataChoice(tmp_path / "twice"), f"2 images are called '{first.name}'"),
        (DataChoice(tmp_path / "arrays", "arrays"), "the images are not files of their own"),
    ):
        options = EvaluateOptions(network(made), tmp_path / "out", choice, real_labels=tmp_path / "real.json")
        with pytest.raises(ValueError, match=message):
            evaluate(options)
