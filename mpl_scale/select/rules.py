"""Which images of a scored set make up the unlabelled set: the rules of sections 3.3 and 4 and of appendix E, by name.

A rule sees the scores chunk by chunk and keeps no more than the best of each class, so it runs over any number of
images in memory of (classes x images per class). Nothing here reads an image or a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpl_scale.config.names import Registry
from mpl_scale.data.samples.streams import Purpose, stream_of
from mpl_scale.philox import uniform_numpy

_LEAST_PENDING = 1 << 20  # candidates that are sorted at once


class Scores(NamedTuple):
    """Images and their most probable classes, most probable first."""

    ids: np.ndarray  # int64 [n], ascending
    classes: np.ndarray  # int32 [n, top]
    probabilities: np.ndarray  # float32 [n, top]


class Found(NamedTuple):
    """An image taken for a class, a row each."""

    ids: np.ndarray  # int64 [m]
    labels: np.ndarray  # int64 [m], the class
    probabilities: np.ndarray  # float32 [m], of that class

    def rows(self, index: np.ndarray) -> Found:
        """Some of the rows, by number or by mask."""
        return Found(*(values[index] for values in self))


@dataclass(frozen=True)
class RuleSettings:
    """The settings of a selection rule.

    classes: how many there are. count: images of each class. least: of the probability. duplicate: whether images are
    repeated where a class has fewer than `count`. argmax_only: an image stands for its most probable class alone.
    seed: of the choice of images that are repeated once more than others.
    """

    classes: int
    count: int
    least: float = 0.0
    duplicate: bool = False
    argmax_only: bool = False
    seed: int = 0


class Chosen(NamedTuple):
    """The selected rows by id, then label; a repeated image has several rows.

    distinct: int64 [classes], images of each class before any was repeated. lowest: float32 [classes], the smallest
    probability taken, NaN for a class without images. uncertain: classes for which some image beyond its `top` classes
    might have been more probable than the last one taken.
    """

    found: Found
    distinct: np.ndarray
    lowest: np.ndarray
    uncertain: list[int]


SelectionRule = Callable[[Iterable[Scores], RuleSettings], Chosen]
SELECTION_RULES: Registry[SelectionRule] = Registry("selection rule")
register_selection_rule = SELECTION_RULES.register
"""Make a function (chunks of Scores, RuleSettings) -> Chosen available to mpl-scale select."""


@register_selection_rule("per_class")
def per_class(scores: Iterable[Scores], settings: RuleSettings) -> Chosen:
    """The `count` images of highest probability for each class (section 3.3, appendix E).

    Taken literally: classes are filled one by one from all images, so an image may serve several. Appendix E speaks of
    ImageNet classes without sufficient images in YFCC-100M that end up with low-quality or out-of-domain ones: the last
    images of a class need not have it as their most probable one. `argmax_only` asks for that.

    Raises:
        ValueError: a class has fewer images than `count`, and `duplicate` is not set.
    """
    best, missed = _BestPerClass(settings.classes, settings.count), 0.0
    for chunk in scores:
        columns = 1 if settings.argmax_only else chunk.classes.shape[1]
        best.add(chunk, columns, chunk.probabilities[:, :columns] >= settings.least)
        if not settings.argmax_only and chunk.classes.shape[1] < settings.classes and len(chunk.ids):
            kept = chunk.probabilities
            missed = max(missed, float(np.minimum(kept[:, -1], 1 - kept.sum(1, dtype=np.float64)).max()))
    found = best.result()
    distinct = np.bincount(found.labels, minlength=settings.classes)
    short = np.flatnonzero(distinct < settings.count)
    if len(short) and not settings.duplicate:
        raise ValueError(
            f"--per_class {settings.count}, but {len(short)} of {settings.classes} classes have fewer images, class "
            f"{short[0]} only {distinct[short[0]]}; lower it or --min_confidence, raise --top, leave out "
            "--argmax_only, or add --duplicate"
        )
    chosen = _finish(found, distinct, settings)
    settled = (distinct == settings.count) & (chosen.lowest >= missed)
    uncertain = np.flatnonzero(~settled & (missed > settings.least))
    return chosen._replace(uncertain=uncertain.tolist())


@register_selection_rule("threshold")
def threshold(scores: Iterable[Scores], settings: RuleSettings) -> Chosen:
    """Noisy Student's rule, to which section 4 refers: confidence above a threshold (0.3), the best 130K of a class.

    An image stands for its most probable class. A class with fewer images is up-sampled: its images are repeated until
    there are `count` (Xie et al., "Self-training with Noisy Student", section 3.1). One without any stays empty.
    """
    best = _BestPerClass(settings.classes, settings.count)
    for chunk in scores:
        best.add(chunk, 1, chunk.probabilities[:, :1] > settings.least)
    found = best.result()
    return _finish(found, np.bincount(found.labels, minlength=settings.classes), settings)


class _BestPerClass:
    """The `count` most probable images of each class so far; among equals those of the lowest ids."""

    def __init__(self, classes: int, count: int) -> None:
        self._count = count
        self._floor = np.full(classes, -np.inf, np.float32)  # what an image must reach: the last one's of a full class
        self._best = Found(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        self._pending: list[Found] = []
        self._waiting = 0

    def add(self, chunk: Scores, columns: int, wanted: np.ndarray) -> None:
        """Candidates: the first `columns` classes of each image, where `wanted`, bool [n, columns], is set."""
        classes, probabilities = chunk.classes[:, :columns], chunk.probabilities[:, :columns]
        wanted = wanted & (probabilities >= self._floor[classes])
        ids = np.broadcast_to(chunk.ids[:, None], wanted.shape)[wanted]
        self._pending.append(Found(ids, classes[wanted].astype(np.int64), probabilities[wanted]))
        self._waiting += len(ids)
        if self._waiting > max(_LEAST_PENDING, len(self._best.ids)):  # each is sorted a few times only
            self._settle()

    def result(self) -> Found:
        """The chosen rows, sorted by class, then falling probability, then id."""
        self._settle()
        return self._best

    def _settle(self) -> None:
        found = Found(*map(np.concatenate, zip(self._best, *self._pending, strict=True)))
        found = found.rows(np.lexsort((found.ids, -found.probabilities, found.labels)))
        position = _position_in_class(found.labels)
        last = position == self._count - 1
        self._floor[found.labels[last]] = found.probabilities[last]
        self._best, self._pending, self._waiting = found.rows(position < self._count), [], 0


def _finish(found: Found, distinct: np.ndarray, settings: RuleSettings) -> Chosen:
    """Repeat images where that is asked for, and sort by id."""
    lowest = np.full(settings.classes, np.nan, np.float32)
    lowest[found.labels] = found.probabilities  # falling within each class: the last one stays
    if settings.duplicate:
        found = found.rows(np.repeat(np.arange(len(found.ids)), _repeats(found, distinct, settings)))
    found = found.rows(np.lexsort((found.labels, found.ids)))
    return Chosen(found, distinct, lowest, [])


def _repeats(found: Found, distinct: np.ndarray, settings: RuleSettings) -> np.ndarray:
    """How often each row is taken so that its class has `count`: evenly, the odd ones drawn by the seed."""
    whole, odd = np.divmod(settings.count, np.maximum(distinct, 1))
    uniform = uniform_numpy(
        seed=settings.seed, stream=stream_of(Purpose.SELECTION), epoch=found.labels, ids=found.ids, columns=1
    )
    order = np.lexsort((uniform[:, 0], found.labels))
    place = np.empty(len(order), np.int64)
    place[order] = _position_in_class(found.labels[order])
    return whole[found.labels] + (place < odd[found.labels])


def _position_in_class(labels: np.ndarray) -> np.ndarray:
    """Position of each row among the rows of its label, int64 [n]; labels are sorted."""
    return np.arange(len(labels)) - np.searchsorted(labels, labels)
