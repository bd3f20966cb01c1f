"""docs/data.md has an example for every source; each is a config that trains, on a small data set of its layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mpl_scale.config import load_config
from mpl_scale.data import SOURCES
from mpl_scale.data.index.format import FORMATS
from mpl_scale.trainer.prepare import Options, train
from tests.support import mini_imagenet as mini
from tests.support.configs import DIGITS
from tests.support.tiers import full

REPOSITORY = DIGITS.parents[1]
PAGE = (REPOSITORY / "docs" / "data.md").read_text()
EXAMPLES = {
    json.loads(text)["mpl_scale"]["data"]["source"]: text for text in re.findall(r"```json\n(.*?)```", PAGE, re.S)
}
WITHOUT_FILES = {"digits", "two_moons"}
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


@pytest.mark.parametrize(
    "source", [source if source in ("folder", "parquet", "idx") else full(source) for source in EXAMPLES]
)
def test_the_example_of_a_source_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("MPL_SCALE_DATA", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    (tmp_path / "example.json").write_text(EXAMPLES[source])
    run = load_config(tmp_path / "example.json", overrides=["mpl_scale.parallel.engine=flat"])
    data, classes = run.mpl.data, run.mpl.model.num_classes
    if source not in WITHOUT_FILES:
        labelled = data.labelled_per_class * classes
        made = several(classes, 3 * labelled)  # SVHN's and STL-10's writers make 5 of 12 the labelled part
        monkeypatch.setattr(mini, "pictures", lambda: made)
        mini.WRITERS[WRITER.get(source, source)][1](Path(data.root) / BELOW.get(source, ""))
    summary = train(run, Options(tmp_path / "run", max_steps=1))
    assert summary is not None
    manifest = json.loads((tmp_path / "run" / "splits" / "manifest.json").read_text())
    assert manifest["classes"] == classes
    assert manifest["parts"]["labelled"]["count"] == data.labelled_per_class * classes
    assert manifest["parts"]["unlabelled"]["count"] >= manifest["parts"]["labelled"]["count"]
