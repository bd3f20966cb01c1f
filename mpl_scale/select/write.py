"""The selected set as an index: chosen by the rule, with its pseudo labels, and an account of it beside the arrays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpl_scale.config import Config
from mpl_scale.data.index.reader import IndexedImages, read_meta
from mpl_scale.data.index.subset import write_subset
from mpl_scale.files import create_array, replace_text, save_array
from mpl_scale.inference.scores import ScoreFiles
from mpl_scale.inference.scoring import undecodable
from mpl_scale.select.hashes import matches
from mpl_scale.select.rules import SELECTION_RULES, Chosen, RuleSettings, Scores

SELECTION_NAME = "selection.json"
_ROWS = 1 << 16  # rows of distributions copied at once


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is chosen and written.

    rule: of SELECTION_RULES. settings: of the rule. removed: SHA-256 of encoded images that are not to be chosen.
    distributions: whether the probabilities of the chosen images are stored.
    """

    rule: str
    settings: RuleSettings
    removed: frozenset[bytes] = frozenset()
    distributions: bool = False


def write_selected(
    files: ScoreFiles, images: IndexedImages, *, wanted: Wanted, config: Config, output: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Apply a rule to the scores and publish the new index; returns what selection.json holds. On one rank.

    Args:
        files: the scores of all images.
        images: the index they are of.
        wanted: what is chosen.
        config: where the names of the classes may be found.
        output: the new index.
        about: more keys for selection.json.

    Raises:
        ValueError: as the rule does, or nothing fits it.
    """
    settings, removed = wanted.settings, wanted.removed
    chosen = SELECTION_RULES[wanted.rule](scores_of(files, without=removed), settings)
    if not len(chosen.found.ids):
        raise ValueError(
            f"no image of '{images.folder}' has a probability that rule {wanted.rule} asks for, "
            f"{settings.least:g}; lower it"
        )
    unreadable, usable = 0, 0
    for chunk in range(files.chunks):
        readable = int((files.read(chunk)["classes"][:, 0] >= 0).sum())
        usable, unreadable = usable + readable, unreadable + len(files.ids(chunk)) - readable
    kept = sum(len(scores.ids) for scores in scores_of(files, without=removed)) if removed else usable
    summary = {
        **about,
        "rule": wanted.rule,
        **dataclasses.asdict(settings),
        "scored": usable,
        "unreadable": unreadable,
        "removed": usable - kept,
        **_counts(chosen, settings),
    }

    def extra(folder: Path) -> None:
        replace_text(folder / SELECTION_NAME, json.dumps(summary, indent=1) + "\n")
        save_array(folder / "probability.npy", chosen.found.probabilities)
        with open(folder / "unreadable.jsonl", "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in undecodable(files.folder))
        if wanted.distributions:
            _write_distributions(folder, files, chosen, settings.classes)

    write_subset(
        images,
        chosen.found.ids,
        labels=chosen.found.labels,
        classes=_class_names(config, images),
        output=output,
        about={"selected_from": images.fingerprint, "selected_from_index": str(images.folder.absolute())},
        extra=extra,
    )
    return summary


def scores_of(files: ScoreFiles, *, without: frozenset[bytes] = frozenset()) -> Iterator[Scores]:
    """All chunks, less the images that could not be read and those of the given SHA-256."""
    for chunk in range(files.chunks):
        rows = files.read(chunk)
        kept = np.flatnonzero((rows["classes"][:, 0] >= 0) & ~matches(rows["sha256"], without))
        yield Scores(files.ids(chunk)[kept], rows["classes"][kept], rows["probabilities"][kept])


def _counts(chosen: Chosen, settings: RuleSettings) -> dict[str, Any]:
    counts = np.bincount(chosen.found.labels, minlength=settings.classes)
    return {
        "images": len(chosen.found.ids),
        "distinct_images": len(np.unique(chosen.found.ids)),
        "counts": counts.tolist(),
        "distinct": chosen.distinct.tolist(),
        "lowest": [None if np.isnan(value) else float(value) for value in chosen.lowest],
        "empty": np.flatnonzero(counts == 0).tolist(),
        "uncertain": chosen.uncertain,
    }


def _write_distributions(folder: Path, files: ScoreFiles, chosen: Chosen, classes: int) -> None:
    """distributions.npy, float16 [m, classes]; or [m, top], and distribution_classes.npy, int32 [m, top]."""
    ids, whole = chosen.found.ids, files.top == classes
    shape = (len(ids), files.top)
    values = create_array(folder / "distributions.npy", dtype="<f2", shape=shape)
    named = None
    if not whole:
        path = folder / "distribution_classes.npy"
        named = create_array(path, dtype="<i4", shape=shape)
    for start in range(0, len(ids), _ROWS):
        part = slice(start, start + _ROWS)
        rows = files.rows_of(ids[part])
        if named is None:
            back = np.argsort(rows["classes"], axis=1)
            values[part] = np.take_along_axis(rows["probabilities"], back, 1)
        else:
            values[part], named[part] = rows["probabilities"], rows["classes"]
    values.flush()
    if named is not None:
        named.flush()


def _class_names(config: Config, images: IndexedImages) -> list[str]:
    """Class names of the network's training set where it is indexed, else the index's own if their number fits."""
    for found in ([read_meta(Path(config.data.index))["classes"]] if config.data.index else []) + [images.classes]:
        if len(found) == config.model.num_classes:
            return list(found)
    return [f"class {label}" for label in range(config.model.num_classes)]
