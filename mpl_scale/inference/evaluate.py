"""How good a trained network is on labelled images: accuracy, loss, calibration, and which classes it confuses."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpl_scale.checkpoint.export import checkpoint_config, class_names
from mpl_scale.config.load import import_modules
from mpl_scale.files import expanded, replace_text, replacing
from mpl_scale.inference.labelled import DataChoice, LabelledImages, describe, load_labelled
from mpl_scale.inference.picture import draw_confusion
from mpl_scale.inference.real_labels import RealLabels, read_real_labels
from mpl_scale.inference.scores import Column, ScoreFiles
from mpl_scale.inference.scoring import Scoring, StoredNetwork, joined_ranks, undecodable
from mpl_scale.monitor import command
from mpl_scale.packages import PACKAGES
from mpl_scale.trainer.bad_input import value_on_main

BINS = 15
"""Of the calibration error, equally wide (Guo et al. 2017, section 2)."""
MOST_CONFUSED = 1000
"""Classes up to which the confusion matrix is written, and up to 200 drawn."""
_MOST_DRAWN = 200


@dataclass(frozen=True)
class EvaluateOptions:
    """output: the folder that gets the results. real_labels: see real_labels.py.

    chunk: images that a stopped command may have to score again.
    """

    network: StoredNetwork
    output: Path
    data: DataChoice = field(default_factory=DataChoice)
    chunk: int = 4096
    real_labels: Path | None = None


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate on the ranks the launcher started; a stopped run is continued by the same command.

    Writes evaluation.json, classes.csv and confusion.csv, with confusion.png where matplotlib is installed.

    Returns:
        What evaluation.json holds: top1, top5 and calibration_error in percent, loss (mean CE), images, unreadable,
        classes by name (images, top1). With real labels also real_top1, real_images, which have one, and
        real_agreement: of those, the percentage whose own label is one of the real ones.

    Raises:
        ValueError: bad input; what was scored until then is kept in the folder.
    """
    network, output = options.network, expanded(options.output)
    config = checkpoint_config(network.checkpoint)
    import_modules(config.imports)
    images = load_labelled(config, options.data, classes=class_names(network.checkpoint))
    real = None if options.real_labels is None else read_real_labels(options.real_labels, images)
    top = min(5, config.model.num_classes)
    loss = Column(("loss", "<f4"), lambda ids, logits: _losses(logits, images.labels[ids]))
    files = ScoreFiles(output / "scores.partial", len(images), options.chunk, top, (loss,))
    with joined_ranks(config) as joined, ExitStack() as held:
        identity = {"data": describe(images.images), "images": len(images)}
        scoring = Scoring(config, images, files, network, joined, identity=identity)
        scoring.fill(held, max_bad_fraction=config.data.max_bad_fraction)

        def write() -> dict[str, Any]:
            result = _Measured(files, images, config.model.num_classes)
            about = {"command": command(), "checkpoint": str(network.checkpoint), **scoring.identity}
            summary = {**about, **result.summary(), **_real(files, images, real)}
            summary["bad_files"] = undecodable(files.folder)
            result.write(output)
            replace_text(output / "evaluation.json", json.dumps(summary, indent=1) + "\n")
            shutil.rmtree(files.folder)
            return summary

        return value_on_main(joined[0], write)


def _losses(logits: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy, float32 [n]. labels: int64 [n]."""
    wanted = torch.from_numpy(labels).to(logits.device)
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu().numpy()


def _real(files: ScoreFiles, images: LabelledImages, real: RealLabels | None) -> dict[str, Any]:
    """See `evaluate`; nothing without real labels."""
    if real is None:
        return {}
    counted = right = agreeing = 0
    for chunk in range(files.chunks):
        ids, predicted = files.ids(chunk), files.read(chunk)["classes"][:, 0]
        kept = (predicted >= 0) & real.labelled[ids]
        counted += int(kept.sum())
        right += int(real.right(ids, predicted)[kept].sum())
        agreeing += int(real.right(ids, images.labels[ids])[kept].sum())
    if not counted:
        raise ValueError("none of the images with real labels could be read; see --data and --real_labels")
    return {"real_top1": 100 * right / counted, "real_images": counted, "real_agreement": 100 * agreeing / counted}


class _Measured:
    """Sums over all images that could be read. confusion: int64 [K, K], by label and prediction."""

    def __init__(self, files: ScoreFiles, images: LabelledImages, classes: int) -> None:
        self._names = [str(name) for name in images.classes]
        self.confusion = np.zeros((classes, classes), np.int64)
        self._top5 = self._unreadable = 0
        self._loss = 0.0
        bins = np.zeros((3, BINS))  # images, right ones, sum of confidences
        for chunk in range(files.chunks):
            rows = files.read(chunk)
            good = rows["classes"][:, 0] >= 0
            labels, rows = images.labels[files.ids(chunk)][good], rows[good]
            np.add.at(self.confusion, (labels, rows["classes"][:, 0]), 1)
            self._top5 += int((rows["classes"] == labels[:, None]).any(1).sum())
            self._loss += float(rows["loss"].sum(dtype=np.float64))
            self._unreadable += int((~good).sum())
            confidence = rows["probabilities"][:, 0].astype(np.float64)
            own = np.minimum((confidence * BINS).astype(int), BINS - 1)
            for row, values in enumerate((np.ones(len(own)), rows["classes"][:, 0] == labels, confidence)):
                bins[row] += np.bincount(own, weights=values, minlength=BINS)
        self._calibration = float(np.abs(bins[1] - bins[2]).sum())

    def summary(self) -> dict[str, Any]:
        """See `evaluate`."""
        images = int(self.confusion.sum())
        if not images:
            raise ValueError("none of the images could be read; see --data")
        counts, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return {
            "top1": 100 * sum(right) / images,
            "top5": 100 * self._top5 / images,
            "loss": self._loss / images,
            "calibration_error": 100 * self._calibration / images,
            "unreadable": self._unreadable,
            "evaluated": images,
            "classes": {
                name: {"images": count, "top1": 100 * hits / count}
                for name, count, hits in zip(self._names, counts, right, strict=True)
                if count
            },
        }

    def write(self, folder: Path) -> None:
        """classes.csv: images, recall and precision; confusion.csv: a row for each label; and its picture."""
        counts, predicted, right = self.confusion.sum(1), self.confusion.sum(0), self.confusion.diagonal()
        rows = [
            (name, count, hits, _share(hits, count), _share(hits, found))
            for name, count, found, hits in zip(self._names, counts, predicted, right, strict=True)
        ]
        _write_csv(folder / "classes.csv", ["class", "images", "right", "recall", "precision"], rows)
        if len(self._names) <= MOST_CONFUSED:
            named = [(name, *row) for name, row in zip(self._names, self.confusion.tolist(), strict=True)]
            _write_csv(folder / "confusion.csv", ["label", *self._names], named)
        if len(self._names) <= _MOST_DRAWN and PACKAGES["matplotlib"].installed():
            draw_confusion(self.confusion, self._names, folder / "confusion.png")


def _share(part: int, whole: int) -> str:
    """In percent; nothing where there is no whole."""
    return f"{100 * part / whole:.2f}" if whole else ""


def _write_csv(path: Path, header: list[str], rows: list[tuple[Any, ...]]) -> None:
    with replacing(path) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
