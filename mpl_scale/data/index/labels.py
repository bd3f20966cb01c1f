"""Labels as they stand in the files, counted from 0; and whether they can be what the user means.

A label outside its range is no unreadable image: it says that the others may be shifted, too. So an index keeps the
finding, and no run takes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mpl_scale.data.index.format import FORMATS, MOST_CLASSES, Part, Refusal, Scan, ScanOptions, Shard


def refuse_unused(source: str, *, label_offset: int | None, check_data: bool | None) -> None:
    """ValueError for an option that was given, so is not None, and has no effect with this source."""
    found = FORMATS.get(source)
    if label_offset is not None and (found is None or found.first_label is None):
        raise ValueError(
            f"mpl_scale.data.label_offset = {label_offset} has no effect with source {source}, which defines "
            "its labels; leave it out"
        )
    if check_data is not None and (found is None or not found.checksums):
        option = "" if check_data else " (--skip_data_crc)"
        raise ValueError(
            f"mpl_scale.data.check_data = {str(check_data).lower()}{option} has no effect with source {source}, which "
            "has no checksums; leave it out"
        )


def first_label(source: str, options: ScanOptions) -> int:
    """The first class's label in the files."""
    return (FORMATS[source].first_label or 0) if options.label_offset is None else options.label_offset


def count_from_zero(scan: Scan, shard: Shard, *, first: int, classes: Sequence[str] | None) -> tuple[int, int] | None:
    """Count the scan's labels from 0, and refuse those that are no class.

    Args:
        scan: of a format; its entries are changed.
        shard: that was scanned.
        first: the first class's label.
        classes: names, where they are known.

    Returns:
        The smallest and the largest label as they stand in the files; None where there is none.
    """
    usable = np.ones(len(scan.entries), bool)
    usable[[refusal.entry for refusal in scan.refusals if refusal.entry is not None]] = False
    labels = scan.entries["label"]
    if not usable.any():
        return None
    found = int(labels[usable].min()), int(labels[usable].max())
    last = first + (MOST_CLASSES if classes is None else len(classes)) - 1
    outside = usable & ((labels < first) | (labels > last))
    for row in np.flatnonzero(outside).tolist():
        where = f"below {first}, the first class" if labels[row] < first else f"above {last}, the last class"
        reason = f"label {int(labels[row])} is {where}"
        scan.refusals.append(Refusal(shard.name, int(scan.entries["offset"][row]), reason, row, label=True))
        for name in ("label", "height", "width"):
            scan.entries[name][row] = 0
        usable[row] = False
    if usable.any():
        labels[usable] -= first
    for names in (scan.class_names, scan.given):
        kept = {label - first: name for label, name in names.items() if first <= label <= last}
        names.clear()
        names.update(kept)
    return found


@dataclass
class LabelCensus:
    """Which labels a data set holds, by part."""

    first: int
    adjustable: bool  # whether label_offset has an effect
    ranges: dict[Part, tuple[int, int]] = field(default_factory=dict)  # smallest and largest, as in the files
    faults: int = 0  # labels that cannot be used
    examples: list[str] = field(default_factory=list)
    _present: dict[Part, set[int]] = field(default_factory=lambda: defaultdict(set))  # usable, counted from 0

    def add(self, part: Part, found: Sequence[int] | None, labels: np.ndarray) -> None:
        """A shard: its smallest and largest label, and the usable ones, int64, counted from 0."""
        if found is not None:
            low, high = self.ranges.get(part, (found[0], found[1]))
            self.ranges[part] = min(low, found[0]), max(high, found[1])
        self._present[part].update(np.unique(labels).tolist())

    def add_fault(self, what: str, *, first: bool) -> None:
        """A label that cannot be used; first: of its kind."""
        self.faults += 1
        if first and len(self.examples) < 3:
            self.examples.append(what)

    def finding(self, *, named: int | None, assumed: bool) -> dict[str, Any]:
        """What is wrong with the labels, for meta.json.

        Args:
            named: number of class names that the data set gives; None: it gives none.
            assumed: whether `first` is the format's custom, and nobody's setting.

        Returns:
            faults, examples; suspicion: what may be wrong with all of them, or None; offset: the label_offset that
            would explain it, or None; confirm: the label_offset that says that nothing is wrong, or None; range: the
            smallest and the largest label in the files, and `first`.
        """
        suspicion, offset = self._suspicion(named, assumed)
        return {
            "faults": self.faults,
            "examples": self.examples,
            "suspicion": suspicion,
            "offset": offset if self.adjustable else None,
            "confirm": self.first if suspicion is not None and not self.faults else None,
            "range": [*self._range(), self.first] if self.ranges and self.adjustable else None,
        }

    def absent(self, classes: int) -> list[int]:
        """The labels below `classes` of which the training files hold no image."""
        present = self._present["train"] | self._present["extra"]
        return [label for label in range(classes) if label not in present]

    def _range(self) -> tuple[int, int]:
        return min(low for low, _ in self.ranges.values()), max(high for _, high in self.ranges.values())

    def _suspicion(self, named: int | None, assumed: bool) -> tuple[str | None, int | None]:
        if not self.ranges:
            return None, None
        low, high = self._range()
        fits = named is None or high - low < named
        if self._shifted(assumed):
            train, test = self.ranges["train"], self.ranges["test"]
            return (
                f"labels run from {train[0]} to {train[1]} in the training files, from {test[0]} to {test[1]} in the "
                "test files: number both alike",
                None,
            )
        if low < min(0, self.first):
            return f"labels start at {low}: remove images without a label", None
        if named is not None and not fits:
            return f"labels run from {low} to {high}, and there are {named} class names", None
        if low != self.first and (low < self.first or high >= self.first + (named or MOST_CLASSES) or assumed):
            return f"labels start at {low}, not at {self.first}", low
        if assumed and named is not None and high < self.first + named - 1:
            return f"labels run from {low} to {high}, and there are {named} class names", None
        return None, None

    def _shifted(self, assumed: bool) -> bool:
        """Whether training and test files hold the same classes, counted from different numbers."""
        if not {"train", "test"} <= self.ranges.keys():
            return False
        (low, high), (test_low, test_high) = self.ranges["train"], self.ranges["test"]
        if low == test_low or high - low != test_high - test_low or high == low:
            return False
        return self.faults > 0 or (assumed and all(len(self._present[part]) > high - low for part in ("train", "test")))


class LabelProblem(NamedTuple):
    """What is wrong with the labels of an index.

    offset: the label_offset that would mend it. confirm: the label_offset that says that the labels are right.
    """

    what: str
    faults: int
    offset: int | None
    confirm: int | None


def label_problem(meta: Mapping[str, Any]) -> LabelProblem | None:
    """From an index's meta.json; in that of version 1 there is no finding, and its reasons are read."""
    finding = meta.get("labels")
    if finding is None:
        faults = sum(count for kind, count in meta.get("reasons", {}).items() if kind.startswith("label N"))
        finding = {"faults": faults, "examples": [], "suspicion": None, "offset": None, "confirm": None}
    parts = []
    if finding["faults"]:
        examples = f" ({'; '.join(finding['examples'])})" if finding["examples"] else ""
        parts.append(f"{finding['faults']} label(s) cannot be used{examples}")
    if finding["suspicion"] is not None:
        parts.append(finding["suspicion"])
    return LabelProblem("; ".join(parts), finding["faults"], finding["offset"], finding["confirm"]) if parts else None


def set_offset(offset: int) -> str:
    """Advice: the setting, and the command-line option, of a label offset."""
    return f"set mpl_scale.data.label_offset = {offset} (mpl-scale index --label_offset {offset})"


def range_hint(meta: Mapping[str, Any]) -> str:
    """Which labels the files hold, where label_offset may be wrong; else nothing."""
    found = meta.get("labels", {}).get("range")
    if found is None:
        return ""
    low, high, first = found
    return f", or mpl_scale.data.label_offset: the files hold labels {low} to {high}, and {first} is the first class"
