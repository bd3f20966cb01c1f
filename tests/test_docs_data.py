"""docs/data.md has an example for every source; each is a config that trains, on a small data set of its layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpl_scale.config import Config, load_config
from mpl_scale.data import SOURCES
from mpl_scale.data.index.format import FORMATS
from mpl_scale.trainer.prepare import Options, train
from tests.support import mini_imagenet as mini
from tests.support.configs import DIGITS
from tests.support.image_sets import write_folder
from tests.support.tiers import full

REPOSITORY = DIGITS.parents[1]
PAGE = (REPOSITORY / "docs" / "data.md").read_text()
EXAMPLES = {
    json.loads(text)["mpl_scale"]["data"].get("source", "images"): text
    for text in re.findall(r"```json\n(.*?)```", PAGE, re.S)
}
"""By source; that of places apart, which names none, is of `images`."""
WITHOUT_FILES = {"digits", "two_moons", "synthetic"}
BELOW = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "stl10": "stl10_binary", "idx": "raw"}
"""Folders below the root that the page names."""
WRITER = {"cifar10": "cifar10 python"}
"""Of mini_imagenet, where it is not named after the source."""


def test_every_source_has_its_layout_and_one_example() -> None:
    table = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Formats")[2].partition("\n## ")[0], re.MULTILINE)
    assert sorted(EXAMPLES) == sorted(table)
    assert len(re.findall("```json", PAGE)) == len(EXAMPLES)
    ours = {name for name, source in SOURCES.items() if source.__module__.startswith("mpl_scale.data.formats")}
    assert FORMATS.keys() | ours | WITHOUT_FILES == EXAMPLES.keys()


def several(classes: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """mini_imagenet's pictures again and again: uint8 [count, 32, 32, 3], and labels int64 [count], classes in turn."""
    pictures = mini.pictures()[0]
    return np.resize(pictures, (count, *pictures.shape[1:])), np.arange(count) % classes


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which examples are run, as in a clone."""
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    return tmp_path


def trained(here: Path, source: str, prepare: Callable[[Config], None]) -> dict[str, Any]:
    """The manifest of a step's run of the example, whose data are written by `prepare`."""
    (here / "example.json").write_text(EXAMPLES[source])
    run = load_config(here / "example.json", overrides=["mpl_scale.parallel.engine=flat"])
    prepare(run.mpl)
    assert train(run, Options(here / "run", max_steps=1)) is not None
    manifest = json.loads((here / "run" / "splits" / "manifest.json").read_text())
    assert manifest["classes"] == run.mpl.model.num_classes
    return manifest


@pytest.mark.parametrize(
    "source",
    [
        source if source in ("folder", "parquet", "idx") else full(source)
        for source in sorted(EXAMPLES.keys() - {"images"})
    ],
)
def test_the_example_of_a_source_trains(here: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    labelled = 0

    def prepare(config: Config) -> None:
        nonlocal labelled
        data, classes = config.data, config.model.num_classes
        labelled = data.labelled_per_class * classes
        if source not in WITHOUT_FILES:
            made = several(classes, 3 * labelled)  # SVHN's and STL-10's writers make 5 of 12 the labelled part
            monkeypatch.setattr(mini, "pictures", lambda: made)
            mini.WRITERS[WRITER.get(source, source)][1](Path(data.root) / BELOW.get(source, ""))

    parts = trained(here, source, prepare)["parts"]
    assert parts["labelled"]["count"] == labelled
    assert parts["unlabelled"]["count"] >= labelled


def test_the_example_of_places_apart_trains(here: Path) -> None:
    def prepare(config: Config) -> None:
        write_folder(Path(config.data.labelled), images=20, side=32)
        write_folder(Path(config.data.test), images=5, side=33)
        photos = Path(config.data.unlabelled)
        (photos / "2019").mkdir(parents=True)
        for number, content in enumerate(mini.files()):
            (photos / ("2019" if number % 2 else ".") / f"{number}.png").write_bytes(content)

    parts = trained(here, "images", prepare)["parts"]
    assert {name: part["count"] for name, part in parts.items()} == {
        "labelled": 40,
        "unlabelled": 48,
        "test": 10,
        "held_out": 0,
    }
