"""Images that turned out bad while they were read or decoded: which, why, and how many are too many.

A bad image does not end a run: its place in the batch is taken by the next good image of the same list (decode.py).
Whether an image is bad depends on its file alone, so a run that is resumed, or run on other ranks, takes the same
substitutes; the list here only saves it from trying twice, and tells people.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mpl_scale.data.encoded.probe import unreadable_error

LEAST_BAD = 10
"""Different bad images before the fraction counts: a few in the first batches say nothing."""


class Quarantine:
    """The bad images that this rank has met in a run.

    bad: reason by sample id, of images that no view can be decoded of.
    partly_bad: ids of images of which some parts cannot be decoded; each view of them is tried by itself.
    by_pil: ids of good images that DALI cannot decode at all, and PIL does.
    """

    def __init__(
        self, *, max_fraction: float = 0.01, path: Path | None = None, warn: Callable[[str], None] | None = None
    ) -> None:
        """Args:
        max_fraction: share of the drawn images that may be bad, `mpl_scale.data.max_bad_fraction`.
        path: a JSON Lines file, appended to: {"sample", "name", "reason"} of each bad image once, also over restarts.
            None: not written.
        warn: told of each bad image once.
        """
        self.bad: dict[int, str] = {}
        self.partly_bad: set[int] = set()
        self.by_pil: set[int] = set()
        self._max_fraction, self._path, self._warn = max_fraction, path, warn
        self._reasons: dict[str, str] = {}  # by the image's name, in the order they were met
        self._drawn = self._replaced = 0
        self._missed: set[int] = set()  # ids that were drawn and replaced
        self._listed = _names_in(path)
        self._line_end = "\n" if path is not None and _is_cut_short(path) else ""
        self._lock = threading.Lock()  # training decodes ahead, in a thread of its own, while evaluation decodes

    @property
    def count(self) -> int:
        """Different bad images, those in the file included: what an earlier process of the run has met."""
        return len(self._listed)

    def add(self, sample: int, name: str, *, reason: str, everywhere: bool = True) -> None:
        """A bad image.

        Args:
            sample: its id.
            name: where it is: a path, or a path and an offset.
            reason: for people.
            everywhere: False: only a part of it is known to be bad.
        """
        with self._lock:
            if everywhere:
                self.bad[sample] = reason
                self.partly_bad.discard(sample)
            else:
                self.partly_bad.add(sample)
            self._reasons.setdefault(name, reason)
            if name in self._listed:
                return
            self._listed.add(name)
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(self._line_end + json.dumps({"sample": sample, "name": name, "reason": reason}) + "\n")
                    self._line_end = ""
            if self._warn is not None:
                self._warn(f"bad image, another takes its place: {name}: {reason}")

    def leave_to_pil(self, sample: int, name: str) -> None:
        """An image that PIL decodes from now on."""
        with self._lock:
            self.by_pil.add(sample)
            if self._warn is not None:
                self._warn(f"decoded by PIL, because DALI cannot: {name}")

    def count_draws(self, asked: np.ndarray, used: np.ndarray) -> None:
        """Take note of a batch.

        Args:
            asked: int64 [n], the sample ids that were drawn.
            used: int64 [n], those that were decoded.

        Raises:
            ValueError: more than max_fraction of all drawn images were bad; it names the first ones.
        """
        missed = asked[asked != used]
        self._drawn += len(asked)
        self._replaced += len(missed)
        self._missed.update(missed.tolist())
        if len(self._missed) >= LEAST_BAD and self._replaced > self._max_fraction * self._drawn:
            raise ValueError(
                f"{self._replaced} of the {self._drawn} images drawn so far were bad, more than mpl_scale.data."
                f"max_bad_fraction = {self._max_fraction:g}; {unreadable_error(self._reasons)}"
            )


def _is_cut_short(path: Path) -> bool:
    """Whether a kill left the last line without its end."""
    return path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")


def _names_in(path: Path | None) -> set[str]:
    """The names that an earlier process of the run has written; a line that a kill cut short is passed over."""
    names = set()
    if path is not None and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                names.add(json.loads(line)["name"])
            except (ValueError, TypeError, KeyError):
                continue
    return names
