"""Source synthetic: images without files, for every configuration, and what is said of settings without effect."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpl_scale.config import load_config
from mpl_scale.data.formats.synthetic import SyntheticImages
from mpl_scale.data.loader import check_batches
from mpl_scale.trainer.preflight import check_names, load_splits
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import DIGITS, tiny, write
from tests.support.runs import StopAfter, final_state

CONFIGS = sorted(path for path in DIGITS.parent.glob("*.json") if path.stem != "two_moons")  # of vectors
SYNTHETIC = "mpl_scale.data.source=synthetic"


def pixels(images: SyntheticImages, sample: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(images.read(sample).tobytes())))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_has_images_without_its_data(path: Path) -> None:
    run = load_config(path, overrides=[SYNTHETIC])
    check_names(run)
    splits, config = load_splits(run), run.mpl
    images = splits.images
    assert isinstance(images, SyntheticImages)
    check_batches(config.data, splits, labelled_batch=1, unlabelled_batch=1, data_ranks=1)
    assert len(splits.test) == len(splits.labelled) == 1024
    assert not np.intersect1d(splits.test, np.union1d(splits.labelled, splits.unlabelled)).size
    shared = np.intersect1d(splits.labelled, splits.unlabelled).size
    assert shared == (0 if config.data.unlabelled_from in ("auto", "rest") else 1024)  # D.2, and training: both
    assert np.unique(images.labels[splits.labelled]).tolist() == list(range(config.model.num_classes))
    one = pixels(images, int(splits.unlabelled[-1]))
    assert one.shape == (*images.sizes[0], 3)
    assert min(one.shape[:2]) >= config.model.image_size


def test_an_image_is_a_function_of_seed_and_id() -> None:
    images, again = (SyntheticImages(count=50, side=24, number=5, seed=3) for _ in range(2))
    assert all(np.array_equal(images.read(sample), again.read(sample)) for sample in (7, 0, 199))
    assert np.bincount(images.labels).tolist() == [40] * 5
    other = SyntheticImages(count=50, side=24, number=5, seed=4)
    differing = [np.mean(images.read(0) != other.read(0)), np.mean(images.read(0) != images.read(5))]
    assert min(differing) > 0.9
    assert images.read(0)[:40].tobytes() == bytes.fromhex(FIRST)  # these bytes are a promise to resumed runs


FIRST = "50360a32342032340a3235350a806449853d245968315b392f5e682e53363eb3659d90457eb664a1"


def test_a_class_can_be_learned() -> None:
    """By the nearest mean image of ten others of each class."""
    images = SyntheticImages(count=100, side=16, number=10, seed=0)
    all_of_part = np.stack([pixels(images, sample) for sample in range(200)]).astype(float)
    means = np.stack([all_of_part[:100][images.labels[:100] == label].mean(0) for label in range(10)])
    nearest = ((all_of_part[100:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == images.labels[100:200]).mean() > 0.95


def test_a_run_says_which_settings_have_no_effect_and_resumes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a teacher's distributions, places and splits of data that is not there."""
    raw = tiny()
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["logging"]["progress"] = "lines"
    section["method"] = {"name": "reduced_mpl", "teacher_loss": "supervised"}
    section["model"]["teacher"] = {"name": "reduced_teacher"}
    section["phases"]["teacher_warmup"]["steps"] = 0
    section["phases"]["finetune"]["steps"] = 0
    section["data"] |= {"root": "/nowhere", "split": "imagenet_10", "label_offset": 1, "distributions": "none.npy"}
    config = write(tmp_path, raw)
    made = [SYNTHETIC, "mpl_scale.data.synthetic_images=80"]
    run = load_config(config, overrides=[*made, "mpl_scale.data.resident=off"])
    (note,) = run.notes
    for name in ("root", "split", "label_offset", "distributions"):
        assert f"mpl_scale.data.{name}" in note.partition(" (source = synthetic)")[0]
    assert train(run, Options(tmp_path / "out"), stop_requested=StopAfter(5)) is None
    assert "data: 80 labelled, 80 unlabelled and 80 evaluation images" in capfd.readouterr().err
    stopped, whole = train(run, Options(tmp_path / "out")), train(run, Options(tmp_path / "whole"))
    resident = train(load_config(config, overrides=made), Options(tmp_path / "resident"))
    assert None not in (stopped, whole, resident)
    assert stopped["results"] == whole["results"] == resident["results"]
    expected, found = final_state(tmp_path / "whole"), final_state(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_places_apart_have_no_effect_beside_it(tmp_path: Path) -> None:
    raw = tiny()
    raw["mpl_scale"]["data"] |= {"labelled": "/nowhere", "root": "/too", "test": "/nowhere"}
    run = load_config(write(tmp_path, raw), overrides=[SYNTHETIC])
    assert len(load_splits(run).labelled) == 1024
    (note,) = run.notes
    assert "mpl_scale.data.labelled" in note.partition(" (source = synthetic)")[0]
    (other,) = load_config(write(tmp_path, tiny()), overrides=["mpl_scale.data.synthetic_images=9"]).notes
    assert "mpl_scale.data.synthetic_images (source = digits)" in other
