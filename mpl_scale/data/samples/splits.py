"""Test, labelled, unlabelled and held-out sample ids: a pure function of (seed, images, settings), by name.

The splits of appendix C.1 are named after the paper's benchmarks and depend on no seed: they are ranges of the images
in the order of their files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mpl_scale.config.names import Registry, require_known
from mpl_scale.config.schema import DataConfig
from mpl_scale.data.formats.synthetic import SyntheticImages
from mpl_scale.data.index.reader import IndexedImages, concatenate
from mpl_scale.data.joined import JoinedImages
from mpl_scale.data.registry import ImageFiles, ImageSet
from mpl_scale.data.samples.streams import Purpose, stream_of
from mpl_scale.philox import uniform_numpy


@dataclass(frozen=True)
class Splits:
    """Sample ids of each part, int64, sorted. `unlabelled` may hold `labelled`.

    test: disjoint from the others, but for the split that is called transductive.

    held_out: kept for tuning, in no other part, unless `evaluate_on: held_out` made it the test part.
    twins: int64 [n, 2], training images left out as they are, byte for byte, the second one, which is evaluated on.
    """

    images: ImageSet
    test: np.ndarray
    labelled: np.ndarray
    unlabelled: np.ndarray
    held_out: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    twins: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))


class Parts(NamedTuple):
    """What a split rule returns: ids, int64, in any order; `rest` are the training images without a label."""

    test: np.ndarray
    held_out: np.ndarray
    labelled: np.ndarray
    rest: np.ndarray


SplitRule = Callable[[ImageSet, DataConfig, int], Parts]
SPLITS: Registry[SplitRule] = Registry("split")
register_split = SPLITS.register
"""Make a function (images, config, seed) -> Parts available as `mpl_scale.data.split`."""

_BY_DEFINITION = {"cifar10_4k", "svhn_1k", "imagenet_10"}
"""Splits of appendix C.1: there, labelled images are not among the unlabelled ones."""


def make_splits(images: ImageSet, *, config: DataConfig, seed: int) -> Splits:
    """The parts that `config.split` names, or the places of joined sets, without the images that were refused.

    Args:
        images: the data set, as joined.load_images returns it.
        config: `split` and the settings it names are read.
        seed: the run's seed, used when `split_seed` is null.

    Raises:
        ValueError: an unknown split, too few images for it, or a source that has not what it needs.
    """
    seed = seed if config.split_seed is None else config.split_seed
    if isinstance(images, SyntheticImages):
        parts = Parts(*np.arange(len(images), dtype=np.int64).reshape(-1, images.count))
    elif isinstance(images, JoinedImages):
        parts = _apart(images, config, seed)
    else:
        require_known("mpl_scale.data.split", config.split, SPLITS)
        parts = SPLITS[config.split](images, config, seed)
    if isinstance(images, IndexedImages):
        parts = parts._replace(rest=concatenate([parts.rest, images.ids_of("unlabelled")]))
    test, held_out, labelled, rest = (_usable(ids, images) for ids in parts)
    if config.evaluate_on == "held_out":
        test, held_out = held_out, held_out[:0]
    if not len(test):
        raise ValueError(_nothing_to_evaluate(config))
    source = config.unlabelled_from
    if source == "auto":
        named = isinstance(images, JoinedImages | SyntheticImages)
        source = "rest" if (len(rest) if named else config.split in _BY_DEFINITION) else "training"
    unlabelled = {"training": lambda: _sorted(labelled, rest), "rest": lambda: rest, "labelled": lambda: labelled}
    return Splits(images=images, test=test, held_out=held_out, labelled=labelled, unlabelled=unlabelled[source]())


def _apart(images: JoinedImages, config: DataConfig, seed: int) -> Parts:
    """The split of places apart: `labelled`, `unlabelled`, `validation` and `test` say what their images are for.

    Nothing is drawn but, where no place and no part of `labelled` is evaluated on, a share test_fraction of `labelled`.

    Raises:
        ValueError: a place that holds nothing for its purpose.
    """
    labelled = _usable(images.ids_of("labelled", "train", "extra"), images)
    unlabelled = images.ids_of("unlabelled", "train", "extra", "unlabelled")
    for name, found in (("labelled", labelled), ("unlabelled", unlabelled)):
        if getattr(config, name) is not None and not len(found):
            raise ValueError(f"mpl_scale.data.{name} holds no {name} image that may be trained on; give other places")
    test, validation = (_evaluated(images, name) for name in ("test", "validation"))
    if config.test is None:
        test = images.ids_of("labelled", "test")
    if config.evaluate_on == "held_out" and config.validation is None:
        raise ValueError("mpl_scale.data.evaluate_on = 'held_out' needs mpl_scale.data.validation; set it")
    if not len(test) and config.evaluate_on == "test":
        test, validation = validation, validation[:0]
    if not len(test) and not len(validation):
        one = config.model_copy(update={"labelled_per_class": 1})
        counts = np.bincount(images.labels[labelled], minlength=len(images.classes))
        tests = np.maximum(1, np.round(config.test_fraction * counts).astype(np.int64))
        test = _by_class(images, one, seed, pool=labelled, counts=counts, tests=tests).test
        labelled = np.setdiff1d(labelled, test)
    own = images.ids_of("labelled", "unlabelled")
    return Parts(test=test, held_out=validation, labelled=labelled, rest=concatenate([own, unlabelled]))


def _evaluated(images: JoinedImages, name: str) -> np.ndarray:
    """The test part of a place, or all of it where it has none."""
    own = images.ids_of(name, "test")
    return own if len(own) else images.ids_of(name)


@register_split("stratified")
def stratified(images: ImageSet, config: DataConfig, seed: int) -> Parts:
    """Hold out a stratified share of the training images, then draw the labelled images of each class from the rest."""
    pool = _usable(_training(images), images)
    counts = np.bincount(images.labels[pool], minlength=len(images.classes))
    tests = np.maximum(1, np.round(config.test_fraction * counts).astype(np.int64))
    return _by_class(images, config, seed, pool=pool, counts=counts, tests=tests)


@register_split("transductive")
def transductive(images: ImageSet, config: DataConfig, seed: int) -> Parts:
    """Every sample is tested, and trained on without its label but for `labelled_per_class` of each class (3.1)."""
    pool = _usable(_training(images), images)
    counts = np.bincount(images.labels[pool], minlength=len(images.classes))
    drawn = _by_class(images, config, seed, pool=pool, counts=counts, tests=np.zeros_like(counts))
    return drawn._replace(test=pool)


@register_split("test_files")
def test_files(images: ImageSet, config: DataConfig, seed: int) -> Parts:
    """The data set's own test part; the labelled images of each class are drawn from its training part."""
    pool = _usable(_part(images, "train", config), images)
    counts = np.bincount(images.labels[pool], minlength=len(images.classes))
    drawn = _by_class(images, config, seed, pool=pool, counts=counts, tests=np.zeros_like(counts))
    return drawn._replace(
        test=_part(images, "test", config), rest=concatenate([drawn.rest, _part(images, "extra", config)])
    )


@register_split("cifar10_4k")
def cifar10_4k(images: ImageSet, config: DataConfig, seed: int) -> Parts:
    """The first 5,000 of the 50,000 training images held out, the next 4,000 labelled, 41,000 unlabelled (C.1)."""
    return _leading(images, config, held_out=5000, labelled=4000)


@register_split("svhn_1k")
def svhn_1k(images: ImageSet, config: DataConfig, seed: int) -> Parts:
    """ "The same procedure" for SVHN (C.1): 5,000 held out, the next 1,000 labelled, the others and `extra` unlabelled.

    Section 3.2 speaks of "about 603,000" unlabelled images: 604,388 less 1,000, so those held out are counted there.
    """
    return _leading(images, config, held_out=5000, labelled=1000)


@register_split("imagenet_10")
def imagenet_10(images: ImageSet, config: DataConfig, seed: int) -> Parts:
    """The first 102 of 1,024 training shards labelled, the last 20 held out for tuning (C.1).

    `labelled_fraction` 0.2 takes the first 204, and so on: the whole number below the fraction of all shards.
    """
    if not isinstance(images, IndexedImages):
        raise ValueError(
            f"mpl_scale.data.split = 'imagenet_10' counts shards, and source {config.source} has none; "
            "use tfrecord, webdataset, parquet or arrow, or split = 'stratified'"
        )
    shards = [number for number, shard in enumerate(images.shards) if shard.part == "train"]
    labelled, held_out = int(config.labelled_fraction * len(shards) + 1e-9), config.held_out_shards
    if labelled < 1 or labelled + held_out >= len(shards):
        raise ValueError(
            f"mpl_scale.data.labelled_fraction = {config.labelled_fraction:g} of {len(shards)} training shards is "
            f"{labelled} labelled, and held_out_shards = {held_out}: no shard is left for one of the parts; change them"
        )
    return Parts(
        test=images.ids_of("test"),
        held_out=images.ids_of_shards(shards[len(shards) - held_out :]),
        labelled=images.ids_of_shards(shards[:labelled]),
        rest=images.ids_of_shards(shards[labelled : len(shards) - held_out]),
    )


def _leading(images: ImageSet, config: DataConfig, *, held_out: int, labelled: int) -> Parts:
    """The training images in the order of their files: held out, then labelled, then the rest with the extra ones."""
    train = _part(images, "train", config)
    if len(train) <= held_out + labelled:
        raise ValueError(
            f"mpl_scale.data.split = '{config.split}' needs more than {held_out} + {labelled} training images, and "
            f"there are {len(train)}; give all files of the data set, or use split = 'test_files'"
        )
    return Parts(
        test=_part(images, "test", config),
        held_out=train[:held_out],
        labelled=train[held_out : held_out + labelled],
        rest=concatenate([train[held_out + labelled :], _part(images, "extra", config)]),
    )


def _by_class(
    images: ImageSet, config: DataConfig, seed: int, *, pool: np.ndarray, counts: np.ndarray, tests: np.ndarray
) -> Parts:
    """For each class of the pool, in an order drawn by the seed: test images, labelled images, the rest."""
    for name, count, test in zip(images.classes, counts, tests, strict=True):
        if count - test < config.labelled_per_class:
            held_out = f", and test_fraction = {config.test_fraction} holds out {test} of them" if test else ""
            raise ValueError(
                f"mpl_scale.data.labelled_per_class = {config.labelled_per_class}, but class {name!r} has {count} "
                f"training images{held_out}; lower it, or add images to the class"
            )
    keys = uniform_numpy(seed=seed, stream=stream_of(Purpose.SPLIT), epoch=np.zeros_like(pool), ids=pool, columns=1)[
        :, 0
    ]
    by_class = pool[np.lexsort((pool, keys, images.labels[pool]))]  # grouped by class, in random order within each
    position = np.arange(len(pool)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each image in its class
    limit = np.repeat(tests, counts)
    return Parts(
        test=by_class[position < limit],
        held_out=by_class[:0],
        labelled=by_class[(position >= limit) & (position < limit + config.labelled_per_class)],
        rest=by_class[position >= limit + config.labelled_per_class],
    )


def _training(images: ImageSet) -> np.ndarray:
    """Ids of all images outside the data set's own test part."""
    if isinstance(images, IndexedImages | ImageFiles):
        return concatenate([images.ids_of("train"), images.ids_of("extra")])
    return np.arange(len(images), dtype=np.int64)


def _part(images: ImageSet, part: str, config: DataConfig) -> np.ndarray:
    if not (isinstance(images, IndexedImages) or (isinstance(images, ImageFiles) and len(images.tests))):
        raise ValueError(
            f"mpl_scale.data.split = '{config.split}' needs a source with a test part of its own (cifar10, cifar100, "
            "svhn, stl10, idx, tfrecord, webdataset, parquet, arrow, arrays, table; folder with train/ and test/), and "
            f"{config.source} has none; use split = 'stratified'"
        )
    return images.ids_of(part)  # type: ignore[arg-type]


def _usable(ids: np.ndarray, images: ImageSet) -> np.ndarray:
    """Sorted, without the refused ones; not copied where nothing is to be done."""
    if (ids[1:] < ids[:-1]).any():
        ids = np.sort(ids)
    if not len(ids) or not len(images.refused):
        return ids
    places = np.minimum(np.searchsorted(ids, images.refused), len(ids) - 1)
    return np.delete(ids, places[ids[places] == images.refused])


def _sorted(*parts: np.ndarray) -> np.ndarray:
    return np.sort(np.concatenate(parts))


def _nothing_to_evaluate(config: DataConfig) -> str:
    if config.evaluate_on == "held_out":
        return (
            f"mpl_scale.data.evaluate_on = 'held_out', and split = '{config.split}' holds nothing out; "
            "set evaluate_on = 'test'"
        )
    return (
        f"mpl_scale.data.evaluate_on = 'test', and root = '{config.root}' has no test files; "
        "add them, or set evaluate_on = 'held_out'"
    )
