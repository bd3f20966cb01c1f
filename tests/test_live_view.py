"""What a run shows of its pseudo labels: counts over all ranks, the truth that nothing is trained on, pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mpl_scale.config import load_config
from mpl_scale.config.schema import DataConfig
from mpl_scale.data import Splits, load_images, make_splits
from mpl_scale.data.index.build import build_index
from mpl_scale.data.samples.truth import UNKNOWN, Truth
from mpl_scale.monitor.grid import Labelled, draw_grid
from mpl_scale.mpl import PseudoLabels
from mpl_scale.trainer.preflight import check_names
from tests.support.configs import DIGITS, tiny, write
from tests.support.ranks import pool
from tests.support.runs import final_state, lines, run

CLASSES, SIDE = 4, 8


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))


def arrays(root: Path, labels: np.ndarray, *, seed: int, indexed: bool = False) -> str:
    """Images of noise and these labels; or their index, which keeps the labels."""
    root.mkdir()
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), SIDE, SIDE, 3), np.uint8)
    np.save(root / "images.npy", images)
    np.save(root / "labels.npy", labels)
    (root / "classes.txt").write_text("".join(f"class {name}\n" for name in "abcd"))
    if not indexed:
        return str(root)
    build_index("arrays", root, output=root.with_suffix(".index"))
    return str(root.with_suffix(".index"))


def places(folder: Path, truth: np.ndarray) -> dict[str, Any]:
    """Labelled, unlabelled (of this truth) and test images."""
    folder.mkdir()
    even = np.arange(80) % CLASSES
    return {
        "labelled": arrays(folder / "labelled", even[:40], seed=1, indexed=True),
        "unlabelled": arrays(folder / "unlabelled", truth, seed=2, indexed=True),
        "test": arrays(folder / "test", even[:20], seed=3, indexed=True),
    }


def config_of(folder: Path, data: dict[str, Any], *, monitors: dict[str, Any] | None = None, **section: Any) -> str:
    """A run on these places: a step has 8 labelled and 8 unlabelled images. monitors: DeepSpeed's sections."""
    raw = tiny(train_batch_size=8, **monitors or {})
    ours = raw["mpl_scale"]
    for name in ("source", "split", "labelled_per_class", "test_fraction", "split_seed"):
        ours["data"].pop(name, None)
    ours["data"] |= data
    ours["model"] |= {"num_classes": CLASSES, "image_size": SIDE}
    ours["parallel"] = {"engine": "flat"}
    ours["phases"]["finetune"] = {"steps": 0}
    for name, values in section.items():
        ours[name] = ours.get(name, {}) | values
    return write(folder, raw)


def named(rows: list[dict[str, Any]], *, without: str = "") -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != without} for row in rows]


def trained(output: Path) -> list[dict[str, Any]]:
    """The lines of the main phase's steps."""
    return [row for row in lines(output) if row["phase"] == row["part"] == "train"]


def test_the_truth_reaches_the_log_and_nothing_that_is_trained(tmp_path: Path) -> None:
    """The same images under other labels: every weight and every other number is the same, bit by bit."""
    truth = np.arange(64) % CLASSES
    found = {}
    for name, labels in (("true", truth), ("other", truth[::-1].copy())):
        config = config_of(tmp_path, places(tmp_path / name, labels))
        run(config, str(tmp_path / f"run_{name}"))
        found[name] = lines(tmp_path / f"run_{name}"), final_state(tmp_path / f"run_{name}")
    (rows, state), (other_rows, other_state) = found.values()
    assert all(torch.equal(state[name], other_state[name]) for name in state.keys() | other_state.keys())
    assert named(rows, without="label_agreement") == named(other_rows, without="label_agreement")
    agreement, other = (
        [row["label_agreement"] for row in each if "label_agreement" in row] for each in (rows, other_rows)
    )
    assert len(agreement) == 6  # a line for every two steps of the warm-up and the main phase
    assert agreement != other


def test_counts_are_of_all_ranks_and_survive_a_stop_between_lines(tmp_path: Path) -> None:
    """One rank and two see the same images; a run that stops after three steps has a line over the steps 3 and 4."""
    config = config_of(tmp_path, places(tmp_path / "data", np.arange(64) % CLASSES))
    run(config, str(tmp_path / "one"))
    pool(2).run(run, config, str(tmp_path / "two"))
    split = ("mpl_scale.parallel.width=2", "mpl_scale.parallel.switch_at=never")
    pool(2).run(run, config, str(tmp_path / "split"), None, split)
    assert pool(2).run(run, config, str(tmp_path / "stopped"), 3) == [None, None]
    pool(2).run(run, config, str(tmp_path / "stopped"))
    assert lines(tmp_path / "stopped") == lines(tmp_path / "two")
    alone, *others = (labels_of(tmp_path / name) for name in ("one", "two", "split"))
    assert len(alone) == 6
    for line in alone:
        shares = [line[f"label_share/{number}"] for number in range(CLASSES)]
        assert sum(shares) == pytest.approx(1)
        assert {16 * share for share in shares} <= set(map(float, range(17)))  # two steps of 8 images
        assert 0 < line["label_confidence"] < 1
    for found in others:  # float32 sums in another order could only turn a label whose two best scores tie
        assert found == [pytest.approx(line, abs=1e-4) for line in alone]


def labels_of(output: Path) -> list[dict[str, float]]:
    """What the lines say of pseudo labels."""
    rows = [{name: row[name] for name in row if name.startswith("label_")} for row in lines(output)]
    return [row for row in rows if row]


def splits_of(**data: Any) -> tuple[DataConfig, Splits]:
    config = DataConfig(**data)
    return config, make_splits(load_images(config), config=config, seed=0)


def test_the_truth_is_told_where_a_source_tells_it(tmp_path: Path) -> None:
    """Images that are labelled too are left out; so are places without labels, and those of other classes."""
    root = arrays(tmp_path / "one", np.arange(80) % CLASSES, seed=1)
    _, splits = splits_of(source="arrays", root=root, labelled_per_class=2, test_fraction=0.25)
    truth = Truth(splits)
    found = truth(splits.unlabelled)
    also = np.isin(splits.unlabelled, splits.labelled)
    assert truth.any
    assert also.sum() == 8
    assert (found[also] == UNKNOWN).all()
    assert (found[~also] == splits.images.labels[splits.unlabelled[~also]]).all()

    given = places(tmp_path / "apart", np.arange(64)[::-1] % CLASSES)
    _, splits = splits_of(**given)
    assert (Truth(splits)(splits.unlabelled) == np.arange(64)[::-1] % CLASSES).all()
    _, splits = splits_of(**given | {"unlabelled": str(tmp_path / "apart" / "unlabelled")})  # read without labels
    assert not Truth(splits).any
    assert (Truth(splits)(splits.unlabelled) == UNKNOWN).all()
    (tmp_path / "apart" / "unlabelled" / "classes.txt").write_text("cat\ndog\ncow\nowl\n")
    build_index("arrays", tmp_path / "apart" / "unlabelled", output=Path(given["unlabelled"]))
    _, splits = splits_of(**given)  # classes of another collection
    assert not Truth(splits).any
    assert (Truth(splits)(splits.unlabelled) == UNKNOWN).all()


def test_views_are_drawn_with_their_labels() -> None:
    weak = np.zeros((3, 8, 8), np.uint8)
    weak[0, 0, 0] = 255  # a red corner, enlarged eight times
    rows = [Labelled(weak, 255 - weak, "a long name " * 9, 0.75, "猫"), Labelled(weak[:1], weak[:1], "b", 1.0)] * 2
    page = np.asarray(draw_grid(rows, title="train, step 3"))
    red = (page == (255, 0, 0)).all(-1)
    cyan = (page == (0, 255, 255)).all(-1)
    assert red.sum() == cyan.sum() == 2 * 8 * 8
    assert page.shape[2] == 3
    large = draw_grid([Labelled(*[np.zeros((3, 512, 512), np.uint8)] * 2, "a", 0.5)], title="")
    assert large.width < 1000


@pytest.mark.parametrize("width", [1, 2])
def test_a_run_leaves_pictures_of_whole_views_on_any_mesh(tmp_path: Path, width: int) -> None:
    """Every 4 of 12 steps; the pixels are those of the batch, brought together where ranks have columns."""
    config = config_of(
        tmp_path,
        places(tmp_path / "data", np.arange(64) % CLASSES),
        logging={"view_grid_every": 4},
        parallel={"width": width, "switch_at": "never"},
    )
    pool(2).run(run, config, str(tmp_path / "out"))
    found = sorted((tmp_path / "out" / "views").iterdir())
    assert [path.name for path in found] == ["step_000004.png", "step_000008.png", "step_000012.png"]
    page = np.asarray(Image.open(found[0]))
    unlabelled = np.load(tmp_path / "data" / "unlabelled" / "images.npy")
    corner = page[38:102:8, 6:70:8]  # the weak view of the first image: every eighth pixel of the enlarged one
    own = load_config(config).mpl.data.weak.pad
    shifts = [
        np.array_equal(corner[own:-own, own:-own], image[top : top + 8 - 2 * own, left : left + 8 - 2 * own])
        for image in unlabelled
        for top in range(2 * own + 1)
        for left in range(2 * own + 1)
    ]
    assert sum(shifts) == 1  # one window of one image


def test_tensorboard_has_the_curves_and_the_pictures(tmp_path: Path) -> None:
    board = {"enabled": True, "output_path": str(tmp_path), "job_name": "board"}
    data = places(tmp_path / "data", np.arange(64) % CLASSES)
    config = config_of(tmp_path, data, monitors={"tensorboard": board}, logging={"view_grid_every": 4})
    pool(2).run(run, config, str(tmp_path / "out"))
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0}).Reload()
    rows = {row["global_step"]: row for row in trained(tmp_path / "out")}
    for name in ("h", "cosine", "label_agreement", "label_share/3"):
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert found == pytest.approx({step: row[name] for step, row in rows.items()})
    shown = {event.step: event.encoded_image_string for event in events.Images("train/views")}
    assert shown.keys() == {8, 12}  # step 4 is the warm-up's
    for step, encoded in shown.items():
        written = Image.open(tmp_path / "out" / "views" / f"step_{step:06d}.png")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), np.asarray(written))


def test_labels_of_a_step_without_finite_logits_leave_a_finite_mean() -> None:
    noted = PseudoLabels(3, device=torch.device("cpu"))
    noted.note([torch.tensor([[0.0, 0.0]]), torch.tensor([[float("nan")] * 2, [0.0, 100.0]])])
    assert noted.confidence.tolist() == [0.5, 0.0, 1.0]
    assert noted.labels.tolist()[::2] == [0, 1]
    noted.note([torch.zeros(3, 2)], [torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])])  # soft labels
    assert noted.labels.tolist() == [1, 0, 1]


def test_vectors_have_no_views() -> None:
    moons = DIGITS.parent / "two_moons.json"
    loaded = load_config(moons, overrides=("mpl_scale.logging.view_grid_every=10",))
    with pytest.raises(ValueError, match=r"view_grid_every = 10: source two_moons has vectors, .*; set 0"):
        check_names(loaded)


def test_the_drop_of_the_labelled_loss_is_measured_and_changes_nothing(tmp_path: Path) -> None:
    """As loss_difference measures it, whose h it is; the networks are those of a run without it, bit by bit."""
    data = places(tmp_path / "data", np.arange(64) % CLASSES)
    rows, states = {}, {}
    for name, rule, measured in (("off", "cosine", False), ("on", "cosine", True), ("h", "loss_difference", False)):
        logging = {"every": 1, "labelled_loss_drop": measured}
        config = config_of(tmp_path, data, logging=logging, method={"feedback": {"rule": rule}})
        run(config, str(tmp_path / name))
        rows[name] = trained(tmp_path / name)
        states[name] = final_state(tmp_path / name)
    assert all(torch.equal(value, states["on"][name]) for name, value in states["off"].items())
    assert named(rows["on"], without="labelled_loss_drop") == rows["off"]
    assert rows["on"][0]["labelled_loss_drop"] == rows["h"][0]["labelled_loss_drop"]  # from the same networks
    assert [row["labelled_loss_drop"] for row in rows["h"]] == [row["feedback"] for row in rows["h"]]


@pytest.mark.parametrize(("channels", "shown"), [(1, (9, 9, 9)), (2, (9, 9, 9)), (3, (9, 8, 7)), (5, (9, 8, 7))])
def test_views_of_any_number_of_channels_have_a_picture(channels: int, shown: tuple[int, int, int]) -> None:
    view = np.broadcast_to(np.arange(9, 9 - channels, -1, dtype=np.uint8)[:, None, None], (channels, 8, 8))
    names = ["two\nlines", "\x07 \udcff \u65e5", "i" * 1_000_000]  # the last is cut at once, not sign by sign
    page = np.asarray(draw_grid([Labelled(view, view, name, 0.5) for name in names], title=""))
    assert (page == np.array(shown, np.uint8)).all(-1).sum() == 2 * len(names) * 64 * 64
