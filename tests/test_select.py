"""`mpl-scale select`: equal to brute force over all probabilities, on any number of ranks and after a stop."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpl_scale.checkpoint import read_prefix
from mpl_scale.cli import main
from mpl_scale.config import load_config
from mpl_scale.data import digits, load_images
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.reader import IndexedImages, verify
from mpl_scale.data.index.subset import write_subset
from mpl_scale.models import build_model
from mpl_scale.select.rules import SELECTION_RULES, RuleSettings, Scores
from mpl_scale.select.run import SelectOptions, select
from mpl_scale.trainer.preflight import load_splits
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.mini_imagenet import WRITERS
from tests.support.ranks import pool

BROKEN = 3  # files of the folder that hold an image's header, its end, and nothing between
TOP = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A network trained for a few steps, and an index of 200 digits, some broken behind their headers."""
    folder = tmp_path_factory.mktemp("select")
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["data"] |= {"evaluation_batch": 16, "max_bad_fraction": 0.1}
    raw["mpl_scale"]["phases"] = {"train": {"steps": 30}}
    raw["mpl_scale"]["checkpoint"] = {"every": 20, "keep": 2}
    raw["mpl_scale"]["model"]["bn_decay"] = 0.9
    config = write(folder, raw)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks of the pool: sums in the same order
    train(load_config(config), Options(folder / "run"))
    images = digits.read_digits(None)
    for sample in range(0, len(images), 9):
        path = folder / "images" / f"part{sample % 2}" / f"{sample:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.read(sample).tobytes())
    for path in sorted((folder / "images" / "part1").iterdir())[:BROKEN]:
        content = path.read_bytes()
        path.write_bytes(content[:33] + bytes(20) + content[-12:])
    index = folder / "in.index"
    build_index("folder", folder / "images", output=index)
    earlier, checkpoint = sorted((folder / "run" / "checkpoints").glob("step_*"))
    yield {"config": config, "checkpoint": checkpoint, "earlier": earlier, "index": index, "folder": folder}
    torch.set_num_threads(threads)


def options_of(made: dict[str, Any], output: Path, **settings: Any) -> SelectOptions:
    values = {"checkpoint": made["checkpoint"], "rule": "per_class", "count": 15, "chunk": 32, "top": TOP, **settings}
    return SelectOptions(index=made["index"], output=output, **values)


def chosen(made: dict[str, Any], output: Path, **settings: Any) -> dict[str, Any]:
    return run(made["config"], options_of(made, output, **settings))


def run(config: str, options: SelectOptions) -> dict[str, Any]:
    return select(load_config(config), options)


def content(output: Path) -> dict[str, bytes]:
    """Every file of an index."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def rows(output: Path) -> list[tuple[str, int]]:
    """Name and label of every row, through the index's own reader."""
    images = IndexedImages(output)
    verify(output)
    return [(images.name(row), int(images.labels[row])) for row in range(len(images))]


def all_probabilities(made: dict[str, Any], tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids and float32 [n, 10] of all readable images, from the score files."""
    chosen(made, tmp_path / "scores", rule="threshold", least=0.0, count=1000, keep_scores=True)
    files = sorted((tmp_path / "scores.partial").glob("scores-*.npy"))
    scored = np.concatenate([np.load(path) for path in files])
    ids = np.flatnonzero(scored["classes"][:, 0] >= 0)
    probabilities = np.zeros((len(ids), 10), np.float32)
    np.put_along_axis(probabilities, scored["classes"][ids].astype(int), scored["probabilities"][ids], 1)
    return ids, probabilities


def best_of(column: np.ndarray, ids: np.ndarray, count: int) -> list[int]:
    return ids[sorted(range(len(ids)), key=lambda row: (-column[row], ids[row]))[:count]].tolist()


def test_a_threshold_that_no_image_reaches_is_named(made: dict[str, Any], tmp_path: Path) -> None:
    for duplicate in (False, True):
        with pytest.raises(ValueError, match=r"no image of .* that rule threshold asks for, 0.99999; lower it"):
            chosen(made, tmp_path / "none", rule="threshold", least=0.99999, count=12, duplicate=duplicate)
    assert not (tmp_path / "none").exists()


def test_scores_are_the_networks_probabilities_and_rules_equal_brute_force(
    made: dict[str, Any], tmp_path: Path
) -> None:
    ids, probabilities = all_probabilities(made, tmp_path)
    source = IndexedImages(made["index"])
    assert len(ids) == len(source) - BROKEN
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-5)  # float32
    evaluator = _probabilities(made, source, ids)
    assert probabilities == pytest.approx(evaluator, abs=1e-5)  # other batches: sums in another order

    summary = chosen(made, tmp_path / "best", count=15)
    expected = sorted((row, c) for c in range(10) for row in best_of(probabilities[:, c], ids, 15))
    assert rows(tmp_path / "best") == [(source.name(row), label) for row, label in expected]
    assert summary["counts"] == [15] * 10
    assert summary["uncertain"] == []
    assert summary["unreadable"] == BROKEN
    listed = (tmp_path / "best" / "unreadable.jsonl").read_text().splitlines()
    assert len(listed) == BROKEN

    argmax, confidence, level = probabilities.argmax(1), probabilities.max(1), float(np.median(probabilities.max(1)))
    summary = chosen(made, tmp_path / "above", rule="threshold", least=level, count=12, duplicate=True)
    got = rows(tmp_path / "above")
    for label in range(10):
        mine = (argmax == label) & (confidence > level)
        kept = best_of(confidence[mine], ids[mine], 12)
        times = [got.count((source.name(row), label)) for row in kept]
        assert sum(times) == (12 if kept else 0) == summary["counts"][label]
        assert not kept or max(times) - min(times) <= 1
    assert got == sorted(got)
    assert len(got) == summary["images"] > summary["distinct_images"]


def _probabilities(made: dict[str, Any], source: IndexedImages, ids: np.ndarray) -> np.ndarray:
    """By PIL and the stored weights, one batch of all images."""
    config = load_config(made["config"]).mpl
    module = build_model(config.model.teacher, config.model, field="teacher", seed=0).eval()
    prefixes = (f"teacher/{part}" for part in ("master", "buffer"))
    module.load_state_dict({k: v for prefix in prefixes for k, v in read_prefix(made["checkpoint"], prefix).items()})
    pixels = [np.asarray(Image.open(io.BytesIO(source.read(int(row)).tobytes())).convert("RGB")) for row in ids]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (config.data.mean, config.data.std))
    with torch.no_grad():
        return module(((images - mean) / std).float()).softmax(1).numpy()


def test_two_ranks_and_a_resume_write_the_same_files(made: dict[str, Any], tmp_path: Path) -> None:
    settings = {"distributions": True, "keep_scores": True}
    alone = chosen(made, tmp_path / "one", **settings)
    (distributions,) = (np.load(tmp_path / "one" / "distributions.npy"),)
    assert distributions.dtype == np.float16
    assert distributions.shape == (150, 10)
    probability = np.load(tmp_path / "one" / "probability.npy")
    labels = IndexedImages(tmp_path / "one").labels
    assert distributions[np.arange(150), labels] == pytest.approx(probability, rel=2**-11)  # float16's rounding
    for summary in pool(2).run(run, made["config"], options_of(made, tmp_path / "two", **settings)):
        assert summary == alone
    assert content(tmp_path / "two") == content(tmp_path / "one")
    partial = tmp_path / "two.partial"
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("scores-*.npy")}
    assert len(before) == -(-len(IndexedImages(made["index"])) // 32)
    (partial / "scores-000002.npy").unlink()
    (partial / "scores-000004.npy").write_bytes(b"cut short")
    assert chosen(made, tmp_path / "two", **settings) == alone
    assert content(tmp_path / "two") == content(tmp_path / "one")
    after = {path.name: path.stat().st_mtime_ns for path in partial.glob("scores-*.npy")}
    assert {name for name in before if before[name] != after[name]} == {"scores-000002.npy", "scores-000004.npy"}
    for other, name in (({"network": "student"}, "network"), ({"checkpoint": made["earlier"]}, "checkpoint")):
        with pytest.raises(ValueError, match=f"holds scores of another --{name}; choose another --output, or remove"):
            chosen(made, tmp_path / "two", overwrite=True, **settings, **other)


def test_another_selection_is_replaced_only_when_asked(made: dict[str, Any], tmp_path: Path) -> None:
    chosen(made, tmp_path / "out", count=3)
    first = content(tmp_path / "out")
    chosen(made, tmp_path / "out", count=3)  # the same once more, as of a job that is started again
    assert content(tmp_path / "out") == first
    message = rf"--output '{tmp_path / 'out'}' holds another index; give --overwrite"
    for other in ({"count": 4}, {"count": 3, "distributions": True}, {"count": 3, "checkpoint": made["earlier"]}):
        with pytest.raises(ValueError, match=message):
            chosen(made, tmp_path / "out", **other)
    shutil.copytree(made["index"], tmp_path / "index")
    with pytest.raises(ValueError, match="holds another index"):
        chosen(made, tmp_path / "index")
    assert content(tmp_path / "out") == first
    chosen(made, tmp_path / "out", count=4, overwrite=True)
    assert content(tmp_path / "out") != first


def test_images_of_the_given_hashes_are_not_chosen(made: dict[str, Any], tmp_path: Path) -> None:
    """The images of a first choice are taken out of the second one, which fills up with the next best."""
    hashes, first = tmp_path / "hashes.txt", tmp_path / "first"
    chosen(made, first, count=3)
    assert main(["select", "--index", str(first), "--write_hashes", str(hashes)]) == 0
    images = IndexedImages(first)
    assert hashes.read_text().split() == [hashlib.sha256(images.read(row)).hexdigest() for row in range(len(images))]
    summary = chosen(made, tmp_path / "second", count=3, removed=hashes)
    names = {name for name, _ in rows(first)}
    assert not names & {name for name, _ in rows(tmp_path / "second")}
    assert summary["removed"] == len(names)
    assert summary["counts"] == [3] * 10


def test_a_run_takes_its_unlabelled_images_from_the_selected_index(made: dict[str, Any], tmp_path: Path) -> None:
    chosen(made, tmp_path / "chosen", rule="threshold", least=0.1, count=20, duplicate=True)
    overrides = (f"mpl_scale.data.unlabelled_index={tmp_path / 'chosen'}", "mpl_scale.phases.train.steps=3")
    config = load_config(made["config"], overrides=overrides)
    train(config, Options(tmp_path / "out"))
    parts = json.loads((tmp_path / "out" / "splits" / "manifest.json").read_text())["parts"]
    assert parts["unlabelled"]["count"] == len(IndexedImages(tmp_path / "chosen"))
    assert parts["labelled"]["count"] == 40
    ids = np.load(tmp_path / "out" / "splits" / "unlabelled.npy")
    first, second, joined = load_images(config.mpl.data), IndexedImages(tmp_path / "chosen"), load_splits(config).images
    assert ids.tolist() == list(range(len(first), len(first) + len(second))) == list(range(len(first), len(joined)))
    for images, own, both in ((first, 7, 7), (second, 0, len(first)), (second, 9, len(first) + 9)):
        assert joined.name(both) == images.name(own)
        assert joined.read(both).tobytes() == images.read(own).tobytes()
        assert joined.labels[both] == images.labels[own]


def test_a_run_goes_on_with_the_selected_index_it_began_with(made: dict[str, Any], tmp_path: Path) -> None:
    """Another one, one selected anew, or none: refused before anything is written; a moved one is the same."""
    chosen(made, tmp_path / "first", count=15)
    chosen(made, tmp_path / "second", count=12)

    def go_on(index: Path | None, *, steps: int, output: str = "out", resume: str = "auto") -> None:
        chosen_index = [] if index is None else [f"mpl_scale.data.unlabelled_index={index}"]
        config = load_config(made["config"], overrides=[*chosen_index, f"mpl_scale.phases.train.steps={steps}"])
        train(config, Options(tmp_path / output, resume=resume))

    go_on(tmp_path / "first", steps=2)
    manifest = (tmp_path / "out" / "splits" / "manifest.json").read_text()
    described = json.loads(manifest)["unlabelled_index"]
    assert described["folder"] == str(tmp_path / "first")
    assert described["sha256"] == IndexedImages(tmp_path / "first").fingerprint
    began = rf"the run of '{tmp_path / 'out'}' began with '{tmp_path / 'first'}' \(sha256 {described['sha256'][:12]}\)"
    with pytest.raises(ValueError, match=rf"unlabelled_index = '{tmp_path / 'second'}' \(sha256 .*{began}"):
        go_on(tmp_path / "second", steps=3)
    with pytest.raises(ValueError, match=f"unlabelled_index = null, but {began}"):
        go_on(None, steps=3)
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("step_*")
    with pytest.raises(ValueError, match=began):
        go_on(tmp_path / "second", steps=3, output="elsewhere", resume=str(checkpoint))
    assert (tmp_path / "out" / "splits" / "manifest.json").read_text() == manifest
    (tmp_path / "first").rename(tmp_path / "moved")
    go_on(tmp_path / "moved", steps=3)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 3
    chosen(made, tmp_path / "moved", count=9, overwrite=True)  # the same folder, other images
    with pytest.raises(ValueError, match=rf"began with '{tmp_path / 'moved'}' \(sha256 {described['sha256'][:12]}\)"):
        go_on(tmp_path / "moved", steps=4)


def test_a_selected_index_whose_files_changed_is_to_be_selected_again(made: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(made["folder"] / "images", tmp_path / "images")
    build_index("folder", tmp_path / "images", output=tmp_path / "in.index")
    chosen({**made, "index": tmp_path / "in.index"}, tmp_path / "chosen", count=3)
    again = (
        f"select it again: mpl-scale select --index '{tmp_path / 'in.index'}' --output '{tmp_path / 'chosen'}', with"
    )
    config = load_config(made["config"], overrides=[f"mpl_scale.data.unlabelled_index={tmp_path / 'chosen'}"])
    (tmp_path / "images" / "part0" / "new.png").write_bytes((tmp_path / "images" / "part0" / "0000.png").read_bytes())
    with pytest.raises(ValueError, match="part0' has changed since") as changed:
        load_splits(config)
    assert again in str(changed.value)
    assert "mpl-scale index" not in str(changed.value)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="bring it back, or select it again") as gone:
        load_splits(config)
    assert again in str(gone.value)
    with pytest.raises(ValueError, match="set --root to where the shards are, or rebuild it: mpl-scale index"):
        chosen({**made, "index": tmp_path / "in.index"}, tmp_path / "chosen", count=3)


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_subset_of_every_format_holds_the_same_images(tmp_path: Path, kind: str) -> None:
    """Twice an id, ids of several shards, the last one: same bytes and names as in the index they are taken from."""
    source, write_images = WRITERS[kind]
    write_images(tmp_path / "data")
    build_index(source, tmp_path / "data", output=tmp_path / "in.index")
    images = IndexedImages(tmp_path / "in.index")
    ids = np.array([0, 5, 5, 11, len(images) - 1])
    labels = np.array([2, 0, 1, 2, 0])
    classes = ["a", "b", "c"]
    write_subset(images, ids, labels=labels, classes=classes, output=tmp_path / "out.index", about={})
    subset = IndexedImages(tmp_path / "out.index")
    verify(tmp_path / "out.index")
    assert subset.labels.tolist() == labels.tolist()
    assert subset.classes == ("a", "b", "c")
    for row, sample in enumerate(ids.tolist()):
        assert subset.read(row).tobytes() == images.read(sample).tobytes()
        assert subset.sizes[row].tolist() == images.sizes[sample].tolist()
        assert Path(subset.name(row)).name == Path(images.name(sample)).name


BAD = [
    (["--checkpoint", "nowhere"], "nowhere: no such folder; give a checkpoint's folder step_... or a run's output"),
    (["--set", "mpl_scale.model.num_classes=11"], "num_classes = 11: size mismatch for"),
    (["--per_class", "400"], "--per_class 400, but 10 of 10 classes have fewer images, class 0 only"),
    (["--network", "student", "--class_size", "3"], "--class_size means nothing with --per_class; leave it out"),
    (["--index", "none.index"], "'none.index' is no index"),
    (["--output", "."], "is there and is no index; choose another folder, or remove it"),
    (["--remove", "run.json"], "run.json, line 1: "),
    (["--set", "mpl_scale.data.unlabelled_index=x"], "--checkpoint is missing; only --write_hashes does without it"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_one_clear_line(
    made: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(made["folder"])
    command = ["select", "--ds_config", made["config"], "--index", str(made["index"]), "--output", str(tmp_path / "o")]
    if "is missing" not in message:
        command += ["--checkpoint", str(made["folder"] / "run")]
    command += [] if "--per_class" in more else ["--per_class", "3"]
    assert main([*command, *more]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[score")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("argmax_only", [False, True], ids=["any class", "argmax only"])
def test_kept_classes_that_were_too_few_are_named(argmax_only: bool) -> None:
    """With 2 of 6 classes kept of each image: every class whose choice differs from the full one is `uncertain`."""
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.full(6, 0.3), 300).astype(np.float32)
    order = np.argsort(-probabilities, 1)
    settings = RuleSettings(classes=6, count=100, duplicate=True, argmax_only=argmax_only)

    def rule(top: int) -> Any:
        best = order[:, :top]
        values = np.take_along_axis(probabilities, best, 1)
        chunks = [slice(start, start + 50) for start in range(0, 300, 50)]
        scores = [Scores(np.arange(300)[part], best[part].astype(np.int32), values[part]) for part in chunks]
        return SELECTION_RULES["per_class"](scores, settings)

    whole, cut = rule(6), rule(2)
    differs = {
        label
        for label in range(6)
        if set(whole.found.ids[whole.found.labels == label]) != set(cut.found.ids[cut.found.labels == label])
    }
    assert whole.uncertain == []
    assert bool(differs) != argmax_only
    assert differs <= set(cut.uncertain)
