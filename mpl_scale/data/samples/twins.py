"""Images of places apart (mpl_scale.data.labelled and others) that are, byte for byte, one to evaluate on.

They are not trained on, wherever they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.index.reader import concatenate
from mpl_scale.data.joined import JoinedImages
from mpl_scale.data.registry import data_folder
from mpl_scale.data.samples.splits import Splits
from mpl_scale.files import lock, replacing, save_array

_CHUNK = 1 << 16  # images hashed at once
_NAMED = 10


def without_twins(splits: Splits) -> Splits:
    """The splits without those training images that are, byte for byte, one to evaluate on; `twins` names them.

    Files of one size are compared by their SHA-256, once: the result is kept with the indexes.

    Raises:
        ValueError: nothing is left of a part, or of a class.
    """
    images = splits.images
    assert isinstance(images, JoinedImages)
    evaluated, trained = (
        concatenate([splits.test, splits.held_out]),
        concatenate([splits.labelled, splits.unlabelled]),
    )
    twins = _kept_twins(images, evaluated, trained)
    left = {name: getattr(splits, name) for name in ("labelled", "unlabelled")}
    if len(twins):
        left = {name: np.setdiff1d(ids, twins[:, 0], assume_unique=True) for name, ids in left.items()}
    counts = np.bincount(images.labels[left["labelled"]], minlength=len(images.classes))
    missing = [str(name) for name, count in zip(images.classes, counts, strict=True) if not count]
    if missing or not len(left["unlabelled"]):
        what = f"labelled has no image of class '{missing[0]}'" if missing else "unlabelled has no image"
        why = f": {len(twins)} are, byte for byte, images to evaluate on" if len(twins) else ""
        raise ValueError(f"mpl_scale.data.{what} that may be trained on{why}; give other images")
    return replace(splits, **left, twins=twins)


def apart_notes(splits: Splits, listed: Path) -> list[str]:
    """What people should know of the places: images left out as twins, and images that are used for nothing.

    listed: the file that names all twins.
    """
    images, twins, notes = splits.images, splits.twins, []
    if len(twins):
        pairs = [" = ".join(images.name(sample) for sample in pair) for pair in twins[:_NAMED].tolist()]
        more = f"; all are in {listed}" if len(twins) > _NAMED else ""
        notes.append(
            f"{len(twins):,} training images are left out: each is, byte for byte, one to evaluate on: "
            f"{'; '.join(pairs)}{more}"
        )
    used = np.zeros(len(images), bool)
    for ids in (splits.test, splits.held_out, splits.labelled, splits.unlabelled, twins[:, 0], images.refused):
        used[ids] = True
    if unused := int((~used).sum()):
        notes.append(f"{unused:,} images are used for nothing: they are of another part than the place is named for")
    return notes


def _kept_twins(images: JoinedImages, evaluated: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """`find_twins`, computed by one process of a machine and kept."""
    asked = hashlib.sha256(images.fingerprint.encode() + evaluated.tobytes() + b"|" + trained.tobytes())
    path = data_folder() / f"{asked.hexdigest()[:16]}.twins.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                found = find_twins(images, evaluated=evaluated, trained=trained)
                with replacing(path) as draft:
                    save_array(draft, found)
            return np.asarray(np.load(path, allow_pickle=False))
    except OSError:  # a folder that cannot be written to: computed again by each process and run
        return find_twins(images, evaluated=evaluated, trained=trained)


def find_twins(images: JoinedImages, *, evaluated: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Which training images have the very bytes of one to evaluate on: int64 [n, 2], both ids, by the first.

    Args:
        images: all of them.
        evaluated: int64, sample ids.
        trained: int64, sample ids; one may stand there twice.
    """
    kinds = images.kinds
    wanted = np.unique(kinds[evaluated])
    suspects = trained[np.isin(kinds[trained], wanted)]
    evaluated = evaluated[np.isin(kinds[evaluated], kinds[suspects])]
    first: dict[bytes, int] = {}
    for sample, digest in _digests(images, evaluated):
        first.setdefault(digest, sample)
    pairs = [(sample, first[digest]) for sample, digest in _digests(images, suspects) if digest in first]
    return np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0)


def _digests(images: JoinedImages, ids: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Id and SHA-256 of the encoded images, without those that cannot be read."""

    def digest_of(sample: int) -> bytes | None:
        with suppress(UnreadableImage):
            return hashlib.sha256(images.read(sample).data).digest()
        return None

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(ids), _CHUNK):
            some = ids[start : start + _CHUNK].tolist()
            for sample, digest in zip(some, threads.map(digest_of, some), strict=True):
                if digest is not None:
                    yield sample, digest
